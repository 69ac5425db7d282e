"""Waveforms of different length in, one padded batch and its masks out, and the norm that does not see the padding.

Base models normalise the first convolution's output over time (GroupNorm with one channel a group), so the zeros of padding
change every frame of an utterance: padding a 3 s utterance to 6 s moved features by 28 % (docs/decisions/0005).
Computing the statistics over the valid positions alone makes any batch equal to the utterance alone.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float, Int16, Int64
from torch import Tensor, nn

from cache.frames import FIELD, HOP
from pipeline.perthread import PerThread

INT16_SCALE = 1 / 32768  # stored int16 samples to float in [-1, 1)


def pad_waves(waves: Sequence[Int16[np.ndarray, " _"]]) -> tuple[Float[Tensor, "B S"], Int64[Tensor, " B"]]:
    """Stack stored waveforms, zero-padded to the longest, as float in [-1, 1); and their sample counts."""
    samples = torch.tensor([len(w) for w in waves])
    out = torch.zeros(len(waves), int(samples.max()))
    for row, wave in zip(out, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(wave).float() * INT16_SCALE
    return out, samples


def bucket_samples(longest: int, bucket: int) -> int:
    """Samples to pad a batch to, at least `longest`: a multiple of `bucket`, so that batches have few lengths.

    A compiled encoder is compiled once per length it has not seen.
    """
    return -(-longest // bucket) * bucket


def frame_mask(counts: Int64[Tensor, " B"], num: int) -> Bool[Tensor, "B T"]:
    """True at the first `counts[b]` of `num` positions."""
    return torch.arange(num, device=counts.device)[None, :] < counts[:, None]


def frames_of_samples(samples: Int64[Tensor, " B"]) -> Int64[Tensor, " B"]:
    """Frames of each waveform (`cache.frames.num_frames`, for a tensor)."""
    return torch.div(samples - FIELD, HOP, rounding_mode="floor") + 1


def normalise_waves(waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> Float[Tensor, "B S"]:
    """Each waveform to zero mean and unit variance over its own samples; padding becomes zero."""
    mask = frame_mask(samples, waves.shape[1])
    count = samples[:, None].to(waves.dtype)
    centred = (waves - (waves * mask).sum(1, keepdim=True) / count) * mask
    variance = centred.square().sum(1, keepdim=True) / count
    return centred * torch.rsqrt(variance + 1e-7)  # the 1e-7 of transformers' Wav2Vec2FeatureExtractor


class LengthMaskedGroupNorm(nn.Module):
    """`nn.GroupNorm(C, C)` over time whose statistics leave out the padding.

    Set `valid` to the number of valid positions of each row before the forward, in the same thread; None means that all
    are valid. The parameters have the names and shapes of `nn.GroupNorm`.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self._valid = PerThread()

    @property
    def valid(self) -> Int64[Tensor, " B"] | None:
        """Valid positions of each row of the batch that this thread runs."""
        valid: Tensor | None = self._valid.value
        return valid

    @valid.setter
    def valid(self, counts: Int64[Tensor, " B"] | None) -> None:
        self._valid.value = counts

    def forward(self, x: Float[Tensor, "B C T"], counts: Int64[Tensor, " B"] | None = None) -> Float[Tensor, "B C T"]:
        """Normalise each channel of each row by its mean and variance over the valid positions.

        `counts` are the valid positions of each row where the caller hands them over instead of setting `valid`.
        """
        valid = self.valid if counts is None else counts
        # a compiled graph has no branch that depends on numbers, and needs none: both give the same up to rounding
        if valid is None or (not torch.compiler.is_compiling() and bool((valid == x.shape[2]).all())):
            return nn.functional.group_norm(x, x.shape[1], self.weight, self.bias, self.eps)
        mask = frame_mask(valid, x.shape[2])[:, None].to(x.dtype)  # (B, 1, T)
        count = valid[:, None, None].to(x.dtype)
        mean = (x * mask).sum(2, keepdim=True) / count
        centred = (x - mean) * mask
        variance = centred.square().sum(2, keepdim=True) / count
        scale = torch.rsqrt(variance + self.eps) * self.weight[:, None]
        return centred * scale + self.bias[:, None]
