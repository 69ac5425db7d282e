"""lhotse: a manifest and its waveforms in, manifests of lhotse with FLAC files out."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def main(
    manifest: Annotated[Path, typer.Option(help="The manifest.")],
    waves: Annotated[Path, typer.Option(help="The receipt of its waveforms.")],
    out: Annotated[Path, typer.Option(help="The folder to write; an earlier export there is replaced.")],
) -> None:
    """Write recordings, supervisions and audio for lhotse, k2 and icefall."""
    from pipeline.corpora.lhotse_export import export_lhotse
    from stages._corpus import open_corpus
    from stages._progress import progress

    utterances, store = open_corpus(manifest, waves)
    with progress("lhotse", total=len(utterances), unit="recordings") as tick:
        export_lhotse(utterances, store, out, tick)
    print(f"lhotse: {len(utterances):,} recordings and supervisions in {out}")


if __name__ == "__main__":
    app()
