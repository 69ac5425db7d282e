"""A model and some utterances of a manifest in, their layers out, one padded batch after another.

For a CUDA device waveforms are read and padded in a thread, a few batches before the model needs them.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cache.errors import DataError
from cache.frames import RATE_HZ
from cache.manifest import Manifest
from cache.names import PROJECTION, layers_of
from cache.ragged import Store
from pipeline.extraction.ahead import ahead
from pipeline.extraction.settings import Long
from pipeline.extraction.windows import Piece, piece_batches
from pipeline.padding import pad_waves
from pipeline.upstream import Outputs, Upstream

BATCHES_AHEAD = 3


class Forwarded(NamedTuple):
    """One batch of B pieces of utterances through a model."""

    pieces: list[Piece]
    outputs: Outputs
    """All layers and the projection, on the model's device; what follows the frames of a piece is undefined."""


class Padded(NamedTuple):
    """One batch of B pieces, on the host."""

    pieces: list[Piece]
    waves: Float[Tensor, "B S"]
    samples: Int64[Tensor, " B"]


def forward_batches(
    upstream: Upstream,
    manifest: Manifest,
    waves: Store,
    utterances: Iterable[int],
    long: Long,
    batch_seconds: float,
    device: str,
) -> Iterator[Forwarded]:
    """Run utterances through a model.

    Raises:
        DataError: the model gives fewer frames than the manifest says.
    """
    batches = read_batches(manifest, waves, piece_batches(manifest, utterances, long, batch_seconds), device)
    for batch in ahead(batches, BATCHES_AHEAD) if device.startswith("cuda") else batches:
        yield forward(upstream, manifest, batch, device)


def forward(upstream: Upstream, manifest: Manifest, batch: Padded, device: str) -> Forwarded:
    """Run one batch through a model.

    Raises:
        DataError: the model gives fewer frames than the manifest says.
    """
    with torch.inference_mode():
        outputs = upstream.outputs(
            batch.waves.to(device, non_blocking=True), batch.samples.to(device, non_blocking=True)
        )
    if (got := outputs.layers[0].shape[1]) < (due := max(p.kept.stop for p in batch.pieces)):
        raise DataError(
            f"{manifest[batch.pieces[0].utterance].id}: the model gave {got} frames and the manifest says {due}; "
            "is its hop 320 samples?"
        )
    return Forwarded(batch.pieces, outputs)


def read_batches(manifest: Manifest, waves: Store, batches: Iterable[list[Piece]], device: str) -> Iterator[Padded]:
    """Waveforms of planned batches, padded."""
    for pieces in batches:
        yield read_batch(manifest, waves, pieces, device)


def read_batch(manifest: Manifest, waves: Store, pieces: list[Piece], device: str) -> Padded:
    """Waveforms of one batch, padded; in pinned memory where a CUDA device will fetch them."""
    padded, samples = pad_waves([waves.read("wave", manifest[p.utterance].id)[p.samples] for p in pieces])
    if device.startswith("cuda"):
        return Padded(pieces, padded.pin_memory(), samples.pin_memory())
    return Padded(pieces, padded, samples)


def mean_of(outputs: Outputs, array: str) -> Float[Tensor, "B T D"]:
    """What an array keeps: a layer, the projection, or the mean of several layers, in float32."""
    if array == PROJECTION:
        assert outputs.projection is not None, "planning refuses what a model does not have"
        return outputs.projection.float()
    first, *others = (outputs.layers[layer].float() for layer in layers_of(array))
    return sum(others, first) / (1 + len(others)) if others else first


def draw_utterances(manifest: Manifest, seconds: float, seed: int) -> list[int]:
    """Utterances drawn until they have `seconds` of audio, or all of them."""
    order = np.random.default_rng(seed).permutation(len(manifest))
    enough = np.searchsorted(np.cumsum(manifest.samples[order]), seconds * RATE_HZ)
    drawn: list[int] = order[: int(enough) + 1].tolist()
    return drawn
