"""Batches: a manifest's lengths, a seed and an epoch in, a plan out; the plan and two stores in, padded tensors out.

The plan of an epoch is a pure function of (seed, epoch): every utterance exactly once, like lengths together, in
random order. So a training is resumed by two integers, epoch and position, and nothing has to be replayed.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, Field
from torch import Tensor

from cache.errors import DataError, SettingsError
from cache.frames import FIELD, HOP, RATE_HZ, FrameSpan, frames_of, num_frames
from cache.manifest import Manifest
from cache.ragged import Store
from pipeline.padding import pad_waves

JITTER = 0.05  # lengths are sorted up to 5 %, so that an utterance meets other neighbours in other epochs


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


class Item(NamedTuple):
    """A piece of one utterance, by its number in the manifest."""

    utterance: int
    span: FrameSpan | None
    """None: the whole utterance, with the samples after its last frame, which the teacher's norm saw too."""


class Batch(NamedTuple):
    """What one step reads, on the host."""

    ids: list[str]
    waves: Float[Tensor, "B S"]
    samples: Int64[Tensor, " B"]
    targets: Float[Tensor, "B N T E"]
    """As stored; zero after each utterance's end."""
    frames: Int64[Tensor, " B"]


def plan_epoch(
    samples: Int64[np.ndarray, " U"], crop: Full | Aligned, batch_seconds: float, seed: int, epoch: int
) -> list[list[Item]]:
    """Put every utterance into one batch of at most `batch_seconds` of padded audio; a pure function of its arguments.

    Raises:
        SettingsError: one piece alone is longer than a batch.
    """
    generator = np.random.default_rng([seed, epoch])
    frames = frames_of(samples)
    limit = num_frames(int(crop.max_seconds * RATE_HZ)) if isinstance(crop, Aligned) else int(frames.max())
    counts = np.minimum(frames, limit)
    # one draw per utterance, cropped or not: a longer limit does not move the crops of the others
    starts = np.floor(generator.random(len(samples)) * (frames - counts + 1)).astype(np.int64)
    sizes = np.where(frames > limit, (counts - 1) * HOP + FIELD, samples)
    budget = int(batch_seconds * RATE_HZ)
    if int(sizes.max()) > budget:
        raise SettingsError(
            f"batch_seconds is {batch_seconds:g} but an utterance has {sizes.max() / RATE_HZ:.2f} s; "
            "make batches larger, or crop: {kind: aligned, max_seconds: ...}"
        )
    order = np.argsort(sizes * (1.0 + JITTER * generator.random(len(sizes))), kind="stable")
    batches: list[list[Item]] = [[]]
    longest = 0
    for u in order.tolist():
        longest = max(longest, int(sizes[u]))
        if (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
            longest = int(sizes[u])
        span = FrameSpan(int(starts[u]), int(counts[u])) if frames[u] > limit else None
        batches[-1].append(Item(u, span))
    return [batches[i] for i in generator.permutation(len(batches)).tolist()]


class BatchReader:
    """Reads planned batches of one manifest out of its waveforms and its targets."""

    def __init__(self, manifest: Manifest, waves: Store, features: Store, arrays: Sequence[str]) -> None:
        """Find every utterance in both stores.

        Raises:
            DataError: an utterance is absent from a store or has another length there.
        """
        self.manifest, self.waves, self.features, self.arrays = manifest, waves, features, list(arrays)
        for u in manifest:
            for store, want, unit in ((waves, u.samples, "samples"), (features, u.num_frames, "frames")):
                at = store.index.get(u.id)
                if at is None or int(store.rows[at]) != want:
                    got = "nothing" if at is None else f"{int(store.rows[at])} {unit}"
                    raise DataError(
                        f"{u.id}: the manifest says {want} {unit} but {store.directory} has {got}; "
                        "bring them in step with `dvc repro`"
                    )

    def read(self, items: Sequence[Item]) -> Batch:
        """One planned batch as padded tensors."""
        ids = [self.manifest[item.utterance].id for item in items]
        spans = [
            FrameSpan(0, self.manifest[item.utterance].num_frames) if item.span is None else item.span for item in items
        ]
        waves, samples = pad_waves([self.waves.read("wave", i, item.span) for i, item in zip(ids, items, strict=True)])
        targets, counts = self.features.read_batch(ids, self.arrays, spans)
        return Batch(ids, waves, samples, torch.from_numpy(targets), torch.from_numpy(counts))
