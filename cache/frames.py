"""Samples in, frames out, and back: the only file that knows 320 and 400.

The seven convolutions of HuBERT, WavLM and wav2vec 2.0 (kernels 10,3,3,3,3,2,2; strides 5,2,2,2,2,2,2) see 400 samples
and move by 320, and their frame count has the closed form below for every length of at least 400 samples.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from cache.errors import DataError

RATE_HZ = 16_000  # samples per second of every waveform in a store
HOP = 320  # samples from one frame to the next (20 ms): the product of the seven strides
FIELD = 400  # samples that one frame sees (25 ms): the receptive field of the seven kernels


def num_frames(samples: int) -> int:
    """Frames of a waveform of `samples` samples at 16 kHz: (S - 400) // 320 + 1.

    Raises:
        DataError: fewer than 400 samples, which no frame fits into.
    """
    if samples < FIELD:
        raise DataError(f"{samples} samples are too short: one frame needs {FIELD} (25 ms at 16 kHz)")
    return (samples - FIELD) // HOP + 1


def frames_of(samples: Int64[np.ndarray, " U"]) -> Int64[np.ndarray, " U"]:
    """`num_frames` of many utterances at once."""
    if len(samples) and int(samples.min()) < FIELD:
        num_frames(int(samples.min()))  # raises, with the number
    return (samples - FIELD) // HOP + 1


@dataclass(frozen=True, slots=True)
class FrameSpan:
    """`count` frames from frame `start` on, and the samples that yield exactly them."""

    start: int
    count: int

    @property
    def samples(self) -> slice:
        """The samples of frames [start, start + count): a crop of these gives exactly `count` frames."""
        return slice(self.start * HOP, (self.start + self.count - 1) * HOP + FIELD)

    @property
    def rows(self) -> slice:
        """The same span as rows of a feature array."""
        return slice(self.start, self.start + self.count)
