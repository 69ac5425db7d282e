"""Noise: a setting and a number of samples in, a waveform out; from folders, from other recordings, or made here."""

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import soundfile
from jaxtyping import Float32
from pydantic import BaseModel, Field

from cache.errors import DataError
from cache.frames import RATE_HZ
from cache.publish import digest_json
from pipeline.corpora.folder import SUFFIXES, VARIABLE

Wave = Float32[np.ndarray, " S"]


class FolderNoise(BaseModel, frozen=True, extra="forbid"):
    """Recordings below a folder, as MUSAN's noise, music and speech lie; 16 kHz, of several channels the first."""

    kind: Literal["folder"]
    path: str
    """The folder; `$NAME` in it is a variable of the environment."""


class BabbleNoise(BaseModel, frozen=True, extra="forbid"):
    """Other training recordings, one over the other."""

    kind: Literal["babble"]
    voices: tuple[Annotated[int, Field(ge=1)], int]
    """Fewest and most recordings (MUSAN's babble in Kaldi's recipes: 3 to 7; 1 is a competing speaker)."""


class ColouredNoise(BaseModel, frozen=True, extra="forbid"):
    """Gaussian noise whose power falls with frequency as f to the power of minus something."""

    kind: Literal["coloured"]
    exponents: tuple[float, float]
    """Range it is drawn from: 0 is white, 1 pink, 2 brown."""


NoiseSource = Annotated[FolderNoise | BabbleNoise | ColouredNoise, Field(discriminator="kind")]


@runtime_checkable
class Speech(Protocol):
    """Training recordings, to make babble of."""

    def __len__(self) -> int: ...

    def samples_of(self, u: int) -> int:
        """Samples of one of them."""
        ...

    def read(self, u: int, start: int, count: int) -> Wave:
        """Some of its samples, in [-1, 1)."""
        ...


class File(NamedTuple):
    """A recording of a folder."""

    path: Path
    samples: int


class AudioFolder:
    """The 16 kHz recordings below a folder, by name."""

    def __init__(self, path: str) -> None:
        missing = [name for name in VARIABLE.findall(path) if name not in os.environ]
        if missing:
            raise DataError(
                f"{path}: the variable {missing[0]} is not set; export {missing[0]}=... or write the folder"
            )
        self.root = Path(VARIABLE.sub(lambda match: os.environ[match[1]], path)).expanduser()

    @cached_property
    def files(self) -> list[File]:
        """All of them.

        Raises:
            DataError: none, one that cannot be read, or one at another rate.
        """
        found = []
        for path in sorted(p for p in self.root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file()):
            try:
                described = soundfile.info(path)
            except soundfile.LibsndfileError as error:
                raise DataError(f"{path} cannot be read as audio ({error}); delete it or unpack it again") from error
            if described.samplerate != RATE_HZ:
                raise DataError(f"{path} is at {described.samplerate} Hz and {RATE_HZ} are wanted; resample it first")
            if described.frames:
                found.append(File(path, described.frames))
        if not found:
            raise DataError(f"{self.root} holds no audio ({', '.join(SUFFIXES)}); get the noise, or correct the path")
        return found

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the names and lengths."""
        return digest_json([[f.path.relative_to(self.root).as_posix(), f.samples] for f in self.files])

    def draw(self, rng: np.random.Generator) -> File:
        """One of them."""
        return self.files[int(rng.integers(len(self.files)))]

    def read(self, file: File, start: int, count: int) -> Wave:
        """Samples of one of them, the first channel; past the end it begins anew."""
        if start + count <= file.samples:
            wave, _ = soundfile.read(file.path, count, start, dtype="float32", always_2d=True)
            return np.ascontiguousarray(wave[:, 0])
        whole, _ = soundfile.read(file.path, dtype="float32", always_2d=True)
        return whole[(start + np.arange(count)) % len(whole), 0]


Draw = Callable[[int, np.random.Generator, int], Wave]


def noise_maker(source: Any, speech: Speech) -> Draw:
    """A function of samples wanted, generator, and the recording the noise is for, which is not in the babble."""
    if isinstance(source, FolderNoise):
        folder = AudioFolder(source.path)

        def from_folder(count: int, rng: np.random.Generator, own: int) -> Wave:
            file = folder.draw(rng)
            # anywhere it fits; a shorter one begins anywhere and is repeated
            start = int(rng.integers(file.samples - count + 1 if file.samples >= count else file.samples))
            return folder.read(file, start, count)

        return from_folder
    if isinstance(source, BabbleNoise):
        low, high = source.voices
        return lambda count, rng, own: babble(speech, count, int(rng.integers(low, high + 1)), own, rng)
    flattest, steepest = source.exponents
    return lambda count, rng, own: coloured(count, float(rng.uniform(flattest, steepest)), rng)


def babble(speech: Speech, count: int, voices: int, own: int, rng: np.random.Generator) -> Wave:
    """Recordings other than `own` over each other, each brought to the same power; what is shorter is repeated.

    Raises:
        DataError: there is no other recording.
    """
    if len(speech) < 2:
        raise DataError("babble is made of other training recordings and there is only one; use {kind: coloured}")
    total = np.zeros(count, dtype=np.float32)
    for _ in range(voices):
        u = int(rng.integers(len(speech) - 1))
        u += u >= own
        available = speech.samples_of(u)
        if available >= count:
            voice = speech.read(u, int(rng.integers(available - count + 1)), count)
        else:
            voice = np.resize(np.roll(speech.read(u, 0, available), int(rng.integers(available))), count)
        power = float(np.square(voice, dtype=np.float64).mean())
        if power > 0:  # a silent stretch adds nothing
            total += voice / np.float32(np.sqrt(power))
    return total


def coloured(count: int, exponent: float, rng: np.random.Generator) -> Wave:
    """Gaussian noise with a power spectrum of f to the power of -`exponent`, constant below 20 Hz."""
    white = np.fft.rfft(rng.standard_normal(count))
    frequency = np.maximum(np.fft.rfftfreq(count, 1 / RATE_HZ), 20.0)
    return np.fft.irfft(white * frequency ** (-exponent / 2), count).astype(np.float32)
