"""The loop of one seed: a learner and everything it reads in; the learner after the last update, or the best one, out.

What comes next is two integers for each task, epoch and position in it, and one for both, the step. A step takes
(processes x accumulate) batches of every task, and each process computes its own. So a run resumes from any saved state.
"""

import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cache.errors import DecantError, Interrupted
from pipeline.distill.batches import Batch, BatchReader
from pipeline.distill.curves import Curves, Log
from pipeline.distill.learner import Update
from pipeline.distill.plan import Planned
from pipeline.distill.world import World, add_up, wait_for_all
from pipeline.finetune.examples import AllExamples
from pipeline.finetune.judge import AHEAD, judge
from pipeline.finetune.learner import Learner
from pipeline.finetune.plan import Place, Pool, batches_from
from pipeline.finetune.settings import FinetuneParams
from pipeline.ordered import ordered_map
from pipeline.states import Say, load_checked, save_checked

TASKS = ("kws", "sv")  # in this order wherever both are


class Run(NamedTuple):
    """What stays the same from the first step of a seed to the last."""

    params: FinetuneParams
    examples: AllExamples
    pools: Mapping[str, Pool]
    """Of each task that is learned, what it trains on."""
    reader: BatchReader
    directory: Path
    """Where the state of this seed is."""
    seed: int
    readers: int
    world: World
    stopping: Callable[[], bool]
    tick: Callable[..., None]
    say: Say
    logs: Sequence[Log]


@dataclass(slots=True)
class Progress:
    """How far a seed is."""

    step: int = 0
    places: dict[str, Place] = field(default_factory=dict)
    """Of each task, where its next batch is."""
    batches: dict[str, int] = field(default_factory=dict)
    """Of each task, batches of all epochs and processes that are done."""
    sums: dict[str, float] = field(default_factory=dict)
    """Training terms added up since the last row of the curves."""
    summed: int = 0
    dev: dict[str, float] | None = None
    """Latest validation."""
    best: dict[str, Any] | None = None
    """The validation with the smallest error: its step, and what it told."""
    curves_bytes: int = 0


class Step(NamedTuple):
    """The batches of one update."""

    mine: list[tuple[str, Planned]]
    """Of this process, each with its task."""
    examples: dict[str, int]
    """Of each task, in those of all processes."""
    places: dict[str, Place]
    """After it."""


def train(learner: Learner, run: Run) -> Progress:
    """Bring a learner from where its state is to the last step, and to the best weights where those are published.

    Args:
        learner: before the first step.
        run: everything else.

    Raises:
        Interrupted: a signal came; the state is saved.
        DecantError: a loss is not finite.
    """
    progress, best = _resume(learner, run)
    wait_for_all(run.world)  # nobody writes a state before all have read the same
    if progress.step < run.params.train.steps:
        best = _train_on(learner, run, progress, best)
    if run.params.train.publish == "best":
        assert best is not None
        learner.load_state_dict(best)
    return progress


def _train_on(
    learner: Learner, run: Run, progress: Progress, best: dict[str, Tensor] | None
) -> dict[str, Tensor] | None:
    """Make all steps that are left; gives the best weights."""
    train = run.params.train
    tasks = tuple(run.pools)
    more = ("total", *tasks, *learner.loss_weights.columns)
    names = {"kws": ("kws_accuracy",), "sv": ("sv_eer", "sv_min_dcf")}
    dev = ("error", *(name for task in tasks for name in names[task]))
    first = progress.step + 1 if progress.step else 0
    where = (run.directory / "curves.csv", (), more, dev, progress.curves_bytes, first, run.world, run.logs)
    with Curves(*where) as curves:
        if progress.step:
            run.say(f"seed {run.seed}: going on after step {progress.step} of {train.steps}")
        run.tick(progress.step, found=True)
        ahead: deque[Step] = deque()

        def flat() -> Iterator[Planned]:
            for step in islice(_steps(run, progress), train.steps - progress.step):
                ahead.append(step)
                yield from (planned for _, planned in step.mine)

        with _read(run, flat(), learner.device) as batches:
            for _ in range(train.steps - progress.step):
                opening = next(batches)
                step = ahead.popleft()
                update = learner.update(_with_tasks(opening, batches, step), step.examples, progress.step + 1)
                if not update.is_finite:
                    raise _not_finite(step, run, progress.step + 1)
                _advance(progress, step, update, run)
                last = progress.step == train.steps
                validating = last or progress.step % train.validate_every == 0
                if validating:
                    judged = judge(learner, run.reader, run.examples, "dev")
                    progress.dev = {"error": judged.error, **judged.scores}
                    if progress.best is None or judged.error < progress.best["error"]:
                        progress.best = {"step": progress.step, **progress.dev}
                        best = _copied(learner)
                if validating or progress.step % train.log_every == 0:
                    means = {name: value / progress.summed for name, value in progress.sums.items()}
                    told = {f"dev_{k}": v for k, v in (progress.dev or {}).items()} if validating else {}
                    curves.add(step=progress.step, rate=update.rate, **means, **told)
                    progress.sums, progress.summed = {}, 0
                stop = _anybody_stops(run, learner.device) and not last
                if last or stop or progress.step % train.checkpoint_every == 0:
                    progress.curves_bytes = curves.flush()
                    if run.world.leads:
                        _save(run, progress, learner, best)
                run.tick(1, note=" ".join(f"{task} {update.terms[task]:.3f}" for task in tasks))
                if stop:
                    wait_for_all(run.world)
                    raise Interrupted(
                        f"stopped after step {progress.step} of {train.steps} of seed {run.seed} with its state saved; the "
                        "same command goes on"
                    )
    return best


