"""A request and a buffer in; the batch in it out, its waveforms in noise and rooms and its targets as they were stored.

What reader processes run where a student hears worse than its teacher did (RobustDistiller, SPEAR): the teacher heard the
clean audio once, so nothing has to be computed again. What happens to an utterance is a function of the seed, the number
of its batch in the training and its number in the manifest: neither resuming nor readers nor the order of rows change it.
"""

from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int16, Int32, Int64, UInt8
from torch import Tensor

from cache.frames import FrameSpan
from cache.padded import PaddedBatches, Request
from cache.ragged import Store
from pipeline.distortion.distort import Distorter, Distortion
from pipeline.padding import INT16_SCALE

INT16 = np.iinfo(np.int16)
OF_NOISE = 1  # the last word of the generator's seed: other draws of a batch have another


class NoisyRequest(NamedTuple):
    """What to read, and what the noise of it is drawn from."""

    clean: Request
    number: int
    """Of the batch, in the whole training."""
    utterances: Int64[np.ndarray, " B"]
    """In the manifest."""


class Voices:
    """The utterances of a manifest, read from a wave store when asked for: what babble is made of."""

    def __init__(self, waves: Store, places: Int32[np.ndarray, " U"]) -> None:
        self.waves, self.places = waves, places

    def __len__(self) -> int:
        return len(self.places)

    def samples_of(self, u: int) -> int:
        """Samples of one of them."""
        return int(self.waves.rows[self.places[u]])

    def read(self, u: int, start: int, count: int) -> Float32[np.ndarray, " S"]:
        """Some of its samples, in [-1, 1)."""
        rows, _ = self.waves.read_batch([int(self.places[u])], ["wave"], [FrameSpan(start, count)])
        return rows.reshape(count) * np.float32(INT16_SCALE)


class NoisyBatches:
    """Fills buffers as `PaddedBatches` does, then distorts each waveform in its place; picklable.

    Importing it takes two seconds and 0.6 GB of mapped libraries, for torch: readers of clean audio do without.
    """

    def __init__(self, padded: PaddedBatches, params: Distortion, places: Int32[np.ndarray, " U"], seed: int) -> None:
        """Nothing is opened yet.

        Args:
            padded: reads what is stored.
            params: what happens to the waveforms.
            places: number in the wave store of every utterance of the manifest.
            seed: of the training.
        """
        self.padded, self.params, self.places, self.seed = padded, params, places, seed

    def __call__(self, request: NoisyRequest, buffer: UInt8[np.ndarray, " _"]) -> None:
        """Read and distort one batch.

        Raises:
            StoreError: a shard is damaged or missing.
            DataError: a file of noise cannot be read, or there is nobody to babble.
        """
        self.padded(request.clean, buffer)
        waves, _ = self.padded.views(request.clean, buffer)
        counts = request.clean.waves[:, 2].tolist()
        for wave, count, u in zip(waves, counts, request.utterances.tolist(), strict=True):
            rng = np.random.default_rng([self.seed, request.number, u, OF_NOISE])
            clean = torch.from_numpy(wave[:count]).float() * INT16_SCALE
            noisy = self._distort(clean, u, rng)
            if noisy is not clean:
                wave[:count] = as_int16(noisy)

    @cached_property
    def _distort(self) -> Distorter:
        return Distorter(self.params, Voices(self.padded.waves, self.places))

    def __reduce__(self) -> tuple[Any, ...]:
        return NoisyBatches, (self.padded, self.params, self.places, self.seed)


def as_int16(wave: Float[Tensor, " S"]) -> Int16[np.ndarray, " S"]:
    """A waveform in [-1, 1] as it is stored, rounded once. A louder one is turned down as a whole until it fits.

    Clipping it would be another distortion, and change the ratio of signal to noise that was asked for.
    """
    samples = wave.double().numpy() / INT16_SCALE
    over = max(samples.max() / INT16.max, samples.min() / INT16.min)
    if over > 1:
        samples /= over
    return np.rint(samples).astype(np.int16)
