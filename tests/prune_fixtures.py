"""Shapes of different sizes in every layer, so that a wrong index shows, and a batch of noise."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.student.shape import PositionBias
from tests.student_fixtures import TINY, changed

HUBERT_LIKE = changed(
    TINY,
    conv_channels=(6, 7, 5, 6, 7, 6, 9),
    width=16,
    heads=(4, 3, 2),
    head_width=4,
    ffn=(30, 24, 36),
    position_kernel=8,
)
WAVLM_LIKE = changed(HUBERT_LIKE, heads=(4, 4, 4), position_bias=PositionBias(buckets=12, max_distance=20, heads=4))
SHAPES = {
    "HuBERT": HUBERT_LIKE,
    "WavLM": WAVLM_LIKE,
    "HuBERT, norms first": changed(HUBERT_LIKE, pre_norm=True),
    "WavLM, norms first": changed(WAVLM_LIKE, pre_norm=True),
}
THIN = changed(
    HUBERT_LIKE,
    conv_spans=((10, 5), (1, 1), (3, 2), (3, 2), (3, 2), (3, 2), (1, 1), (2, 2), (2, 2)),
    conv_channels=(4, 7, 5, 5, 6, 5, 7, 6, 9),
)
BASE = changed(
    HUBERT_LIKE,
    conv_channels=(512,) * 7,
    width=768,
    heads=(12,) * 12,
    head_width=64,
    ffn=(3072,) * 12,
    position_kernel=128,
    position_groups=16,
)


def speech(samples: list[int]) -> tuple[Float[Tensor, "B S"], Int64[Tensor, " B"]]:
    """A padded batch of noise; the same for the same lengths."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.zeros(len(samples), max(samples))
    for row, count in zip(waves, samples, strict=True):
        row[:count] = torch.randn(count, generator=generator)
    return waves, torch.tensor(samples)
