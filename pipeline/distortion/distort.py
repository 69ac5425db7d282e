"""Distortion: clean waveforms in, the same in noise and rooms out, sample for sample in time (RobustHuBERT).

Huang et al. (2022, arXiv 2203.16104) continue HuBERT on LibriSpeech with MUSAN's noise, Gaussian noise and reverberation;
units come from the clean audio. Ranges and probabilities are settings: the paper's were not at hand.
"""

from typing import Any, Literal

import numpy as np
import torch
import torchaudio
from jaxtyping import Float, Float32
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from pipeline.distortion.noises import AudioFolder, FolderNoise, NoiseSource, Speech, noise_maker
from pipeline.distortion.rooms import FolderRooms, Rooms, reverberate, room_maker


class Reverberation(BaseModel, frozen=True, extra="forbid"):
    """The sound of a room."""

    probability: float = Field(ge=0, le=1)
    rooms: Rooms


class AddedNoise(BaseModel, frozen=True, extra="forbid"):
    """Noise of one of several sources, each as likely as the others."""

    probability: float = Field(ge=0, le=1)
    sources: tuple[NoiseSource, ...] = Field(min_length=1)
    snr_db: tuple[float, float]
    """Range of the signal's energy over the noise's, in the stretch that is trained on."""


class GaussianNoise(BaseModel, frozen=True, extra="forbid"):
    """White Gaussian noise."""

    probability: float = Field(ge=0, le=1)
    snr_db: tuple[float, float]


class Distortion(BaseModel, frozen=True, extra="forbid"):
    """What happens to a recording before the model hears it; a part that is null never does."""

    combine: Literal["each", "one"]
    """each: every part by its own probability, the room first. one: at most one part, and their probabilities are shares."""
    reverberation: Reverberation | None
    noise: AddedNoise | None
    gaussian: GaussianNoise | None

    @model_validator(mode="after")
    def _shares(self) -> "Distortion":
        total = sum(part.probability for part in (self.reverberation, self.noise, self.gaussian) if part is not None)
        if self.combine == "one" and total > 1 + 1e-9:
            raise ValueError(f"with combine: one the probabilities are shares, and they add up to {total:g}")
        return self


class Distorter:
    """Distorts one waveform after another; what happens is a function of the generator it is given."""

    def __init__(self, params: Distortion, speech: Speech) -> None:
        self.params = params
        self.respond = None if params.reverberation is None else room_maker(params.reverberation.rooms)
        self.noises = [] if params.noise is None else [noise_maker(s, speech) for s in params.noise.sources]

    def __call__(self, wave: Float[Tensor, " S"], own: int, rng: np.random.Generator) -> Float[Tensor, " S"]:
        """One recording distorted; `own` is its number, so that it is not its own noise."""
        chosen = choose(self.params, rng)
        if "reverberation" in chosen and self.respond is not None:
            wave = reverberate(wave, self.respond(rng))
        if "noise" in chosen and self.params.noise is not None:
            draw = self.noises[int(rng.integers(len(self.noises)))]
            wave = add_noise(wave, draw(len(wave), rng, own), float(rng.uniform(*self.params.noise.snr_db)))
        if "gaussian" in chosen and self.params.gaussian is not None:
            white = rng.standard_normal(len(wave), dtype=np.float32)
            wave = add_noise(wave, white, float(rng.uniform(*self.params.gaussian.snr_db)))
        return wave


def choose(params: Distortion, rng: np.random.Generator) -> set[str]:
    """The parts that happen to one recording."""
    names = ("reverberation", "noise", "gaussian")
    shares = [0.0 if (part := getattr(params, name)) is None else part.probability for name in names]
    drawn = rng.random(3)  # as many in every case: a probability does not change what else is drawn
    if params.combine == "each":
        return {name for name, share, x in zip(names, shares, drawn, strict=True) if x < share}
    at = int(np.searchsorted(np.cumsum(shares), drawn[0], side="right"))
    return {names[at]} if at < 3 else set()


def add_noise(wave: Float[Tensor, " S"], noise: Float32[np.ndarray, " S"], snr_db: float) -> Float[Tensor, " S"]:
    """The sum, with the noise scaled to `snr_db`; silence has no ratio to anything and stays as it is."""
    added = torch.from_numpy(noise)
    if not wave.any() or not added.any():
        return wave
    return torchaudio.functional.add_noise(wave, added, torch.tensor(snr_db))


def folders_of(params: Any) -> list[list[str]]:
    """Name and digest of each folder that any setting below `params` names.

    Raises:
        DataError: a folder without audio, or with audio at another rate.
    """
    if isinstance(params, FolderNoise | FolderRooms):
        folder = AudioFolder(params.path)
        return [[folder.root.name, folder.digest]]
    if isinstance(params, BaseModel):
        return folders_of([value for _, value in params])
    if isinstance(params, list | tuple):
        return [pair for item in params for pair in folders_of(item)]
    return []
