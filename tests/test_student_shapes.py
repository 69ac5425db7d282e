"""The shapes of published students have the published numbers of parameters, and impossible ones are refused."""

import pytest
import torch
from pydantic import ValidationError

from pipeline.student.encoder import Encoder, count_parameters
from pipeline.student.shape import PositionBias
from tests.student_fixtures import BASE, THIN, TINY, WAVLM, changed

THIN_SPANS = THIN.conv_spans


def thin(width, ffn, shares=None):
    """Twelve narrow blocks behind FitHuBERT's convolutions, of which the last three are as wide as the blocks.

    So there is no linear layer between them: wav2vec 2.0's code makes one only where the widths differ, and only without
    it are the sizes the published ones.
    """
    return changed(
        BASE,
        conv_spans=THIN_SPANS,
        conv_channels=(128, 256, 256, 256, 256, 256, width, width, width),
        projection=False,
        width=width,
        head_width=width // 12,
        ffn=(ffn,) * 12,
        shares_attention=shares,
    )


def few(blocks):
    """DistilHuBERT's student: no norm between convolutions and projection."""
    return changed(BASE, heads=(12,) * blocks, ffn=(3072,) * blocks, feature_norm=False)


# ARMHuBERT's pattern; six of twelve blocks without queries and keys give the published size
EVERY_OTHER = (False, True) * 6
PUBLISHED = {
    "HuBERT Base": (BASE, 94_370_944),
    "DistilHuBERT": (few(2), 23_491_200),
    "3-Layer One": (few(3), 30_579_072),
    "12-Layer Half": (
        changed(BASE, width=384, head_width=32, ffn=(1536,) * 12, feature_norm=False),
        26_871_936,
    ),
    "STaRHuBERT": (thin(432, 976), 22_308_592),
    # these three without the twelve linear heads that their published sizes count, and without the vector that stands
    # in for masked frames in training
    "MaskHuBERT": (thin(480, 640), 22_202_464),
    "ARMHuBERT": (thin(480, 864, EVERY_OTHER), 22_015_072),
    "ARMHuBERT-S": (thin(432, 816, EVERY_OTHER), 18_403_120),
    # HuBERT Base and in each block a gate of 8 * 64 + 8 and 12 scales, and a table of 320 * 12
    "WavLM Base": (changed(BASE, position_bias=PositionBias(buckets=320, max_distance=800, heads=12)), 94_381_168),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameter_counts_are_the_published_ones(name):
    shape, published = PUBLISHED[name]
    with torch.device("meta"):
        assert count_parameters(Encoder(shape)) == published


IMPOSSIBLE = {
    "conv_channels has 6 entries for 7 convolutions": (TINY, {"conv_channels": (8,) * 6}),
    "sees 240 samples every 160": (THIN, {"conv_spans": (*THIN_SPANS[:-1], (1, 1))}),
    "sees 480 samples every 320": (THIN, {"conv_spans": (*THIN_SPANS[:-2], (3, 2), (2, 2))}),
    "projection: false, but the last convolution has 12 channels": (TINY, {"projection": False}),
    "feature_norm_width without feature_norm": (TINY, {"feature_norm": False, "feature_norm_width": 12}),
    "feature_norm_width 11 is less than the 12 channels": (TINY, {"feature_norm_width": 11}),
    "kept_heads without position_bias": (TINY, {"kept_heads": ((0, 1, 2),) * 3}),
    "kept_heads has 2 entries but there are 3 blocks": (WAVLM, {"kept_heads": ((0, 1, 2),) * 2}),
    "block 1 has 2 heads but kept_heads gives .0, 1, 2.": (WAVLM, {"heads": (3, 2, 3)}),
    "different columns, each below 3": (WAVLM, {"kept_heads": ((0, 1, 3),) * 3}),
    "block 2 has 3 heads but": (WAVLM, {"kept_heads": ((0, 1, 2), (2, 1, 0), (0, 0, 1))}),
    "position_bias.heads 5 does not divide the width 24": (
        TINY,
        {"position_bias": {"buckets": 12, "max_distance": 20, "heads": 5}},
    ),
    "must be more than a quarter of the 12 buckets": (
        TINY,
        {"position_bias": {"buckets": 12, "max_distance": 3, "heads": 3}},
    ),
    "shares_attention has 1 entries": (TINY, {"shares_attention": (False,)}),
    "no block before block 0 has its 3 heads": (TINY, {"shares_attention": (True, False, False)}),
    "no block before block 1 has its 2 heads": (TINY, {"heads": (3, 2, 2), "shares_attention": (False, True, True)}),
    "ffn has 2 entries but heads has 3": (TINY, {"ffn": (40, 40)}),
    "position_groups 5 does not divide the width 24": (TINY, {"position_groups": 5}),
}


@pytest.mark.parametrize("message", IMPOSSIBLE)
def test_impossible_shapes_are_refused_with_what_is_wrong(message):
    shape, changes = IMPOSSIBLE[message]
    with pytest.raises(ValidationError, match=message):
        changed(shape, **changes)
