"""finetune: a student or a teacher, waveforms, labels and trials in; one model with a head for each task, judged, out."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="The system: its settings are finetunes.NAME.")],
    starts_from: Annotated[Path, typer.Option(help="Folder of the student or teacher that is fine-tuned.")],
    manifest: Annotated[Path, typer.Option(help="Utterances, their labels and splits.")],
    waves: Annotated[Path, typer.Option(help="Receipt of the wave store.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    trials: Annotated[Path | None, typer.Option(help="Trials of speaker verification; tasks.sv needs them.")] = None,
    params: Annotated[Path, typer.Option(help="Settings.")] = Path("params.yaml"),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    readers: Annotated[int, typer.Option(min=0, help="Processes that read ahead; 0: a thread does.")] = 1,
    verify: Annotated[float, typer.Option(min=0, max=1, help="Share of reads whose checksums are compared.")] = 1.0,
    tensorboard: Annotated[
        Path | None, typer.Option(help="Folder for TensorBoard, one below it for each seed.")
    ] = None,
    wandb: Annotated[str | None, typer.Option(help="Project of Weights & Biases.")] = None,
) -> None:
    """Train an encoder and its heads on keywords and speakers together; a killed run goes on where its state was saved."""
    from cache.errors import SettingsError
    from pipeline.corpora.trials import read_trials
    from pipeline.distill.curves import Log
    from pipeline.distill.logs import open_logs
    from pipeline.distill.world import join_world
    from pipeline.finetune.run import finetune
    from pipeline.finetune.settings import FinetuneParams
    from pipeline.finetune.start import open_start
    from stages._corpus import open_corpus
    from stages._params import read_params
    from stages._progress import progress

    with join_world(device) as (world, own):
        settings: FinetuneParams = read_params(f"finetunes.{name}", FinetuneParams, params)
        utterances, store = open_corpus(manifest, waves, verify)
        pairs = None if trials is None or settings.tasks.sv is None else read_trials(trials, utterances.by_id)
        steps = settings.train.steps * len(settings.seeds)

        def say(line: str) -> None:
            if world.leads:
                print(f"finetune {name}: {line}", flush=True)

        def logs_of(seed: int) -> list[Log]:
            folder = None if tensorboard is None else tensorboard / f"seed-{seed}"
            return open_logs(folder, wandb, f"{name}-seed-{seed}", settings) if world.leads else []

        if settings.train.precision == "bfloat16" and not own.startswith("cuda"):
            say("bfloat16 is for GPUs: this run computes in float32")
        try:
            with progress(f"finetune {name}", steps, "steps", quiet=not world.leads) as tick:
                metrics = finetune(
                    *(settings, open_start(starts_from), utterances, store, pairs, out, own, tick, say, readers, world),
                    logs_of,
                )
        except SettingsError as error:
            raise SettingsError(f"{params}: finetunes.{name}: {error}") from error
        for task, told in metrics["tasks"].items():
            spread = "" if told["sd"] is None else f" ± {100 * told['sd']:.1f}"
            say(
                f"{task}: {told['metric']} {100 * told['mean']:.1f}{spread} % on test, {100 * told['dev']:.1f} % on dev"
            )


if __name__ == "__main__":
    app()
