"""What a student hears and sees worse than its teacher did: settings and a batch's number in, masks of its features out.

The targets stay those of the clean audio, which is what makes this free where they are stored: noise and rooms
(`pipeline.distill.noisy`, in the processes that read) leave every frame where it was, and so do masks. Nothing here may
change speed or length: the stored frames would no longer be those of the waveform.
"""

import numpy as np
import torch
from jaxtyping import Bool, Int64
from pydantic import BaseModel, Field
from torch import Tensor

from pipeline.distortion.distort import Distortion
from pipeline.student.encoder import Hidden

OF_MASKS = 2  # the last word of the generator's seed: noise has another


class TimeMasks(BaseModel, frozen=True, extra="forbid"):
    """Spans of frames whose projected features become zero."""

    probability: float = Field(ge=0, le=1)
    """Part of the frames that would be hidden if spans did not overlap (SPEAR, wav2vec 2.0: 0.65)."""
    frames: int = Field(ge=1)
    """Length of a span; 10 frames are 0.2 s."""


class ChannelMasks(BaseModel, frozen=True, extra="forbid"):
    """Spans of channels of the projected features that become zero in all frames of an utterance."""

    probability: float = Field(ge=0, le=1)
    """Part of the channels that would be hidden if spans did not overlap (SPEAR: 0.25)."""
    width: int = Field(ge=1)
    """Channels of a span (SPEAR: 20)."""


class HideParams(BaseModel, frozen=True, extra="forbid"):
    """What of the projected features is hidden from the transformer. The loss is over all frames, hidden ones too."""

    time: TimeMasks | None
    channels: ChannelMasks | None


class AugmentParams(BaseModel, frozen=True, extra="forbid"):
    """How training batches are made harder; validation never is."""

    distort: Distortion | None
    """Noise and rooms, as in pretraining."""
    hide: HideParams | None
    """Masks, as in SpecAugment."""


def draw_hidden(
    params: HideParams, seed: int, number: int, frames: Int64[Tensor, " B"], padded: int, width: int
) -> Hidden:
    """What is hidden in one batch: a function of the settings, the seed and the batch's number in the training.

    Args:
        params: the settings.
        seed: of the training.
        number: of the batch, from 0.
        frames: of each utterance; padding is never hidden, and does not count.
        padded: frames of the batch, as the encoder has them.
        width: channels of the projected features.
    """
    rng = np.random.default_rng([seed, number, 0, OF_MASKS])
    hidden_frames = hidden_channels = None
    if params.time is not None:
        rows = np.zeros((len(frames), padded), dtype=bool)
        for row, count in zip(rows, frames.tolist(), strict=True):
            row[:count] = spans(count, params.time.probability, params.time.frames, rng)
        hidden_frames = torch.from_numpy(rows)
    if params.channels is not None:
        share, length = params.channels.probability, params.channels.width
        hidden_channels = torch.from_numpy(np.stack([spans(width, share, length, rng) for _ in range(len(frames))]))
    return Hidden(hidden_frames, hidden_channels)


def spans(size: int, probability: float, length: int, rng: np.random.Generator) -> Bool[np.ndarray, " S"]:
    """Where spans lie: probability x size / length of them, rounded up or down at random, which may overlap.

    Their number is wav2vec 2.0's, without its minimum of one. Far from the ends a place is hidden with
    1 - exp(-probability), nearly: 48 % at 0.65.
    """
    length = min(length, size)
    number = min(int(probability * size / length + rng.random()), size - length + 1)
    hidden = np.zeros(size, dtype=bool)
    for start in rng.choice(size - length + 1, number, replace=False).tolist():
        hidden[start : start + length] = True
    return hidden
