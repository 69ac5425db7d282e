"""report: every product of a run in; one page, its pictures and its tables out."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def main(
    manifest: Annotated[Path, typer.Option(help="The manifest.")],
    quarantine: Annotated[Path, typer.Option(help="What prepare could not use.")],
    waves: Annotated[Path, typer.Option(help="Receipt of the wave store.")],
    receipts: Annotated[Path, typer.Option(help="Folder of the receipts of teachers.")],
    features: Annotated[Path, typer.Option(help="Folder of the receipts of probed features.")],
    models: Annotated[Path, typer.Option(help="Folder of the students.")],
    probes: Annotated[Path, typer.Option(help="Folder of the scores.")],
    out: Annotated[Path, typer.Option(help="Folder for index.html, the PNG files, scores.csv and metrics.json.")],
    profile: Annotated[Path | None, typer.Option(help="What `decant profile` measured.")] = None,
    similarity: Annotated[Path | None, typer.Option(help="Folder of what `decant similarity` wrote.")] = None,
    readme: Annotated[Path | None, typer.Option(help="Put the table between the result marks of this file.")] = None,
    params: Annotated[Path, typer.Option(help="The settings.")] = Path("params.yaml"),
) -> None:
    """Write the report of a run: reports/index.html needs no server and no network."""
    import functools

    from cache.publish import publish_file, write_json
    from cache.receipts import open_receipt
    from pipeline.report import figures, page, pareto, tables
    from pipeline.report.gather import gather
    from pipeline.report.listening import worst_errors
    from pipeline.report.settings import ReportParams
    from stages._params import read_params

    settings: ReportParams = read_params("report", ReportParams, params)
    run = gather(manifest, quarantine, waves, receipts, features, models, probes, similarity, profile, settings.superb)
    heard = None
    if settings.listen is not None:
        heard = worst_errors(run, functools.partial(open_receipt(waves, verify=True).read, "wave"), settings.listen)
    products = {
        "index.html": page.html(run, heard).encode(),
        "curves.png": figures.png(figures.curves(run.students)),
        "layer-weights.png": figures.png(figures.layer_weights(run)),
        **{f"pareto-{axis.name}.png": figures.png(pareto.plot(run, axis)) for axis in pareto.axes_of(run)},
        "scores.csv": tables.scores_csv(run).encode(),
    }
    for name, data in products.items():
        with publish_file(out / name) as partial:
            partial.write_bytes(data)
    write_json(out / "metrics.json", tables.metrics(run))
    if readme is not None:
        tables.splice(readme, tables.markdown(run))
    print(tables.markdown(run), end="")
    print(f"report: {len(run.scores)} scores of {len(run.models)} models in {out / 'index.html'}")


if __name__ == "__main__":
    app()
