"""Some spans of utterances in, one padded batch of their waveforms and layers out, in a buffer that was there before.

What fills the slots of a `cache.ring.Ring` for training: it imports neither torch nor anything of the model, so a
reader process starts at once. A batch lies in its buffer as int16 waveforms (B, S), then, for each of K feature stores,
rows as stored (B, N, T, W): number of arrays, type and row width are each store's own, the frames T are the same in all.
What follows each utterance's end is zero.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int16, Int64, Shaped, UInt8

from cache.frames import FrameSpan
from cache.ragged import Store

ALIGNMENT = 64  # bytes: where the rows of a store begin


class Request(NamedTuple):
    """B spans, by number in each store; what is not a span of frames (the samples after the last one) is, in samples."""

    waves: Int64[np.ndarray, "B 3"]
    """Number in the wave store, first sample, samples."""
    numbers: Int64[np.ndarray, "K B"]
    """Number in each feature store."""
    frames: Int64[np.ndarray, "B 2"]
    """First frame, frames."""


class Padded(NamedTuple):
    """Views of a filled buffer."""

    waves: Int16[np.ndarray, "B S"]
    rows: list[Shaped[np.ndarray, "B _ T _"]]
    """Of each feature store."""


class PaddedBatches:
    """Fills buffers from one wave store and some arrays of each of K feature stores; picklable."""

    def __init__(self, waves: Store, features: Sequence[Store], arrays: Sequence[Sequence[str]]) -> None:
        self.waves, self.features, self.arrays = waves, list(features), [list(names) for names in arrays]
        assert len(self.features) == len(self.arrays)

    def __call__(self, request: Request, buffer: UInt8[np.ndarray, " _"]) -> None:
        """Read one batch; the request says what lies where (`views`), so nothing has to be answered.

        Raises:
            StoreError: a shard is damaged or missing.
        """
        waves, rows = self.views(request, buffer)
        spans = [FrameSpan(begin, count) for _, begin, count in request.waves.tolist()]
        self.waves.read_batch(request.waves[:, 0].tolist(), ["wave"], spans, out=waves[:, None, :, None])
        spans = [FrameSpan(begin, count) for begin, count in request.frames.tolist()]
        for store, arrays, numbers, out in zip(self.features, self.arrays, request.numbers.tolist(), rows, strict=True):
            store.read_batch(numbers, arrays, spans, out=out)

    def views(self, request: Request, buffer: UInt8[np.ndarray, " _"]) -> Padded:
        """Where the waveforms and rows of a request lie in its buffer."""
        num, samples, frames = len(request.waves), int(request.waves[:, 2].max()), int(request.frames[:, 1].max())
        end = 2 * num * samples
        waves, rows = buffer[:end].view(np.int16).reshape(num, samples), []
        for store, arrays in zip(self.features, self.arrays, strict=True):
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            shape = (num, len(arrays), frames, store.row_width)
            end = begin + math.prod(shape) * store.dtype.itemsize
            rows.append(buffer[begin:end].view(store.dtype).reshape(shape))
        return Padded(waves, rows)

    def buffer_bytes(self, padded_samples: int, padded_frames: int) -> int:
        """Room for any batch of at most so much padded audio and so many padded frames."""
        per_frame = sum(
            len(arrays) * store.row_width * store.dtype.itemsize
            for store, arrays in zip(self.features, self.arrays, strict=True)
        )
        return 2 * padded_samples + ALIGNMENT * len(self.features) + padded_frames * per_frame
