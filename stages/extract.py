"""extract: one model and the waveforms in, its layers in a store and one receipt out."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pipeline.upstream import Upstream

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
    from stages._params import read_params
    from stages._progress import progress

    settings: ExtractParams = read_params("extract", ExtractParams, params)
    what: Keep = read_params(keep, Keep, params)
    utterances = read_manifest(manifest)
    store = open_receipt(waves, verify=True)
    place = choose_device(device)
    upstream = open_models(model, place)
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


def open_models(paths: list[Path], device: str) -> "Upstream":
    """The model, or the mean of several.

    Raises:
        StoreError: something that is no model.
        SettingsError: models of different shapes.
    """
    from pipeline.blend import Blend

    models = [open_model(path, device) for path in paths]
    return models[0] if len(models) == 1 else Blend(models)


def open_model(path: Path, device: str) -> "Upstream":
    """Whatever lies at `path`, told by the file it has.

    Raises:
        StoreError: nothing there that is a model.
    """
    from cache.errors import StoreError

    if path.suffix == ".json" and path.exists():
        from pipeline.logmel import load_logmel

        return load_logmel(path, device)
    if (path / "teacher.json").exists():
        from pipeline.teachers.forward import load_teacher

        return load_teacher(path, device)
    if (path / "shape.json").exists():
        from pipeline.student.upstream import load_student_upstream

        return load_student_upstream(path, device)
    raise StoreError(
        f"{path} is no model: it has neither teacher.json nor shape.json; make it with `dvc repro teacher` or `distill`"
    )


if __name__ == "__main__":
    app()
