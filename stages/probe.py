"""probe: the features of one model and the labels of one task in, one score out."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def main(
    model: Annotated[str, typer.Argument(help="Name of the model, as in features/MODEL.json.")],
    task: Annotated[
        str, typer.Argument(help="pr, asr, kws, sid, sv or er; its settings are probes.TASK of the params file.")
    ],
    features: Annotated[Path, typer.Option(help="Receipt of the features of the model.")],
    manifest: Annotated[Path, typer.Option(help="The manifest, for labels and splits.")],
    out: Annotated[Path, typer.Option(help="The score, a JSON file.")],
    trials: Annotated[Path | None, typer.Option(help="Trials, as prepare writes them; sv needs them.")] = None,
    params: Annotated[Path, typer.Option(help="The settings.")] = Path("params.yaml"),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
) -> None:
    """Probe a frozen model: weighted sum of its hidden states, small head, learning rate chosen on dev, score on test."""
    from dataclasses import asdict

    import torch

    from cache.manifest import read_manifest
    from cache.names import PROJECTION, in_order
    from cache.publish import read_json, write_json
    from cache.receipts import open_receipt
    from pipeline.corpora.trials import read_trials
    from pipeline.devices import choose_device
    from pipeline.tasks.labels import task_named
    from pipeline.tasks.run import Settings, job_of, settings_of
    from pipeline.tasks.textscore import AsrScore
    from stages._params import read_params
    from stages._progress import progress

    row = task_named(task)
    settings: Settings = read_params(f"probes.{task}", settings_of(task), params)
    utterances = read_manifest(manifest)
    asked = read_trials(trials, utterances.by_id) if task == "sv" and trials is not None else None
    job = job_of(row, utterances, settings, asked)
    receipt = read_json(features)
    with progress(f"probe {model} on {task}", total=job.total, unit=job.unit) as tick:
        layers = [name for name in in_order(list(receipt["arrays"])) if name != PROJECTION]  # it is no hidden state
        store = open_receipt(receipt, verify=True)
        score = job.score(store, layers, torch.device(choose_device(device)), tick)
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
    floor = f"chance {100 * score.chance:.1f}" if row.higher_is_better else f"no listening {100 * score.majority:.1f}"
    print(
        f"{model} on {task}: {score.metric} {100 * score.mean:.1f}{spread} % "
        f"({floor}, lr {score.lr:g}, {score.counts['test']} test utterances)"
    )
    if isinstance(score, AsrScore) and score.beam is not None:
        print(f"with a language model: WER {100 * score.beam.mean:.1f} % (weight {score.beam.lm_weight:g})")
    if score.lr_at_edge:
        print(f"the best learning rate {score.lr:g} is at the edge of those tried; widen probes.{task}.lrs")


if __name__ == "__main__":
    app()
