"""Distillation: settings, targets, waveforms and perhaps an init in; a folder with the student, its heads and curves out.

While it trains, its state lies in a hidden sibling of the output, where neither DVC nor a reader looks. A killed run goes
on from there, on a CPU bit for bit; a state of other settings, targets or audio is thrown away, and said to be. Started by
torchrun, every process computes its share of every step, and the first one writes.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cache.frames import RATE_HZ
from cache.manifest import Manifest
from cache.process import exclusive
from cache.publish import named_io_errors, publish_dir, write_json
from cache.ragged import Store
from pipeline.distill.curves import Log
from pipeline.distill.inputs import open_inputs
from pipeline.distill.learner import Learner
from pipeline.distill.loop import Run, train
from pipeline.distill.settings import StudentParams
from pipeline.distill.snapshots import Snapshots, write_student
from pipeline.distill.state import Progress
from pipeline.distill.world import ALONE, World, wait_for_all
from pipeline.interrupt import stop_requested
from pipeline.layers.targets import Targets
from pipeline.states import Say, discard_other
from pipeline.student.encoder import count_parameters

Tick = Callable[..., None]


def distil(
    params: StudentParams,
    targets: Targets,
    manifest: Manifest,
    waves: Store,
    init: Sequence[Path],
    out: Path,
    device: str,
    tick: Tick,
    say: Say,
    readers: int = 1,
    verify: float = 1.0,
    world: World = ALONE,
    logs: Sequence[Log] = (),
) -> dict[str, Any]:
    """Train a student and publish it; gives its metrics.

    Args:
        params: the student's settings.
        targets: the arrays it predicts.
        manifest: the utterances; those of split train are learned from, those of split dev validate.
        waves: their waveforms.
        init: weights to adopt, where the settings say so.
        out: the student's folder.
        device: cpu, cuda, cuda:1.
        tick: told each step, with a note.
        say: told what a person should know.
        readers: processes that read ahead; changes speed, not what is computed.
        verify: share of reads of the targets whose checksums are compared (`cache.ragged.Store`).
        world: this process among those that share every step; all must see `out`.
        logs: told every row of the curves as well.

    Raises:
        SettingsError: the init does not fit, teachers cannot be combined so, or an utterance does not fit into a batch.
        DataError: the manifest lacks a split, or its utterances are not those of the stores.
        StoreError: a store of the targets is missing, unfinished or not the one that was meant; or the targets were
            chosen for another ensemble.
        ResourceError: another process trains into the same folder, or one of this training has gone.
        Interrupted: a signal came; the state is saved.
        DecantError: the loss is not finite.
    """
    directory = out.with_name(f".{out.name}.training.partial")
    with ExitStack() as held:
        held.enter_context(named_io_errors(out))
        if world.leads:
            held.enter_context(exclusive(directory / "lock"))
        facts, splits, readers_of, learner, names = open_inputs(
            params, targets, manifest, waves, init, device, verify, world, say
        )
        if world.leads:  # after all checks: a wrong path must not cost a state
            discard_other(directory, facts, device if world.size == 1 else f"{world.size} x {device}", say)
        wait_for_all(world)
        snapshots = Snapshots(directory / "students", facts, params.train)
        with stop_requested() as stopping:
            run = Run(params, readers_of, directory, readers, world, snapshots, stopping, tick, say, logs, names)
            learner, progress = train(learner, run)
        step, dev = _published(progress, params)
        metrics = {
            "dev": dev,
            "step": step,
            "best": progress.best,
            "steps": progress.step,
            "epochs": progress.epoch,
            "parameters": {"student": count_parameters(learner.encoder), "heads": count_parameters(learner.predictor)},
            "train_utterances": len(splits["train"]),
            "train_seconds": int(splits["train"].samples.sum()) / RATE_HZ,
        }
        if world.leads:
            _publish(out, learner, progress, facts, metrics, run)
        wait_for_all(world)
    return metrics


def _published(progress: Progress, params: StudentParams) -> tuple[int, dict[str, float] | None]:
    """The step whose student is published, and its loss on dev."""
    best = progress.best
    if params.train.publish == "last" or best is None:
        return progress.step, progress.dev
    return int(best["step"]), {name: value for name, value in best.items() if name != "step"}


def _publish(
    out: Path, learner: Learner, progress: Progress, facts: dict[str, Any], metrics: dict[str, Any], run: Run
) -> None:
    with publish_dir(out) as partial:
        if metrics["step"] != progress.step:
            run.snapshots.copy(metrics["step"], partial)
        else:
            write_student(partial, learner, facts)
        run.snapshots.publish(partial / "checkpoints")
        shutil.copyfile(run.directory / "curves.csv", partial / "curves.csv")
        write_json(partial / "metrics.json", metrics)
    shutil.rmtree(run.directory)  # only now: until the student is published the state is what a rerun needs
