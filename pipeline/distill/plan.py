"""The lengths of utterances, a seed and an epoch in; the batches of that epoch out, as a plan.

It is a pure function of its arguments: every utterance exactly once, like lengths together, in random order. So a training
is resumed by two integers, epoch and position, and nothing has to be replayed.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from operator import eq
from typing import Annotated, Literal, NamedTuple, overload

import numpy as np
from jaxtyping import Int32, Int64
from pydantic import BaseModel, Field

from cache.errors import SettingsError
from cache.frames import FIELD, HOP, RATE_HZ, FrameSpan, frames_of, num_frames

JITTER = 0.05  # lengths are sorted up to 5 %, so that an utterance meets other neighbours in other epochs
BLOCK = 65_536  # utterances that are Python numbers at one time while batches are cut


class Full(BaseModel, frozen=True, extra="forbid"):
    """Whole utterances: the targets are exactly what the teacher gives for what the student hears."""

    kind: Literal["full"]
    """full: no cropping."""


class Aligned(BaseModel, frozen=True, extra="forbid"):
    """A random stretch of every longer utterance, cut on the frame grid; the teacher heard the whole."""

    kind: Literal["aligned"]
    """aligned: crop audio and targets at the same frames."""
    max_seconds: float = Field(ge=FIELD / RATE_HZ)
    """Longest stretch; DistilHuBERT crops to 15.6 s."""


Crop = Annotated[Full | Aligned, Field(discriminator="kind")]


class Everywhere(BaseModel, frozen=True, extra="forbid"):
    """Any utterance may follow any other: for disks that seek for free."""

    kind: Literal["everywhere"]
    """everywhere: one shuffle of the whole corpus."""


class WithinShards(BaseModel, frozen=True, extra="forbid"):
    """Shards in random order, a few at a time, and shuffling within those: for spinning disks and object stores."""

    kind: Literal["shards"]
    """shards: read all of a few shards before the next ones."""
    together: int = Field(ge=1)
    """Shards of the feature store that are mixed: more mix better, and need as much page cache (100 MB a layer each)."""


Shuffle = Annotated[Everywhere | WithinShards, Field(discriminator="kind")]


class Item(NamedTuple):
    """A piece of one utterance, by its number in the manifest."""

    utterance: int
    span: FrameSpan | None
    """None: the whole utterance, with the samples after its last frame, which the teacher's norm saw too."""


class Planned(NamedTuple):
    """A batch and its place in the training, which says what is drawn for it: noise, masks, dropout."""

    number: int
    """Of all batches of all epochs and processes."""
    items: list[Item]


@dataclass(frozen=True, eq=False)
class EpochPlan(Sequence[list[Item]]):
    """The batches of one epoch, each made when it is asked for: 17 million utterances as objects would take 4 GB."""

    samples: Int64[np.ndarray, " U"]
    order: Int32[np.ndarray, " U"]
    """The utterances, like lengths together; a batch is a stretch of it."""
    starts: Int32[np.ndarray, " U"] | None
    """First frame of each utterance's piece; None where nothing is cropped."""
    limit: int
    """Frames of the longest piece."""
    first: Int64[np.ndarray, " N"]
    """Where each batch begins in `order`."""
    last: Int64[np.ndarray, " N"]
    """Where each ends."""

    def __len__(self) -> int:
        return len(self.first)

    @overload
    def __getitem__(self, at: int) -> list[Item]: ...
    @overload
    def __getitem__(self, at: slice) -> "EpochPlan": ...

    def __getitem__(self, at: int | slice) -> "list[Item] | EpochPlan":
        """One batch, or the plan of some of them."""
        if isinstance(at, slice):
            return replace(self, first=self.first[at], last=self.last[at])
        utterances = self.order[int(self.first[at]) : int(self.last[at])]
        if self.starts is None:
            return [Item(u, None) for u in utterances.tolist()]
        cut = frames_of(self.samples[utterances]) > self.limit
        triples = zip(utterances.tolist(), cut.tolist(), self.starts[utterances].tolist(), strict=True)
        return [Item(u, FrameSpan(start, self.limit) if longer else None) for u, longer, start in triples]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(eq, self, other))


def plan_epoch(
    samples: Int64[np.ndarray, " U"],
    crop: Full | Aligned,
    batch_seconds: float,
    seed: int,
    epoch: int,
    shards: Int64[np.ndarray, " U"] | None = None,
    together: int = 1,
) -> EpochPlan:
    """Put every utterance into one batch of at most `batch_seconds` of padded audio; a pure function of its arguments.

    Args:
        samples: of each utterance.
        crop: whether longer ones are cut.
        batch_seconds: padded audio in one batch.
        seed: of the training.
        epoch: the draws of each differ.
        shards: the shard of each utterance, to shuffle within shards; None shuffles everywhere.
        together: shards that are mixed.

    Raises:
        SettingsError: one piece alone is longer than a batch.
    """
    generator = np.random.default_rng([seed, epoch])
    frames = frames_of(samples)
    limit = num_frames(int(crop.max_seconds * RATE_HZ)) if isinstance(crop, Aligned) else int(frames.max())
    # one draw per utterance, cropped or not: a longer limit does not move the crops of the others
    draws = generator.random(len(samples))
    sizes, starts = samples, None
    if isinstance(crop, Aligned):
        draws *= np.maximum(frames - limit, 0) + 1
        starts = draws.astype(np.int32)  # rounds down
        sizes = np.where(frames > limit, (limit - 1) * HOP + FIELD, samples)
    del frames
    budget = int(batch_seconds * RATE_HZ)
    if int(sizes.max()) > budget:
        raise SettingsError(
            f"batch_seconds is {batch_seconds:g} but an utterance has {sizes.max() / RATE_HZ:.2f} s; "
            "make batches larger, or crop: {kind: aligned, max_seconds: ...}"
        )
    generator.random(out=draws)
    draws *= JITTER
    draws += 1.0
    draws *= sizes
    if shards is None:
        order = np.argsort(draws, kind="stable").astype(np.int32)
        groups = [order]
    else:
        turn = generator.permutation(int(shards.max()) + 1)[shards] // together  # when each utterance's shards come
        order = np.lexsort((draws, turn)).astype(np.int32)
        groups = np.split(order, np.flatnonzero(np.diff(turn[order])) + 1)
    del draws
    first, last, begin = [], [], 0
    for group in groups:
        ends = np.append(cut(sizes, group, budget), len(group)) + begin
        batches = generator.permutation(len(ends))
        first.append(np.append(begin, ends[:-1])[batches])
        last.append(ends[batches])
        begin += len(group)
    return EpochPlan(samples, order, starts, limit, np.concatenate(first), np.concatenate(last))


def cut(sizes: Int64[np.ndarray, " U"], order: Int32[np.ndarray, " G"], budget: int) -> Int64[np.ndarray, " N"]:
    """Where batches begin, the first left out: each takes utterances until its padding would exceed the budget."""
    cuts = array("q")
    count = longest = 0
    for block in range(0, len(order), BLOCK):
        for number, size in enumerate(sizes[order[block : block + BLOCK]].tolist(), block):
            count += 1
            if size > longest:
                longest = size
            if count * longest > budget:
                cuts.append(number)
                count, longest = 1, size
    return np.array(cuts, dtype=np.int64)
