"""The loop of a training: a learner and everything it reads in; the learner after the last step, and how it got there, out.

What comes next is three integers: epoch, position in it, step. Batches are numbered through all epochs; a step takes the
next (processes x accumulate) of them, and each process computes its own. So a run resumes from any saved state.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch

from cache.errors import Interrupted
from cache.frames import num_frames
from pipeline.distill.batches import Batch, BatchReader
from pipeline.distill.build import next_learner, restored
from pipeline.distill.curves import Curves, Log
from pipeline.distill.learner import Learner, Update
from pipeline.distill.notfinite import dev_not_finite, not_finite
from pipeline.distill.plan import Planned, WithinShards, plan_epoch
from pipeline.distill.settings import StudentParams, phases_of
from pipeline.distill.snapshots import Snapshots
from pipeline.distill.state import Progress, find_state, save_state
from pipeline.distill.world import World, add_up, wait_for_all
from pipeline.ordered import ordered_map
from pipeline.states import Say
from pipeline.student.encoder import count_parameters
from pipeline.student.size import full_parameters

AHEAD = 3  # dev batches read while one is computed


class Run(NamedTuple):
    """What stays the same from the first step to the last."""

    params: StudentParams
    readers_of: dict[str, BatchReader]
    """Of the splits train and dev."""
    directory: Path
    """Where the state is."""
    readers: int
    world: World
    snapshots: Snapshots
    stopping: Callable[[], bool]
    tick: Callable[..., None]
    say: Say
    logs: Sequence[Log]
    target_names: Sequence[str]


class Step(NamedTuple):
    """The batches of one update."""

    mine: list[Planned]
    """Of this process."""
    frames: int
    """In those of all processes."""
    ends: tuple[int, int]
    """Epoch and position after it."""


def train(learner: Learner, run: Run) -> tuple[Learner, Progress]:
    """Bring a learner from where its state is to the last step of the last phase.

    Args:
        learner: before the first step.
        run: everything else.
    """
    phases = phases_of(run.params)
    total = sum(phase.steps for phase in phases)
    found = find_state(run.directory, run.say)
    wait_for_all(run.world)  # nobody writes a state before all have read the same
    progress = Progress() if found is None else found.progress
    run.snapshots.forget(progress, run.say)
    path, terms = run.directory / "curves.csv", run.params.train.loss_weights.terms
    more = () if run.params.prune is None else ("sparsity",)
    first = 0 if found is None else progress.step + 1
    with Curves(path, terms, more, run.target_names, progress.curves_bytes, first, run.world, run.logs) as curves:
        if found is not None:
            learner = restored(learner, found, phases[progress.phase])
            if progress.step < total:
                run.say(f"going on after step {progress.step} of {total}")
        run.tick(progress.step, found=True)
        if found is None:
            progress.dev = _validate(learner, run, 0)
            curves.add(step=0, **_dev_columns(progress))
        while True:
            done_before = sum(phase.steps for phase in phases[: progress.phase])
            _train_phase(learner, run, progress, curves, done_before, total)
            if progress.phase == len(phases) - 1:
                return learner, progress
            learner = next_learner(learner, phases[progress.phase + 1])
            progress.phase += 1
            left = count_parameters(learner.encoder)
            run.say(
                f"pruned: {left:,} parameters are left, {1 - left / full_parameters(run.params.shape):.2%} are gone"
            )


def _train_phase(learner: Learner, run: Run, progress: Progress, curves: Curves, before: int, total: int) -> None:
    train = run.params.train
    steps = before + learner.phase.steps
    if progress.step == steps:
        return
    reader = run.readers_of["train"]
    ahead: deque[Step] = deque()

    def flat() -> Iterator[Planned]:
        for step in islice(_steps(run, reader, progress), steps - progress.step):
            ahead.append(step)
            yield from step.mine

    with reader.ahead(flat(), train.batch_seconds, run.readers, learner.device) as batches:
        for _ in range(steps - progress.step):
            first = next(batches)
            step = ahead.popleft()
            update = learner.update(_some(first, batches, len(step.mine)), step.frames, progress.step + 1 - before)
            progress.step += 1
            progress.epoch, progress.position = step.ends
            progress.batches += len(step.mine) * run.world.size
            if not update.is_finite:
                raise not_finite(learner, reader, step.mine, update, run.directory, progress.step)
            _add_to_sums(progress, update)
            last = progress.step == steps
            validating = train.validate_every is not None and (last or progress.step % train.validate_every == 0)
            if validating:
                progress.dev = _validate(learner, run, progress.step)
                if not learner.phase.prunes:  # with gates it is no student yet
                    _remember_best(progress)
                    if run.world.leads:
                        run.snapshots.take(learner, progress)
            if last or validating or progress.step % train.log_every == 0:
                means = {name: value / progress.summed for name, value in progress.sums.items()}
                dev = _dev_columns(progress) if validating else {}
                curves.add(step=progress.step, rate=update.rate, **means, **dev)
                progress.sums, progress.summed = {}, 0
            stop = _anybody_stops(run, learner.device) and progress.step < total
            if last or stop or progress.step % train.checkpoint_every == 0:
                progress.curves_bytes = curves.flush()
                if run.world.leads:
                    save_state(run.directory, progress, learner.shape, learner, learner.optimizer)
                    run.snapshots.drop(progress)
            run.tick(1, note=f"l1 {update.terms['l1']:.3f} cosine {update.terms['cosine']:.3f}")
            if stop:
                wait_for_all(run.world)
                raise Interrupted(
                    f"stopped after step {progress.step} of {total} with its state saved; the same command goes on"
                )


def _some(first: Batch, batches: Iterator[Batch], number: int) -> Iterator[Batch]:
    """One batch and those after it, each asked for when the one before is done with."""
    yield first
    for _ in range(number - 1):
        yield next(batches)


def _steps(run: Run, reader: BatchReader, progress: Progress) -> Iterator[Step]:
    """Steps from where the training is on, without end."""
    world, accumulate = run.world, run.params.train.accumulate
    stream = _stream(run.params, reader, progress)
    while True:
        together = list(islice(stream, world.size * accumulate))
        mine = [planned for at, (planned, _) in enumerate(together) if at % world.size == world.rank]
        frames = sum(
            num_frames(int(reader.samples[item.utterance])) if item.span is None else item.span.count
            for planned, _ in together
            for item in planned.items
        )
        yield Step(mine, frames, together[-1][1])


def _stream(
    params: StudentParams, reader: BatchReader, progress: Progress
) -> Iterator[tuple[Planned, tuple[int, int]]]:
    """Batches from where the training is on, epoch after epoch, and the place in the epochs after each."""
    train, shuffle = params.train, params.train.shuffle
    epoch, position, number = progress.epoch, progress.position, progress.batches
    while True:
        local = (reader.shards, shuffle.together) if isinstance(shuffle, WithinShards) else ()
        plan = plan_epoch(reader.samples, train.crop, train.batch_seconds, params.seed, epoch, *local)
        for items in plan[position:]:
            position += 1
            yield Planned(number, items), (epoch, position) if position < len(plan) else (epoch + 1, 0)
            number += 1
        epoch, position = epoch + 1, 0


def _validate(learner: Learner, run: Run, step: int) -> dict[str, float] | None:
    """Loss terms on the dev split, always with the plan of epoch 0; read by a thread, which waits for torch alone."""
    train = run.params.train
    if train.validate_every is None:
        return None
    reader = run.readers_of["dev"]
    plan = plan_epoch(reader.samples, train.crop, train.batch_seconds, run.params.seed, 0)
    mine = islice(plan, run.world.rank, None, run.world.size)
    with ThreadPoolExecutor(1) as executor:
        batches = ordered_map(executor, reader.read_clean, mine, AHEAD)
        terms = learner.evaluate(batches, run.target_names)
    if not math.isfinite(terms["total"]):
        raise dev_not_finite(learner, reader, plan, step)
    return terms


def _remember_best(progress: Progress) -> None:
    dev = progress.dev or {}
    if dev and (progress.best is None or dev["total"] < progress.best["total"]):
        progress.best = {"step": progress.step, **dev}


def _anybody_stops(run: Run, device: torch.device) -> bool:
    """Whether a signal has come to any process: all stop after the same step."""
    if run.world.size == 1:
        return run.stopping()
    return bool(add_up(torch.tensor([float(run.stopping())], device=device), run.world).item())


def _dev_columns(progress: Progress) -> dict[str, float]:
    return {f"dev_{name}": value for name, value in (progress.dev or {}).items()}


def _add_to_sums(progress: Progress, update: Update) -> None:
    for name, value in {**update.terms, "grad_norm": update.grad_norm}.items():
        progress.sums[name] = progress.sums.get(name, 0.0) + value
    progress.summed += 1
