"""Everything a training works on in; what its largest batches take, in time and memory, out. Nothing is written.

The batch with the most padded audio fills memory up to the transformer; the one whose attention is largest may be another.
Both are computed, for each phase: an update that compiles and allocates, and one that is timed.
"""

import resource
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from cache.errors import DecantError
from cache.frames import FIELD, HOP, RATE_HZ, frames_of
from pipeline.distill.batches import BatchReader
from pipeline.distill.build import next_learner
from pipeline.distill.inputs import Inputs
from pipeline.distill.learner import Learner
from pipeline.distill.plan import EpochPlan, Planned, WithinShards, plan_epoch
from pipeline.distill.settings import Phase, StudentParams, phases_of
from pipeline.states import Say


class Largest(NamedTuple):
    """The largest batches of a plan."""

    batches: list[Planned]
    """One or two."""
    longest: list[float]
    """Seconds that each is padded to."""
    share: float
    """Mean padded audio of a batch as a share of that of the fullest."""


class Rehearsed(NamedTuple):
    """What a phase takes."""

    phase: Phase
    step_seconds: float
    """One update from the largest batches."""
    read_seconds: float
    """Reading them, by one process."""
    validation_seconds: float
    """A whole validation, were all its batches the largest; 0 without."""
    peak_bytes: int
    """Of the GPU's memory; on a CPU of this process so far, its readers not counted."""
    seconds: float
    """The whole phase, were its batches as full as they are on average."""


def rehearse(params: StudentParams, inputs: Inputs, readers: int, say: Say) -> list[Rehearsed]:
    """Compute the largest batches of the first epoch and of the dev split, phase by phase; gives what each phase takes.

    Args:
        params: the student's settings.
        inputs: opened by `open_inputs`; the learner is of no use afterwards.
        readers: processes that would read ahead.
        say: told what a person should know.

    Raises:
        SettingsError: an utterance does not fit into a batch.
        DecantError: a loss is not finite.
        StoreError: a shard is damaged or missing.
    """
    train, validates = params.train, params.train.validate_every is not None
    largest = {name: _largest(params, name, inputs.readers_of[name]) for name in ("train", "dev")[: 1 + validates]}
    for name, (batches, longest, share) in largest.items():
        told = " and ".join(
            f"{len(planned.items)} utterances padded to {seconds:.2f} s"
            for planned, seconds in zip(batches, longest, strict=True)
        )
        say(f"the largest of {name}: {told}; the mean batch is {share:.0%} as full")
    done, learner, phases = [], inputs.learner, phases_of(params)
    for number, phase in enumerate(phases):
        if number:
            learner = next_learner(learner, phase)
        done.append(_rehearse_phase(phase, learner, inputs, largest, readers))
        _, step, read, validation, peak, _ = done[-1]
        say(
            f"{phase.name}: {step:.3g} s a step of {train.accumulate} of the largest batches (reading them {read:.3g} s), "
            f"{validation:.3g} s a validation, {peak / 2**30:.2f} GiB at most"
        )
    minutes = sum(one.seconds for one in done) / 60
    say(f"about {minutes:.1f} minutes for {sum(p.steps for p in phases)} steps; nothing was written")
    return done


def _rehearse_phase(
    phase: Phase, learner: Learner, inputs: Inputs, largest: dict[str, Largest], readers: int
) -> Rehearsed:
    train, device = learner.params.train, learner.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    step_seconds = read_seconds = validation_seconds = 0.0
    for planned in largest["train"].batches:
        begin = time.perf_counter()
        batch = inputs.readers_of["train"].read(planned)
        read_seconds = max(read_seconds, (time.perf_counter() - begin) * train.accumulate)
        together = [batch] * train.accumulate
        frames = int(batch.frames.sum()) * train.accumulate * learner.world.size
        for _ in range(2):  # the first one compiles, and makes the optimiser's state
            begin = time.perf_counter()
            update = learner.update(together, frames, 1)
            _wait_for(device)
            seconds = time.perf_counter() - begin
            if not update.is_finite:
                raise DecantError(
                    f"dry run, {phase.name}: loss {update.terms['total']:g} or gradient {update.grad_norm:g} is not finite, "
                    f"of {', '.join(batch.ids[:8])}; lower train.learning_rate, or use precision: float32"
                )
        step_seconds = max(step_seconds, seconds)
    validations = 0
    if train.validate_every is not None:
        reader = inputs.readers_of["dev"]
        plan = _plan(learner.params, "dev", reader)
        for planned in largest["dev"].batches:
            begin = time.perf_counter()
            learner.evaluate([reader.read_clean(planned.items)], inputs.target_names)
            seconds = time.perf_counter() - begin
            validation_seconds = max(validation_seconds, seconds * -(-len(plan) // learner.world.size))
        validations = 1 + phase.steps // train.validate_every
    seconds = phase.steps * max(step_seconds, read_seconds / readers) * largest["train"].share
    if validations:
        seconds += validations * validation_seconds * largest["dev"].share
    return Rehearsed(phase, step_seconds, read_seconds, validation_seconds, _peak(device), seconds)


def _plan(params: StudentParams, split: str, reader: BatchReader) -> EpochPlan:
    """Of the first epoch, as it will be made."""
    train = params.train
    local = (reader.shards, train.shuffle.together) if isinstance(train.shuffle, WithinShards) else ()
    return plan_epoch(
        reader.samples, train.crop, train.batch_seconds, params.seed, 0, *(local if split == "train" else ())
    )


def _largest(params: StudentParams, split: str, reader: BatchReader) -> Largest:
    plan = _plan(params, split, reader)
    longest, counts = longest_of(plan), plan.last - plan.first
    padded = longest * counts
    most, widest = int(np.lexsort((longest, padded))[-1]), int((padded * longest).argmax())
    chosen = [Planned(at, plan[at]) for at in dict.fromkeys((most, widest))]
    return Largest(chosen, [longest[p.number] / RATE_HZ for p in chosen], float(padded.mean() / padded.max()))


def longest_of(plan: EpochPlan) -> Int64[np.ndarray, " N"]:
    """Samples of the longest piece of each batch."""
    sizes = plan.samples
    if plan.starts is not None:
        sizes = np.where(frames_of(sizes) > plan.limit, (plan.limit - 1) * HOP + FIELD, sizes)
    at = np.argsort(plan.first)
    longest = np.empty(len(plan), dtype=np.int64)
    longest[at] = np.maximum.reduceat(sizes[plan.order], plan.first[at])
    return longest


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # getrusage(2): kilobytes on Linux
