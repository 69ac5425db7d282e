"""extract: one model and the waveforms in, its layers in a store and one receipt out."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="What to call the model on screen.")],
    model: Annotated[
        list[Path],
        typer.Option(
            help="A teacher's or student's folder, or the JSON of a log-mel baseline; several for their mean."
        ),
    ],
    manifest: Annotated[Path, typer.Option(help="Which utterances, in which order.")],
    waves: Annotated[Path, typer.Option(help="Receipt of the wave store.")],
    keep: Annotated[str, typer.Option(help="Key in the params file of what to keep, e.g. teachers.hubert.keep.")],
    out: Annotated[Path, typer.Option(help="The receipt to write.")],
    of: Annotated[str, typer.Option(help="Key of a list of folders below --model, whose mean is kept.")] = "",
    params: Annotated[Path, typer.Option(help="Settings.")] = Path("params.yaml"),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    writers: Annotated[int, typer.Option(min=0, help="Processes that write shards; 0 writes between forwards.")] = 1,
) -> None:
    """Run a model once over the manifest and store its layers; a killed run goes on where it stopped."""
    from cache.frames import RATE_HZ
    from cache.manifest import read_manifest
    from cache.publish import write_json
    from cache.receipts import open_receipt
    from pipeline.devices import choose_device
    from pipeline.extract import extract
    from pipeline.extraction.job import plan_job
    from pipeline.extraction.settings import ExtractParams, Keep
    from stages._models import model_paths, open_models
    from stages._params import read_params
    from stages._progress import progress

    settings: ExtractParams = read_params("extract", ExtractParams, params)
    what: Keep = read_params(keep, Keep, params)
    utterances = read_manifest(manifest)
    store = open_receipt(waves, verify=True)
    place = choose_device(device)
    upstream = open_models(model_paths(model, of, params), place)
    job = plan_job(upstream, utterances, settings, what, place)
    if job.left_out:
        print(f"extract {name}: {len(job.left_out)} recordings of more than {settings.long.max_sec:g} s are skipped")
    with progress(f"extract {name}", total=float(job.manifest.samples.sum()) / RATE_HZ, unit="audio-s") as tick:
        receipt = extract(upstream, utterances, store, settings, what, place, tick, writers)
    write_json(out, receipt)
    print(
        f"extract {name}: {len(receipt['arrays'])} arrays x {receipt['rows']:,} frames x {upstream.width} {settings.codec}, "
        f"{receipt['bytes'] / 1e6:,.1f} MB in store/features/{receipt['key']}"
    )


if __name__ == "__main__":
    app()
