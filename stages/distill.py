"""distill: one student's targets and the waveforms in, a trained student out; no teacher anywhere."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer()


@app.command()
def main(
    name: Annotated[str, typer.Argument(help="The student: its settings are students.NAME.")],
    targets: Annotated[Path, typer.Option(help="What `decant targets` wrote for it.")],
    manifest: Annotated[Path, typer.Option(help="Utterances and their splits.")],
    waves: Annotated[Path, typer.Option(help="Receipt of the wave store.")],
    init: Annotated[Path, typer.Option(help="Folder with the starting weights of each teacher.")],
    out: Annotated[Path, typer.Option(help="The student's folder.")],
    params: Annotated[Path, typer.Option(help="Settings.")] = Path("params.yaml"),
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, or auto.")] = "auto",
    readers: Annotated[int, typer.Option(min=1, help="Processes that read ahead.")] = 1,
    verify: Annotated[float, typer.Option(min=0, max=1, help="Share of reads whose checksums are compared.")] = 1.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Time the largest batches and write nothing.")] = False,
    tensorboard: Annotated[Path | None, typer.Option(help="Folder for TensorBoard.")] = None,
    wandb: Annotated[str | None, typer.Option(help="Project of Weights & Biases.")] = None,
) -> None:
    """Train a student from stored targets; a killed run goes on where its last state was saved."""
    from cache.errors import SettingsError
    from pipeline.distill.inputs import open_inputs
    from pipeline.distill.logs import open_logs
    from pipeline.distill.rehearse import rehearse
    from pipeline.distill.settings import StudentParams, phases_of
    from pipeline.distill.train import distil
    from pipeline.distill.world import join_world
    from pipeline.layers.targets import open_init, read_targets
    from stages._corpus import open_corpus
    from stages._params import read_params
    from stages._progress import progress

    with join_world(device) as (world, own):
        settings: StudentParams = read_params(f"students.{name}", StudentParams, params)
        chosen, (utterances, store) = read_targets(targets), open_corpus(manifest, waves, verify)
        steps = sum(phase.steps for phase in phases_of(settings))

        def say(line: str) -> None:
            if world.leads:
                print(f"distill {name}: {line}", flush=True)

        if settings.train.precision == "bfloat16" and not own.startswith("cuda"):
            say("bfloat16 is for GPUs: this run computes in float32")
        logs = open_logs(tensorboard, wandb, name, settings) if world.leads else []
        try:
            start = open_init(chosen, settings.init, init)
            if dry_run:
                rehearse(
                    settings,
                    open_inputs(settings, chosen, utterances, store, start, own, verify, world, say),
                    *(readers, say),
                )
                return
            with progress(f"distill {name}", steps, "steps", quiet=not world.leads) as tick:
                metrics = distil(
                    *(settings, chosen, utterances, store, start, out, own, tick, say, readers, verify, world, logs)
                )
        except SettingsError as error:
            raise SettingsError(f"{params}: students.{name}: {error}") from error
        dev = metrics["dev"]
        ending = f"dev l1 {dev['l1']:.4f}, cosine {dev['cosine']:.4f}" if dev else "not validated"
        say(f"{metrics['parameters']['student']:,} parameters after {metrics['steps']} steps: {ending}")


if __name__ == "__main__":
    app()
