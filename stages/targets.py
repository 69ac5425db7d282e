"""targets: receipts, similarities and starting weights of all teachers in, what one student reads of them out."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="The student: its settings are students.NAME.")],
    receipts: Annotated[Path, typer.Option(help="Folder with one receipt per teacher.")],
    init: Annotated[Path, typer.Option(help="Folder with the starting weights of each teacher.")],
    out: Annotated[Path, typer.Option(help="The targets to write.")],
    params: Annotated[Path, typer.Option(help="Settings.")] = Path("params.yaml"),
    similarity: Annotated[Path | None, typer.Option(help="Folder of similarities, for groups of layers.")] = None,
) -> None:
    """Choose what a student learns; the output's bytes change only when that does."""
    from cache.errors import SettingsError
    from cache.publish import write_json
    from pipeline.layers.choose import choose_targets
    from pipeline.layers.ensembles import AnyEnsemble, Ensemble, head_groups, members
    from pipeline.layers.targets import AnyInit, Init, targets_json
    from stages._params import read_params

    ensemble: AnyEnsemble = read_params(f"students.{name}.ensemble", Ensemble, params)
    start: AnyInit = read_params(f"students.{name}.init", Init, params)
    try:
        targets = choose_targets(ensemble, receipts, start, init, similarity)
    except SettingsError as error:
        raise SettingsError(f"{params}: students.{name}: {error}") from error
    write_json(out, targets_json(targets))
    read = (
        f"{', '.join('+'.join(target) for target in s.targets)} of {m.teacher}"
        for m, s in zip(members(ensemble), targets.stores, strict=True)
    )
    heads = (f"{group.heads} heads {group.width} wide" for group in head_groups(ensemble, targets.widths))
    print(f"targets {name}: {'; '.join(read)}: {', '.join(heads)}")


if __name__ == "__main__":
    app()
