"""A model and some utterances of a manifest in, their layers out, one padded batch after another.

Batches are made by length, longest first, as a pure function of the utterances: who runs them again meets the same ones.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from cache.errors import DataError
from cache.frames import RATE_HZ
from cache.manifest import Manifest
from cache.ragged import Store
from pipeline.padding import pad_waves
from pipeline.upstream import Upstream


class Forwarded(NamedTuple):
    """One batch of B utterances through a model."""

    utterances: list[int]
    """Their numbers in the manifest."""
    counts: list[int]
    """Frames of each."""
    layers: list[Float[Tensor, "B T D"]]
    """All layers, on the model's device; what follows an utterance's frames is undefined."""


def forward_batches(
    upstream: Upstream,
    manifest: Manifest,
    waves: Store,
    utterances: Iterable[int],
    batch_seconds: float,
    device: str,
) -> Iterator[Forwarded]:
    """Run utterances through a model.

    Raises:
        DataError: the model gives fewer frames than the manifest says.
    """
    for batch in length_batches(manifest, utterances, batch_seconds):
        padded, samples = pad_waves([waves.read("wave", manifest[u].id) for u in batch])
        with torch.inference_mode():
            layers = upstream.layers(padded.to(device), samples.to(device))
        counts = [manifest[u].num_frames for u in batch]
        if (got := layers[0].shape[1]) < max(counts):
            raise DataError(
                f"{manifest[batch[0]].id}: the model gave {got} frames and the manifest says {max(counts)}; "
                "is its hop 320 samples?"
            )
        yield Forwarded(batch, counts, layers)


def length_batches(manifest: Manifest, utterances: Iterable[int], batch_seconds: float) -> Iterator[list[int]]:
    """Utterances by length, longest first, in batches of at most `batch_seconds` of padded audio."""
    budget = batch_seconds * RATE_HZ
    batch: list[int] = []
    for u in sorted(utterances, key=lambda u: (-manifest[u].samples, u)):
        if batch and (len(batch) + 1) * manifest[batch[0]].samples > budget:
            yield batch
            batch = []
        batch.append(u)
    yield batch


def draw_utterances(manifest: Manifest, seconds: float, seed: int) -> list[int]:
    """Utterances drawn until they have `seconds` of audio, or all of them."""
    order = np.random.default_rng(seed).permutation(len(manifest))
    enough = np.searchsorted(np.cumsum(manifest.samples[order]), seconds * RATE_HZ)
    drawn: list[int] = order[: int(enough) + 1].tolist()
    return drawn
