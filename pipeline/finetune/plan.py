"""The examples of a task, a seed and an epoch in; the batches of that epoch out: a pure function of them.

Every update hears a batch of each task, and each task has epochs of its own, so the place in a training is two integers for
each. Batches are cut from a shuffle, not sorted by length as those of distillation: a keyword has its length, and a batch
should have all of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from cache.errors import SettingsError
from cache.frames import FIELD, HOP, RATE_HZ, FrameSpan, frames_of, num_frames
from pipeline.distill.plan import Item, cut
from pipeline.finetune.settings import TaskParams


@dataclass(frozen=True, slots=True)
class Pool:
    """What a task trains on: numbers of utterances in the manifest that is read, their samples and their classes."""

    name: str
    """Of the task."""
    params: TaskParams
    utterances: Int64[np.ndarray, " U"]
    samples: Int64[np.ndarray, " U"]
    classes: Int64[np.ndarray, " U"]


@dataclass(frozen=True, slots=True)
class Place:
    """How far a task is: its next batch is batch `position` of `epoch`."""

    epoch: int
    position: int


@dataclass(frozen=True, slots=True)
class Epoch:
    """The batches of one epoch, each made when it is asked for."""

    utterances: Int64[np.ndarray, " U"]
    """In the order in which they are heard; one may be there twice where classes are balanced."""
    is_cropped: Bool[np.ndarray, " U"]
    starts: Int64[np.ndarray, " U"]
    """First frame of those that are."""
    limit: int
    """Frames that are left of them."""
    ends: Int64[np.ndarray, " N"]
    """Where batches end."""

    def __len__(self) -> int:
        return len(self.ends)

    def batch(self, number: int) -> list[Item]:
        """The pieces of one batch."""
        first = int(self.ends[number - 1]) if number else 0
        return [
            Item(int(self.utterances[i]), FrameSpan(int(self.starts[i]), self.limit) if self.is_cropped[i] else None)
            for i in range(first, int(self.ends[number]))
        ]


def check_sizes(pool: Pool) -> None:
    """Look whether every utterance fits into a batch, drawn or not.

    Raises:
        SettingsError: one alone is longer than a batch.
    """
    cropped = frames_of(pool.samples) > _limit(pool)
    sizes = np.where(cropped, (_limit(pool) - 1) * HOP + FIELD, pool.samples)
    if int(sizes.max()) > int(pool.params.batch_seconds * RATE_HZ):
        crop = pool.params.crop_seconds
        raise SettingsError(
            f"tasks.{pool.name}.batch_seconds is {pool.params.batch_seconds:g} but an utterance has "
            f"{sizes.max() / RATE_HZ:.3f} s; make batches larger, or "
            f"{'set crop_seconds' if crop is None else f'crop_seconds ({crop:g}) smaller'}"
        )


def _limit(pool: Pool) -> int:
    """Frames that are left of a longer utterance."""
    crop = pool.params.crop_seconds
    return int(frames_of(pool.samples).max()) if crop is None else num_frames(int(crop * RATE_HZ))


def plan_epoch(pool: Pool, seed: int, epoch: int) -> Epoch:
    """Batches of at most `batch_seconds` of padded audio, each as full as it can be, of a pool that was `check_sizes`-ed."""
    generator = np.random.default_rng([seed, epoch])
    params, count = pool.params, len(pool.utterances)
    if params.class_balanced:
        weights = 1 / np.bincount(pool.classes)[pool.classes]
        drawn = generator.choice(count, count, p=weights / weights.sum())
    else:
        drawn = generator.permutation(count)
    samples = pool.samples[drawn]
    frames, limit = frames_of(samples), _limit(pool)
    is_cropped = frames > limit
    starts = (generator.random(count) * (np.maximum(frames - limit, 0) + 1)).astype(np.int64)
    sizes = np.where(is_cropped, (limit - 1) * HOP + FIELD, samples)
    budget = int(params.batch_seconds * RATE_HZ)
    ends = np.append(cut(sizes, np.arange(count, dtype=np.int32), budget), count).astype(np.int64)
    return Epoch(pool.utterances[drawn], is_cropped, starts, limit, ends)


def batches_from(pool: Pool, seed: int, place: Place) -> Iterator[tuple[list[Item], Place]]:
    """Batches from a place on, epoch after epoch without end, and the place after each."""
    epoch, position = place.epoch, place.position
    while True:
        plan = plan_epoch(pool, seed, epoch)
        for number in range(position, len(plan)):
            yield plan.batch(number), Place(epoch, number + 1) if number + 1 < len(plan) else Place(epoch + 1, 0)
        epoch, position = epoch + 1, 0
