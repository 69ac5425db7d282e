"""Rooms: a setting in, impulse responses out, each from its direct path on; and a waveform as it sounds in one.

Targets are frames of the clean audio, so a room must not shift time: what comes before the direct path is left out of an
impulse response, and the sound stops where the dry one does.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torchaudio
from jaxtyping import Float, Float32
from pydantic import BaseModel, Field
from torch import Tensor

from cache.errors import DataError
from cache.frames import RATE_HZ
from pipeline.distortion.noises import AudioFolder

LONGEST_SEC = 10.0  # of an impulse response; a longer file is a recording of something else


class FolderRooms(BaseModel, frozen=True, extra="forbid"):
    """Recorded or simulated impulse responses below a folder, as OpenSLR 28 has them; of several channels the first."""

    kind: Literal["folder"]
    path: str
    """The folder; `$NAME` in it is a variable of the environment."""


class SyntheticRooms(BaseModel, frozen=True, extra="forbid"):
    """A direct path, then Gaussian noise that decays exponentially (Polack's model of late reverberation)."""

    kind: Literal["synthetic"]
    t60_sec: tuple[Annotated[float, Field(gt=0)], float]
    """Range of the time in which the reverberation falls by 60 dB: 0.2 a living room, 1 a hall."""
    direct_db: tuple[float, float]
    """Range of the energy of the direct path over that of all the rest: 10 close to the mouth, 0 across a room."""


Rooms = Annotated[FolderRooms | SyntheticRooms, Field(discriminator="kind")]
Respond = Callable[[np.random.Generator], Float32[np.ndarray, " N"]]


def room_maker(rooms: Any) -> Respond:
    """A function that draws an impulse response which begins with its direct path."""
    if isinstance(rooms, SyntheticRooms):
        return lambda rng: synthetic(float(rng.uniform(*rooms.t60_sec)), float(rng.uniform(*rooms.direct_db)), rng)
    folder = AudioFolder(rooms.path)

    def from_folder(rng: np.random.Generator) -> Float32[np.ndarray, " N"]:
        file = folder.draw(rng)
        if file.samples > LONGEST_SEC * RATE_HZ:
            raise DataError(
                f"{file.path} has {file.samples / RATE_HZ:.0f} s: that is no impulse response; move it away"
            )
        return from_direct_path(folder.read(file, 0, file.samples))

    return from_folder


def synthetic(t60_sec: float, direct_db: float, rng: np.random.Generator) -> Float32[np.ndarray, " N"]:
    """An impulse response: 1, and noise whose energy is `direct_db` below it and falls by 60 dB in `t60_sec`."""
    time = np.arange(1, max(2, round(t60_sec * RATE_HZ))) / RATE_HZ
    tail = rng.standard_normal(len(time)) * 10 ** (-3 * time / t60_sec)  # an amplitude of 10^-3 is -60 dB
    tail *= np.sqrt(10 ** (-direct_db / 10) / np.square(tail).sum())
    return np.concatenate([[1.0], tail]).astype(np.float32)


def from_direct_path(response: Float32[np.ndarray, " N"]) -> Float32[np.ndarray, " _"]:
    """The response from its largest sample on, which is the direct path."""
    return response[int(np.abs(response).argmax()) :]


def reverberate(wave: Float[Tensor, " S"], response: Float32[np.ndarray, " N"]) -> Float[Tensor, " S"]:
    """The waveform in a room: as long as before and as loud, its direct path where it was."""
    wet = torchaudio.functional.fftconvolve(wave, torch.from_numpy(response))[: len(wave)]
    energy = wet.double().square().sum()
    if energy == 0:  # silence sounds the same anywhere
        return wave
    return wet * (wave.double().square().sum() / energy).sqrt().to(wave.dtype)
