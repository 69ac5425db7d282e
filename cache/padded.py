"""Some spans of utterances in, one padded batch of their waveforms and layers out, in a buffer that was there before.

What fills the slots of a `cache.ring.Ring` for training: it imports neither torch nor anything of the model, so a
reader process starts at once. A batch lies in its buffer as int16 waveforms (B, S), then rows as stored (B, N, T, W);
what follows each utterance's end is zero.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int16, Int64, Shaped, UInt8

from cache.frames import FrameSpan
from cache.ragged import Store

ALIGNMENT = 64  # bytes: where the rows begin


class Request(NamedTuple):
    """B spans, by number in each store; what is not a span of frames (the samples after the last one) is, in samples."""

    waves: Int64[np.ndarray, "B 3"]
    """Number in the wave store, first sample, samples."""
    features: Int64[np.ndarray, "B 3"]
    """Number in the feature store, first frame, frames."""


class Padded(NamedTuple):
    """Views of a filled buffer."""

    waves: Int16[np.ndarray, "B S"]
    rows: Shaped[np.ndarray, "B N T W"]


class PaddedBatches:
    """Fills buffers from one wave store and some arrays of one feature store; picklable."""

    def __init__(self, waves: Store, features: Store, arrays: Sequence[str]) -> None:
        self.waves, self.features, self.arrays = waves, features, list(arrays)

    def __call__(self, request: Request, buffer: UInt8[np.ndarray, " _"]) -> Request:
        """Read one batch; gives the request back, which says what lies where.

        Raises:
            StoreError: a shard is damaged or missing.
        """
        waves, rows = self.views(request, buffer)
        self.waves.read_batch(*_numbers_and_spans(request.waves, ["wave"]), out=waves[:, None, :, None])
        self.features.read_batch(*_numbers_and_spans(request.features, self.arrays), out=rows)
        return request

    def views(self, request: Request, buffer: UInt8[np.ndarray, " _"]) -> Padded:
        """Where the waveforms and rows of a request lie in its buffer."""
        num, samples, frames = len(request.waves), int(request.waves[:, 2].max()), int(request.features[:, 2].max())
        ahead = 2 * num * samples
        begin = -(-ahead // ALIGNMENT) * ALIGNMENT
        row_bytes = self.features.row_width * self.features.dtype.itemsize
        end = begin + num * len(self.arrays) * frames * row_bytes
        shape = (num, len(self.arrays), frames, self.features.row_width)
        return Padded(
            buffer[:ahead].view(np.int16).reshape(num, samples),
            buffer[begin:end].view(self.features.dtype).reshape(shape),
        )

    def buffer_bytes(self, padded_samples: int, padded_frames: int) -> int:
        """Room for any batch of at most so much padded audio and so many padded frames."""
        row_bytes = self.features.row_width * self.features.dtype.itemsize
        return 2 * padded_samples + ALIGNMENT + padded_frames * len(self.arrays) * row_bytes


def _numbers_and_spans(
    spans: Int64[np.ndarray, "B 3"], arrays: Sequence[str]
) -> tuple[list[int], Sequence[str], list[FrameSpan]]:
    numbers, begins, counts = spans.T.tolist()
    return numbers, arrays, [FrameSpan(b, c) for b, c in zip(begins, counts, strict=True)]
