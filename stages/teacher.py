"""teacher: a folder, a hub commit, a checkpoint or a pretraining in, one pinned teacher and its weights for a student out."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def main(
    name: Annotated[
        str, typer.Argument(help="Name of the teacher; its settings are teachers.NAME of the params file.")
    ],
    out: Annotated[Path, typer.Option(help="The pinned folder to write.")],
    init: Annotated[Path, typer.Option(help="The weights to write under a student's names, a safetensors file.")],
    manifest: Annotated[Path | None, typer.Option(help="Which recordings there are; for {kind: pretrain}.")] = None,
    waves: Annotated[Path | None, typer.Option(help="Receipt of the wave store; for {kind: pretrain}.")] = None,
    starts_from: Annotated[
        Path | None,
        typer.Option(help="Folder of the teacher that {kind: pretrain} continues, or recipes/scratch.json: none."),
    ] = None,
    params: Annotated[Path, typer.Option(help="Settings.")] = Path("params.yaml"),
    device: Annotated[str, typer.Option(help="Where to pretrain: cpu, cuda, cuda:1, or auto.")] = "auto",
) -> None:
    """Fetch, check and pin a teacher, or pretrain one here (a killed run goes on); and write what a student can start from."""
    from cache.publish import publish_file
    from pipeline.devices import choose_device
    from pipeline.student.adopt import FAMILIES, adopt, read_shape, save_adopted
    from pipeline.teachers.pretrain.settings import PretrainParams, audio_seconds
    from pipeline.teachers.sources import Corpus, Folder, Hub, Source, TeacherParams, materialise
    from stages._corpus import open_corpus
    from stages._params import read_params
    from stages._progress import progress

    def say(line: str) -> None:
        print(f"teacher {name}: {line}", flush=True)

    source: Folder | Hub | PretrainParams = read_params(f"teachers.{name}.source", Source, params)
    settings = TeacherParams(source=source, normalise=read_params(f"teachers.{name}.normalise", bool | None, params))
    if isinstance(source, PretrainParams) and manifest is not None and waves is not None:
        corpus = Corpus(*open_corpus(manifest, waves))
        with progress(f"pretrain {name}", total=audio_seconds(source), unit="audio-s") as tick:
            pinned = materialise(settings, out, corpus, tick, starts_from, choose_device(device), say)
    else:
        pinned = materialise(settings, out, starts_from=starts_from)
    start, shape = {}, None
    if pinned.family in FAMILIES:  # of other families no student computes what the weights mean
        start, shape = adopt(out), read_shape(out, pinned.normalise)
    with publish_file(init) as partial:
        save_adopted(partial, start, shape, pinned.digest)
    print(
        f"teacher {name}: {pinned.family}, {pinned.num_params:,} parameters, {pinned.layers} layers x {pinned.width}, "
        f"waveforms {'normalised' if pinned.normalise else 'as they are'}, digest {pinned.digest[:12]}"
    )


if __name__ == "__main__":
    app()
