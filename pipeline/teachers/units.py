"""Units to predict: recordings in, one k-means cluster per 20 ms frame out (HuBERT, section II.A).

The first units cluster MFCCs, later ones a layer of the model that the first taught. Kaldi's MFCC frames are 400 samples
every 160, so every second one is exactly a frame of the model and nothing has to be trimmed.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import numpy as np
import torch
import torchaudio
from jaxtyping import Float32, Int16, Int64
from pydantic import BaseModel, Field
from sklearn.cluster import MiniBatchKMeans

from cache.errors import SettingsError
from cache.frames import RATE_HZ, num_frames


class MfccUnits(BaseModel, frozen=True, extra="forbid"):
    """39 MFCCs: 13 coefficients, their slopes and curvatures."""

    kind: Literal["mfcc"]
    centre: bool
    """Subtract each recording's mean, which holds voice and channel, before clustering (the paper does not)."""


class LayerUnits(BaseModel, frozen=True, extra="forbid"):
    """A layer of the model of the iteration before."""

    kind: Literal["layer"]
    layer: int = Field(ge=0)
    """0 is the input of the first block."""
    centre: bool
    """Subtract each recording's mean before clustering."""


Units = Annotated[MfccUnits | LayerUnits, Field(discriminator="kind")]
Featurise = Callable[[Int16[np.ndarray, " _"]], Float32[np.ndarray, "_ _"]]


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


def cluster(
    waves: Sequence[Int16[np.ndarray, " _"]],
    featurise: Featurise,
    centre: bool,
    clusters: int,
    fit_frames: int,
    seed: int,
) -> list[Int64[np.ndarray, " _"]]:
    """The unit of every frame of every recording, after fitting k-means on `fit_frames` of them.

    Args:
        waves: the recordings; a sequence that reads from a store is read twice.
        featurise: frames to cluster.
        centre: subtract each recording's mean.
        clusters: number of units.
        fit_frames: frames of randomly drawn recordings that k-means sees.
        seed: of the draw and of k-means.

    Raises:
        SettingsError: fewer frames than units.
    """

    def frames(u: int) -> Float32[np.ndarray, "T D"]:
        found = featurise(waves[u])
        return found - found.mean(0) if centre else found

    drawn: list[Float32[np.ndarray, "_ _"]] = []
    total = 0
    for u in np.random.default_rng(seed).permutation(len(waves)).tolist():
        if total >= fit_frames:
            break
        drawn.append(frames(u))
        total += len(drawn[-1])
    if total < clusters:
        raise SettingsError(
            f"{total} frames cannot make clusters: {clusters}; lower it, or give more audio in split train"
        )
    stacked = np.concatenate(drawn)
    scale = stacked.std(0) + 1e-5  # so that the energy does not outweigh the slopes, nor one channel the others
    machine = MiniBatchKMeans(
        clusters, init="k-means++", n_init=3, batch_size=4096, max_iter=30, reassignment_ratio=0.0, random_state=seed
    ).fit(stacked / scale)
    return [machine.predict(frames(u) / scale).astype(np.int64) for u in range(len(waves))]
