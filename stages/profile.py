"""profile: models in, what each of them costs on this machine out."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def main(
    out: Annotated[Path, typer.Option(help="The figures, a JSON file.")],
    models: Annotated[list[str] | None, typer.Option(help="NAME=PATH of a model; may be given several times.")] = None,
    of: Annotated[str, typer.Option(help="Or a key of the params file that maps names to {path: PATH}.")] = "",
    params: Annotated[Path, typer.Option(help="The settings.")] = Path("params.yaml"),
) -> None:
    """Measure models: parameters, bytes on disk, multiply-accumulates, real-time factor. All of them in one run."""
    from dataclasses import asdict

    from cache.publish import write_json
    from pipeline.profile import ProfileParams, machine, profile
    from stages._models import named_models
    from stages._params import read_params
    from stages._progress import progress

    settings: ProfileParams = read_params("profile", ProfileParams, params)
    paths = named_models(models or [], of, params)
    total = float(settings.rounds * len(set(settings.seconds)) * len(paths))
    with progress("profile", total=total, unit="turns") as tick:
        found = profile(paths, settings, on_turn=tick)
    write_json(
        out,
        {
            "format": 1,
            "kind": "profile",
            "machine": machine(),
            "params": settings.model_dump(mode="json"),
            "models": {name: asdict(one) for name, one in found.items()},
        },
    )
    for name, one in found.items():
        cost = one.costs[-1]
        print(
            f"{name}: {one.num_params:,} parameters, {one.weight_bytes:,} bytes, {cost.macs_per_second / 1e6:,.1f} M MACs "
            f"per second of audio, real-time factor {cost.rtf.median:.5f} ({cost.rtf.low:.5f} to {cost.rtf.high:.5f}), "
            f"at {cost.seconds:g} s"
        )


if __name__ == "__main__":
    app()
