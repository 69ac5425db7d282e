"""probe: the features of one model and the labels of one task in, one score out."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="Name of the model, as in features/MODEL.json.")],
    task: Annotated[str, typer.Argument(help="kws or sid; its settings are probes.TASK of the params file.")],
    features: Annotated[Path, typer.Option(help="Receipt of the features of the model.")],
    manifest: Annotated[Path, typer.Option(help="The manifest, for labels and splits.")],
    out: Annotated[Path, typer.Option(help="The score, a JSON file.")],
    params: Annotated[Path, typer.Option(help="The settings.")] = Path("params.yaml"),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
) -> None:
    """Probe a frozen model: weighted sum of layers, small head, learning rate chosen on dev, score on test."""
    from dataclasses import asdict

    import torch

    from cache.manifest import read_manifest
    from cache.publish import read_json, write_json
    from cache.receipts import open_receipt
    from pipeline.devices import choose_device
    from pipeline.tasks.features import pool
    from pipeline.tasks.labels import labelled_splits, task_named
    from pipeline.tasks.probe import ProbeParams, probe
    from stages._params import read_params
    from stages._progress import progress

    row = task_named(task)
    settings: ProbeParams = read_params(f"probes.{task}", ProbeParams, params)
    utterances = read_manifest(manifest)
    splits = labelled_splits(utterances, row)
    receipt = read_json(features)
    with progress(f"probe {model} on {task}", total=float(len(splits.ids)), unit="utterances") as tick:
        store, layers = open_receipt(receipt, verify=True), sorted(receipt["arrays"])
        pooled = pool(store, layers, utterances, splits.ids, settings.normalise_layers, on_pooled=tick)
    score = probe(pooled, splits, settings, torch.device(choose_device(device)))
    described = receipt["fingerprint"]["model"]
    write_json(
        out,
        {
            "format": 1,
            "model": model,
            "task": task,
            "description": {**described, "store": receipt["key"]},
            **asdict(score),
            "params": settings.model_dump(mode="json"),
        },
    )
    spread = "" if score.sd is None else f" ± {100 * score.sd:.1f}"
    print(
        f"{model} on {task}: {score.metric} {100 * score.mean:.1f}{spread} % "
        f"(chance {100 * score.chance:.1f}, lr {score.lr:g}, {len(splits.test)} test utterances)"
    )
    if score.lr_at_edge:
        print(f"the best learning rate {score.lr:g} is at the edge of those tried; widen probes.{task}.lrs")


if __name__ == "__main__":
    app()
