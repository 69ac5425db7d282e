"""Frames and samples, against a real convolution stack."""

import numpy as np
import pytest
import torch

from cache.errors import DataError
from cache.frames import FIELD, HOP, FrameSpan, frames_of, num_frames

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


@pytest.fixture(scope="module")
def conv_stack():
    """The seven convolutions with one channel and weights of one: output is positive where input is."""
    stack = torch.nn.Sequential(
        *(torch.nn.Conv1d(1, 1, k, s, bias=False) for k, s in zip(KERNELS, STRIDES, strict=True))
    )
    for layer in stack:
        torch.nn.init.ones_(layer.weight)
    return stack


def test_the_formula_is_the_convolution_stack_for_every_remainder(conv_stack):
    for samples in [*range(FIELD, FIELD + 2 * HOP + 1), 16_000, 75_108, 60_087, 250_000]:
        with torch.no_grad():
            assert conv_stack(torch.zeros(1, 1, samples)).shape[2] == num_frames(samples), samples


def test_hop_and_field_follow_from_kernels_and_strides():
    hop, field = 1, 1
    for k, s in zip(KERNELS, STRIDES, strict=True):
        field += (k - 1) * hop
        hop *= s
    assert (hop, field) == (HOP, FIELD)


def test_a_frame_sees_its_own_samples_and_no_others(conv_stack):
    span = FrameSpan(7, 1).samples
    wave = torch.zeros(1, 1, 8000)
    for at, seen in [(span.start, True), (span.stop - 1, True), (span.start - 1, False), (span.stop, False)]:
        wave.zero_()
        wave[0, 0, at] = 1.0
        assert bool(conv_stack(wave)[0, 0, 7] != conv_stack(torch.zeros(1, 1, 8000))[0, 0, 7]) is seen, at


@pytest.mark.parametrize(("start", "count"), [(0, 1), (3, 5), (10, 49)])
def test_a_crop_on_the_frame_grid_gives_exactly_its_frames(start, count):
    span = FrameSpan(start, count)
    assert num_frames(span.samples.stop - span.samples.start) == count


def test_too_few_samples_are_refused_with_the_number():
    with pytest.raises(DataError, match=r"399 samples are too short: one frame needs 400"):
        num_frames(399)
    with pytest.raises(DataError, match="399"):
        frames_of(np.array([16_000, 399]))
    assert frames_of(np.array([400, 16_000])).tolist() == [1, 49]
