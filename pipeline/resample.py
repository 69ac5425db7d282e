"""A waveform at any rate in, the same sound at another rate out: windowed-sinc interpolation in NumPy.

The rates' ratio in lowest terms is `up` to `down`; every `up`-th output sample shares one filter, so there are `up`
short filters and no zero-stuffed signal. Kernel and defaults are those of `torchaudio.functional.resample` (Hann window,
six zero crossings, roll-off 0.99), in float64; nothing here imports torch, whose start costs more than a small corpus.
"""

from functools import lru_cache
from math import ceil, gcd
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

ZERO_CROSSINGS = 6  # of the sinc on each side, before the window ends it
ROLLOFF = 0.99  # cutoff as a part of the lower Nyquist frequency


class Filters(NamedTuple):
    """The `up` filters of one pair of rates."""

    taps: Float64[np.ndarray, "up taps"]
    start: Int64[np.ndarray, " up"]
    """First input sample of each filter, in a signal padded by `pad` zeros."""
    pad: int
    down: int


@lru_cache(maxsize=16)
def resampling_filters(from_hz: int, to_hz: int) -> Filters:
    """Design the filters that turn `from_hz` into `to_hz`."""
    common = gcd(from_hz, to_hz)
    down, up = from_hz // common, to_hz // common
    cutoff = min(1.0, up / down) * ROLLOFF  # as a part of the input's Nyquist frequency
    reach = ceil(ZERO_CROSSINGS / cutoff)  # input samples on each side
    centre = np.arange(up) * down / up  # where output sample p lies, in input samples
    first = np.floor(centre).astype(np.int64) - reach
    at = first[:, None] + np.arange(2 * reach + 2)  # (up, taps) input samples that filter p sees
    t = np.clip((at - centre[:, None]) * cutoff, -ZERO_CROSSINGS, ZERO_CROSSINGS)
    window = np.cos(t * np.pi / ZERO_CROSSINGS / 2) ** 2
    return Filters(np.sinc(t) * window * cutoff, first + reach, reach, down)


def resample(wave: Float64[np.ndarray, " S"], from_hz: int, to_hz: int) -> Float64[np.ndarray, " R"]:
    """Bring a waveform to another rate; R = ceil(S · to_hz / from_hz)."""
    if from_hz == to_hz:
        return wave
    taps, start, pad, down = resampling_filters(from_hz, to_hz)
    up, width = taps.shape
    num_out = -(-len(wave) * to_hz // from_hz)
    blocks = -(-num_out // up)
    padded = np.zeros(pad + max(len(wave), (blocks - 1) * down + int(start[-1]) + width))
    padded[pad : pad + len(wave)] = wave
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)
    out = np.empty((blocks, up))
    for phase in range(up):
        out[:, phase] = windows[start[phase] :: down][:blocks] @ taps[phase]
    return out.reshape(-1)[:num_out]
