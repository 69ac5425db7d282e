"""Frames in, the same frames with stretches of time and of channels set to zero out: SpecAugment on representations.

As SUPERB has it in its ASR: each utterance draws its own stretches, after the weighted sum of layers, while the head
trains. SUPERB also warps the time axis (a window of 5 frames); that is left out here.
"""

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, Field
from torch import Tensor


class MaskParams(BaseModel, frozen=True, extra="forbid"):
    """What is hidden of an utterance while the head trains."""

    time_masks: int = Field(ge=0)
    """Stretches of frames; SUPERB: 2."""
    time_width: int = Field(ge=1)
    """Longest such stretch, in frames; SUPERB: 40. At most half of an utterance."""
    channel_masks: int = Field(ge=0)
    """Stretches of channels; SUPERB: 4."""
    channel_width: int = Field(ge=1)
    """Widest such stretch; SUPERB: 50 of 768. At most half of the channels."""


def masked(
    utterances: list[Float[Tensor, "_ D"]], params: MaskParams, generator: torch.Generator
) -> list[Float[Tensor, "_ D"]]:
    """Hide stretches of every utterance; the generator is on the CPU, so that every device hides the same."""
    return [
        frames
        * stretches(len(frames), params.time_masks, params.time_width, generator).to(frames.device)[:, None]
        * stretches(frames.shape[1], params.channel_masks, params.channel_width, generator).to(frames.device)
        for frames in utterances
    ]


def stretches(size: int, count: int, longest: int, generator: torch.Generator) -> Bool[Tensor, " size"]:
    """False in `count` stretches, each of 0 to `longest` places drawn alike, anywhere they fit."""
    seen = torch.ones(size, dtype=torch.bool)
    for _ in range(count):
        width = int(torch.randint(min(longest, size // 2) + 1, (), generator=generator))
        start = int(torch.randint(size - width + 1, (), generator=generator))
        seen[start : start + width] = False
    return seen
