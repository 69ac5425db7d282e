"""similarity: the kept layers of one teacher in, how alike they are out, as numbers and as a picture."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="Name of the teacher, as in receipts/teachers/NAME.json.")],
    receipt: Annotated[Path, typer.Option(help="Receipt of its layers.")],
    out: Annotated[Path, typer.Option(help="The matrix to write, a JSON file.")],
    picture: Annotated[Path, typer.Option(help="Heat map and dendrogram to write, a PNG file.")],
    params: Annotated[Path, typer.Option(help="Settings.")] = Path("params.yaml"),
) -> None:
    """Compare all layers of a teacher with each other: what groups of layers are made of."""
    from cache.publish import publish_file, read_json, write_json
    from cache.receipts import open_receipt
    from pipeline.layers.similarity import SimilarityParams, similarity
    from pipeline.report.figures import png
    from pipeline.report.layers import heat_map_of
    from pipeline.report.products import SimilarityFile, parsed
    from stages._params import read_params

    settings: SimilarityParams = read_params("similarity", SimilarityParams, params)
    described = read_json(receipt)
    found = similarity(open_receipt(described, verify=True), settings)
    write_json(
        out,
        {
            "format": 1,
            "kind": "similarity",
            "teacher": name,
            "key": described["key"],
            "arrays": {array: facts["digest"] for array, facts in described["arrays"].items()},
            "settings": settings.model_dump(),
            "frames": found.frames,
            "layers": list(found.layers),
            "matrix": [[round(value, 9) for value in row] for row in found.matrix.tolist()],
        },
    )
    with publish_file(picture) as partial:
        partial.write_bytes(png(heat_map_of(parsed(out, SimilarityFile))))
    near = max(
        (found.matrix[i, j], found.layers[i], found.layers[j]) for i in range(len(found.layers)) for j in range(i)
    )
    print(
        f"similarity {name}: {len(found.layers)} layers, {settings.measure} over {found.frames:,} frames, "
        f"from {found.matrix.min():.3f} to {near[0]:.3f} (layers {near[2]} and {near[1]})"
    )


if __name__ == "__main__":
    app()
