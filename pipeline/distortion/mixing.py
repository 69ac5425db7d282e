"""Utterance mixing: a batch in, the same with stretches of other recordings in some of its rows out (WavLM).

Chen et al. (2022, arXiv 2110.13900, section III.B, algorithm 1): the units remain those of the first speaker, so the model
learns to follow it through overlap and noise.
"""

import numpy as np
import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, Field
from torch import Tensor

from pipeline.distortion.noises import NoiseSource, Speech, noise_maker


class MixedNoise(BaseModel, frozen=True, extra="forbid"):
    """Noise instead of a second speaker."""

    probability: float = Field(ge=0, le=1)
    """Of noise, where anything is mixed."""
    sources: tuple[NoiseSource, ...] = Field(min_length=1)
    """One of these, each as likely (paper: the noise of the DNS challenge)."""
    ratio_db: tuple[float, float]
    """Range of the energy ratio (paper: -5 to 20)."""


class Mixing(BaseModel, frozen=True, extra="forbid"):
    """Which rows are mixed, and how."""

    probability: float = Field(ge=0, le=1)
    """Part of the rows that something is mixed into."""
    ratio_db: tuple[float, float]
    """Range of the energy of the first speaker over the second's (paper: -5 to 5)."""
    longest: float = Field(gt=0, le=1)
    """Longest mixed stretch, as a part of the row (paper: 0.5, so that the first speaker remains the one who speaks most)."""
    noise: MixedNoise | None


class Mixer:
    """Mixes one batch after another; what happens is a function of the generator it is given."""

    def __init__(self, params: Mixing, speech: Speech) -> None:
        self.params = params
        self.noises = [] if params.noise is None else [noise_maker(source, speech) for source in params.noise.sources]

    def __call__(
        self, waves: Float[Tensor, "B S"], utterances: Int64[np.ndarray, " B"], rng: np.random.Generator
    ) -> Float[Tensor, "B S"]:
        """Mix into some rows; the other speaker is another row as it was before.

        Args:
            waves: the batch.
            utterances: which recordings its rows are.
            rng: draws everything.
        """
        mixed, (rows, samples) = waves.clone(), waves.shape
        for row in range(rows):
            if rng.random() >= self.params.probability:
                continue
            noise = self.params.noise
            if noise is not None and rng.random() < noise.probability:
                draw = self.noises[int(rng.integers(len(self.noises)))]
                second = torch.from_numpy(draw(samples, rng, int(utterances[row])))
                ratio = float(rng.uniform(*noise.ratio_db))
            elif rows > 1:
                other = int(rng.integers(rows - 1))
                second = waves[other + (other >= row)]
                ratio = float(rng.uniform(*self.params.ratio_db))
            else:
                continue  # a batch of one has no other speaker
            count = int(rng.integers(1, max(1, int(samples * self.params.longest)) + 1))
            here, there = (int(rng.integers(samples - count + 1)) for _ in range(2))
            mixed[row, here : here + count] += scale(waves[row], second, ratio) * second[there : there + count]
        return mixed


def scale(first: Float[Tensor, " S"], second: Float[Tensor, " S"], ratio_db: float) -> Float[Tensor, ""]:
    """What the second is multiplied by so that the energies of the two, over all of each, are `ratio_db` apart.

    Silence mixes nothing.
    """
    energy, other = first.double().square().mean(), second.double().square().mean()
    if other == 0:
        return torch.zeros(())
    return (energy / (other * 10 ** (ratio_db / 10))).sqrt().float()
