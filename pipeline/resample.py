"""A waveform at any usual rate in, the same sound at another rate out, through torchaudio's windowed sinc.

torch is imported when the first waveform needs another rate: a corpus at 16 kHz is prepared without it.
"""

from math import gcd

import numpy as np
from jaxtyping import Float64

MAX_FILTERS = 1_600
"""Filters of one pair of rates: as many as the output's part of their ratio in lowest terms. Every usual rate needs at most
640; 44 099 Hz would need 16 000 of 44 133 taps each, which is 5.6 GB."""


def num_filters(from_hz: int, to_hz: int) -> int:
    """Filters that torchaudio designs for a pair of rates."""
    return to_hz // gcd(from_hz, to_hz)


def resample(wave: Float64[np.ndarray, " S"], from_hz: int, to_hz: int) -> Float64[np.ndarray, " R"]:
    """Bring a waveform to another rate; R = ceil(S · to_hz / from_hz)."""
    if from_hz == to_hz:
        return wave
    import torch
    from torchaudio.functional import resample as windowed_sinc

    return windowed_sinc(torch.from_numpy(wave), from_hz, to_hz).numpy()
