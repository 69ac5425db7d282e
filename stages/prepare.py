"""prepare: corpora in, one manifest, one wave store, verification trials and the list of what was left out, out."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()

SHOWN = 20  # quarantined recordings on screen; all are in the file


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The manifest to write.")],
    waves: Annotated[Path, typer.Option(help="The receipt of the wave store to write.")],
    quarantine: Annotated[Path, typer.Option(help="Where to list the recordings that cannot be used, and why.")],
    trials: Annotated[Path | None, typer.Option(help="Where to list the trials of speaker verification.")] = None,
    download: Annotated[bool, typer.Option("--download", help="First fetch open corpora that are missing.")] = False,
    params: Annotated[Path, typer.Option(help="Settings.")] = Path("params.yaml"),
) -> None:
    """Read or speak the corpora, bring them to 16 kHz, and write the manifest and the waveforms."""
    from cache.manifest import write_manifest
    from cache.publish import write_json
    from cache.receipts import store_root
    from pipeline.corpora.trials import write_trials
    from pipeline.prepare import PrepareParams, count_recordings_of, describe, describe_trials, prepare
    from pipeline.tasks.leaks import told
    from stages._params import read_params
    from stages._progress import progress

    settings: PrepareParams = read_params("prepare", PrepareParams, params)
    if download:
        from pipeline.corpora.download import download as fetch_missing

        for corpus, source in sorted(settings.sources.items()):
            for folder in fetch_missing(corpus, source):
                print(f"fetched {corpus}: {folder}")
    with progress("prepare", total=count_recordings_of(settings), unit="recordings") as tick:
        prepared = prepare(settings, store_root() / "waves", quarantine, tick)
    write_manifest(out, prepared.manifest)
    write_json(waves, prepared.receipt)
    if trials is not None:
        write_trials(trials, prepared.trials.trials)
    for line in describe(prepared.manifest):
        print(line)
    for line in told(prepared.manifest, prepared.leaks):
        print(line)
    for row in prepared.quarantined[:SHOWN]:
        print(f"quarantined {row.id} ({row.path}): {row.reason}")
    if len(prepared.quarantined) > SHOWN:
        print(f"... and {len(prepared.quarantined) - SHOWN:,} more quarantined, in {quarantine}")
    if prepared.trials.trials:
        left_out = f", {prepared.trials.left_out:,} left out for a quarantined recording" * bool(
            prepared.trials.left_out
        )
        for line in describe_trials(prepared.trials.trials):
            print(line)
        place = trials or "not written: name a file with --trials"
        print(f"trials: {len(prepared.trials.trials):,}{left_out}; {place}")
    print(
        f"prepare: {len(prepared.manifest):,} utterances, {prepared.receipt['rows'] / 57.6e6:.2f} h, "
        f"{prepared.receipt['bytes'] / 1e6:,.1f} MB in store/waves/{prepared.receipt['key']}; "
        f"{len(prepared.quarantined):,} quarantined"
    )
