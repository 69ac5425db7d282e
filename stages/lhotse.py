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
    from cache.manifest import read_manifest
    from cache.receipts import open_receipt
    from pipeline.corpora.lhotse_export import export_lhotse
    from stages._progress import progress

    utterances = read_manifest(manifest)
    with progress("lhotse", total=len(utterances), unit="recordings") as tick:
        export_lhotse(utterances, open_receipt(waves), out, tick)
    print(f"lhotse: {len(utterances):,} recordings and supervisions in {out}")


if __name__ == "__main__":
    app()
