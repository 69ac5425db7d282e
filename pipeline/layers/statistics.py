"""A feature store in, mean and standard deviation of every channel of some of its layers, or of means of them, out.

They are part of what a student reads, so the same store gives the same bits: a drawn sample is read in order, one utterance
at a time, and only sums along time are taken, in float64, which numpy adds frame after frame on every machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float32, Float64, Int64

from cache.codecs import decode
from cache.errors import DataError
from cache.frames import HOP, RATE_HZ
from cache.ragged import Store
from pipeline.layers.ensembles import Channel

STD_FLOOR = 0.01  # of the root mean square over channels, as for the codecs: a silent channel is not blown up to noise


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of N targets of one store."""

    mean: Float32[np.ndarray, "N D"]
    std: Float32[np.ndarray, "N D"]
    """Positive."""

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Statistics)
            and np.array_equal(self.mean, other.mean)
            and np.array_equal(self.std, other.std)
        )


def channel_statistics(store: Store, targets: Sequence[Sequence[str]], sample: Channel) -> Statistics:
    """Statistics of some targets, each the mean of some arrays: those that the codec of a single array was fitted with, or
    else over a sample of the store.

    Raises:
        DataError: a frame of the sample is not finite.
        StoreError: a shard or a table is missing or damaged.
    """
    drawn = draw(store.rows, sample)
    each = [_of_target(store, target, drawn) for target in targets]
    return Statistics(np.stack([mean for mean, _ in each]), np.stack([std for _, std in each]))


def draw(rows: Int64[np.ndarray, " U"], sample: Channel) -> list[int]:
    """Whole utterances in random order until they have `sample.seconds`, then sorted; at least one."""
    order = np.random.default_rng(sample.seed).permutation(len(rows))
    enough = int(np.searchsorted(np.cumsum(rows[order]), sample.seconds * RATE_HZ / HOP)) + 1
    return sorted(order[:enough].tolist())


def _of_target(
    store: Store, arrays: Sequence[str], utterances: Sequence[int]
) -> tuple[Float32[np.ndarray, " D"], Float32[np.ndarray, " D"]]:
    codec = store.spec(arrays[0]).coding
    tables = [store.tables(array) for array in arrays]
    if codec.tables and len(arrays) == 1:
        return tables[0]["mean"], tables[0]["std"]
    count, mean, squares = 0, np.zeros(store.width or 0), np.zeros(store.width or 0)
    for u in utterances:
        first, *others = (decode(store.read(array, u), codec, t) for array, t in zip(arrays, tables, strict=True))
        frames = (sum(others, first) / len(arrays) if others else first).astype(np.float64)
        if not np.isfinite(frames).all():
            raise DataError(f"{store.place}: {', '.join(arrays)} of {store.ids[u]} is not finite; extract it again")
        count, mean, squares = _merge(count, mean, squares, frames)
    std = np.sqrt(squares / count)
    floor = STD_FLOOR * math.sqrt(math.fsum(np.square(std).tolist()) / len(std))
    std = np.where(std > floor, std, floor if floor > 0 else 1.0)
    return mean.astype(np.float32), std.astype(np.float32)


def _merge(
    count: int, mean: Float64[np.ndarray, " D"], squares: Float64[np.ndarray, " D"], frames: Float64[np.ndarray, "T D"]
) -> tuple[int, Float64[np.ndarray, " D"], Float64[np.ndarray, " D"]]:
    """Add frames to a count, a mean and a sum of squared deviations (Chan, Golub and LeVeque 1983): nothing cancels."""
    total = count + len(frames)
    own = frames.sum(0) / len(frames)
    step = own - mean
    squares = squares + np.square(frames - own).sum(0) + np.square(step) * (count * len(frames) / total)
    return total, mean + step * (len(frames) / total), squares