@contextmanager
def _read(run: Run, plan: Iterator[Planned], device: torch.device) -> Iterator[Iterator[Batch]]:
    """The planned batches: read ahead by processes or, where there are to be none, by a thread, which starts at once."""
    if run.readers:
        seconds = max(pool.params.batch_seconds for pool in run.pools.values())
        with run.reader.ahead(plan, seconds, run.readers, device) as batches:
            yield batches
        return
    with ThreadPoolExecutor(1) as executor:
        yield ordered_map(executor, run.reader.read, plan, AHEAD)


def _steps(run: Run, progress: Progress) -> Iterator[Step]:
    """Steps from where the training is on, without end."""
    world, together = run.world, run.world.size * run.params.train.accumulate
    batches = dict(progress.batches)
    streams = {
        task: batches_from(pool, len(TASKS) * run.seed + TASKS.index(task), progress.places[task])
        for task, pool in run.pools.items()
    }
    while True:
        mine, examples, places = [], {}, {}
        for task, stream in streams.items():
            taken = list(islice(stream, together))
            numbers = [len(TASKS) * (batches[task] + at) + TASKS.index(task) for at in range(together)]
            batches[task] += together
            planned = [Planned(number, items) for number, (items, _) in zip(numbers, taken, strict=True)]
            mine += [(task, planned[at]) for at in range(world.rank, together, world.size)]
            examples[task] = sum(len(items) for items, _ in taken)
            places[task] = taken[-1][1]
        yield Step(mine, examples, places)


def _with_tasks(opening: Batch, batches: Iterator[Batch], step: Step) -> Iterator[tuple[str, Batch]]:
    """The batches of a step, each asked for when the one before is done with."""
    for number, (task, _) in enumerate(step.mine):
        yield task, next(batches) if number else opening


def _advance(progress: Progress, step: Step, update: Update, run: Run) -> None:
    progress.step += 1
    progress.places = step.places
    for task in step.places:
        progress.batches[task] += run.world.size * run.params.train.accumulate
    for name, value in {**update.terms, "grad_norm": update.grad_norm}.items():
        progress.sums[name] = progress.sums.get(name, 0.0) + value
    progress.summed += 1


def _copied(learner: Learner) -> dict[str, Tensor] | None:
    """The weights as they are, on the host; None where the last ones are published."""
    if learner.params.train.publish == "last":
        return None
    return {name: tensor.detach().cpu().clone() for name, tensor in learner.state_dict().items()}


def _save(run: Run, progress: Progress, learner: Learner, best: dict[str, Tensor] | None) -> None:
    tensors = {"modules": learner.state_dict(), "optimizer": learner.optimizer.state_dict(), "best": best or {}}
    save_checked(run.directory, progress.step, {"progress": asdict(progress)}, tensors)


def _resume(learner: Learner, run: Run) -> tuple[Progress, dict[str, Tensor] | None]:
    """The newest intact state, or a new beginning."""
    found = load_checked(run.directory, run.say)
    if found is None:
        return Progress(places={task: Place(0, 0) for task in run.pools}, batches=dict.fromkeys(run.pools, 0)), None
    record = found.record["progress"]
    places = {task: Place(**place) for task, place in record["places"].items()}
    learner.load_state_dict(found.tensors["modules"])
    learner.optimizer.load_state_dict(found.tensors["optimizer"])
    return Progress(**{**record, "places": places}), found.tensors["best"] or None


def _not_finite(step: Step, run: Run, number: int) -> DecantError:
    ids = [run.reader.manifest[item.utterance].id for _, planned in step.mine for item in planned.items]
    told = json.dumps(ids[:8])[1:-1] + (" ..." if len(ids) > 8 else "")
    return DecantError(
        f"step {number} of seed {run.seed}: loss or gradient is not finite (batches of {told}); lower "
        "encoder.learning_rate and train.head_learning_rate, set train.clip, or use precision: float32"
    )


def _anybody_stops(run: Run, device: torch.device) -> bool:
    """Whether a signal has come to any process: all stop after the same step."""
    if run.world.size == 1:
        return run.stopping()
    return bool(add_up(torch.tensor([float(run.stopping())], device=device), run.world).item())
