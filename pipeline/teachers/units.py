"""Units to predict: recordings in, one k-means cluster per 20 ms frame out, in a file (HuBERT, section II.A).

The first units cluster MFCCs, later ones a layer of the model that the first taught. Kaldi's MFCC frames are 400 samples
every 160, so every second one is exactly a frame of the model and nothing has to be trimmed.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torchaudio
from jaxtyping import Float32, Int16, Int64, UInt16
from pydantic import BaseModel, Field
from sklearn.cluster import MiniBatchKMeans

from cache.errors import SettingsError
from cache.frames import RATE_HZ, num_frames
from cache.publish import digest_file, publish_file


class MfccUnits(BaseModel, frozen=True, extra="forbid"):
    """39 MFCCs: 13 coefficients, their slopes and curvatures."""

    kind: Literal["mfcc"]
    centre: bool
    """Subtract each recording's mean, which holds voice and channel, before clustering (the paper does not)."""


class LayerUnits(BaseModel, frozen=True, extra="forbid"):
    """A layer of the model of the iteration before; in the first iteration, of the teacher that is started from."""

    kind: Literal["layer"]
    layer: int = Field(ge=0)
    """0 is the input of the first block."""
    centre: bool
    """Subtract each recording's mean before clustering."""


Units = Annotated[MfccUnits | LayerUnits, Field(discriminator="kind")]
Featurise = Callable[[Int16[np.ndarray, " _"]], Float32[np.ndarray, "_ _"]]
NameFrames = Callable[[Int16[np.ndarray, " _"]], UInt16[np.ndarray, " _"]]


def mfcc(wave: Int16[np.ndarray, " S"]) -> Float32[np.ndarray, "T 39"]:
    """MFCCs, slopes and curvatures on the model's frame grid: frame t sees samples [320 t, 320 t + 400)."""
    static = torchaudio.compliance.kaldi.mfcc(
        torch.from_numpy(wave).float()[None], sample_frequency=RATE_HZ, use_energy=False, dither=0.0
    ).T  # (13, frames of 10 ms)
    slope = torchaudio.functional.compute_deltas(static)
    curvature = torchaudio.functional.compute_deltas(slope)
    every_second = torch.cat([static, slope, curvature]).T[::2]
    assert len(every_second) == num_frames(len(wave))
    return every_second.contiguous().numpy()


def fit_clusters(
    waves: Sequence[Int16[np.ndarray, " _"]],
    featurise: Featurise,
    centre: bool,
    clusters: int,
    fit_frames: int,
    seed: int,
) -> NameFrames:
    """A function that names the unit of every frame of a recording, after fitting k-means on `fit_frames` frames.

    Args:
        waves: the recordings; only those that are drawn are read.
        featurise: frames to cluster.
        centre: subtract each recording's mean.
        clusters: number of units.
        fit_frames: frames of randomly drawn recordings that k-means sees.
        seed: of the draw and of k-means.

    Raises:
        SettingsError: fewer frames than units.
    """

    def frames(wave: Int16[np.ndarray, " _"]) -> Float32[np.ndarray, "T D"]:
        found = featurise(wave)
        return found - found.mean(0) if centre else found

    drawn: list[Float32[np.ndarray, "_ _"]] = []
    total = 0
    for u in np.random.default_rng(seed).permutation(len(waves)).tolist():
        if total >= fit_frames:
            break
        drawn.append(frames(waves[u]))
        total += len(drawn[-1])
    if total < clusters:
        raise SettingsError(
            f"{total} frames cannot make clusters: {clusters}; lower it, or "
            f"{'raise fit_frames' if total >= fit_frames else 'give more audio in split train'}"
        )
    stacked = np.concatenate(drawn)
    drawn.clear()
    scale = stacked.std(0) + 1e-5  # so that the energy does not outweigh the slopes, nor one channel the others
    stacked /= scale
    machine = MiniBatchKMeans(
        clusters, init="k-means++", n_init=3, batch_size=4096, max_iter=30, reassignment_ratio=0.0, random_state=seed
    ).fit(stacked)
    return lambda wave: machine.predict(frames(wave) / scale).astype(np.uint16)


class UnitFile:
    """The units of all recordings in one file of uint16, read from the disk when asked for: 960 h are 350 MB."""

    def __init__(self, path: Path, frames: Int64[np.ndarray, " U"]) -> None:
        self.ends = np.cumsum(frames)
        self.units = np.memmap(path, dtype="<u2", mode="r", shape=(int(self.ends[-1]),))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, u: int) -> UInt16[np.ndarray, " T"]:
        return self.units[self.ends[u - 1] if u else 0 : self.ends[u]]


def write_units(
    path: Path,
    waves: Sequence[Int16[np.ndarray, " _"]],
    name: NameFrames,
    on_named: Callable[[int, int], None] = lambda done, of: None,
) -> str:
    """Publish the units of all recordings, which are read one after the other; gives the file's SHA-256."""
    with publish_file(path) as partial, open(partial, "wb") as file:
        for u in range(len(waves)):
            file.write(name(waves[u]).astype("<u2").tobytes())
            on_named(u + 1, len(waves))
    return digest_file(path)
