"""cache plan: a model, a manifest and what to keep in; what the extraction takes out, and no where it does not fit."""

from pathlib import Path
from typing import Annotated

import typer


def main(
    model: Annotated[
        list[Path],
        typer.Option(
            help="A teacher's or student's folder, or the JSON of a log-mel baseline; several for their mean."
        ),
    ],
    manifest: Annotated[Path, typer.Option(help="Which utterances.")],
    waves: Annotated[Path, typer.Option(help="Receipt of the wave store.")],
    keep: Annotated[str, typer.Option(help="Key in the params file of what to keep, e.g. teachers.hubert.keep.")],
    params: Annotated[Path, typer.Option(help="Settings.")] = Path("params.yaml"),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    sample_sec: Annotated[float, typer.Option(help="Seconds of audio to time.")] = 60.0,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Bytes, files, free space and hours of an extraction, before it runs."""
    import json
    import shutil
    from dataclasses import asdict

    from cache.errors import ResourceError
    from cache.names import layers_of
    from cache.receipts import store_root
    from pipeline.cost import cost_of
    from pipeline.devices import choose_device
    from pipeline.extract import ExtractParams, Keep
    from pipeline.models import open_models
    from stages._corpus import open_corpus
    from stages._params import read_params

    settings: ExtractParams = read_params("extract", ExtractParams, params)
    what: Keep = read_params(keep, Keep, params)
    (utterances, store), place = open_corpus(manifest, waves), choose_device(device)
    cost = cost_of(open_models(model, place), utterances, store, settings, what, place, sample_sec, seed=0)
    root = store_root()
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if as_json:
        print(json.dumps({**asdict(cost), "hours": cost.hours, "free_bytes": free, "device": place}, indent=1))
    else:
        unit = "GPU-hours" if place.startswith("cuda") else "hours on this machine"
        print(f"{cost.utterances:,} utterances, {cost.hours_of_audio:,.2f} h of audio")
        print(f"{cost.rate:,.0f} audio-seconds/s on {cost.sample_seconds:,.0f} s of it: {cost.hours:,.3f} {unit}")
        print(f"{'':2}{'layers':<24}{'codec':<10}{'GB':>12}{'files':>10}   of {free / 1e9:,.1f} GB free")
        for choice in (cost.chosen, *cost.alternatives):
            mark = "*" if choice is cost.chosen else " "
            fits = "" if choice.bytes <= free else "   does not fit"
            names = ["+".join(map(str, layers_of(name))) or name for name in choice.arrays]
            kept = ", ".join(names) if len(names) < 8 else f"{len(names)} arrays"
            print(f"{mark:2}{kept:<24}{choice.codec:<10}{choice.bytes / 1e9:>12,.3f}{choice.files:>10,}{fits}")
    if cost.chosen.bytes > free:
        raise ResourceError(
            f"{root} has {free / 1e9:,.2f} GB free and {keep} takes {cost.chosen.bytes / 1e9:,.2f} GB; "
            "keep fewer layers, or set DECANT_STORE to a larger disk"
        )
