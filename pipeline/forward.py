"""A model and some utterances of a manifest in, their layers out, one padded batch after another.

For a CUDA device waveforms are read and padded in a thread, a few batches before the model needs them.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cache.errors import DataError
from cache.frames import RATE_HZ
from cache.manifest import Manifest
from cache.names import layers_of
from cache.ragged import Store
from pipeline.extraction.ahead import ahead
from pipeline.extraction.settings import Long
from pipeline.extraction.windows import Piece, piece_batches
from pipeline.padding import pad_waves
from pipeline.upstream import Upstream

BATCHES_AHEAD = 3


class Forwarded(NamedTuple):
    """One batch of B pieces of utterances through a model."""

    pieces: list[Piece]
    layers: list[Float[Tensor, "B T D"]]
    """All layers, on the model's device; what follows the frames of a piece is undefined."""


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
    # on a CPU the forward needs the interpreter, too: a second thread costs it more than the reading does
    for pieces, padded, samples in ahead(batches, BATCHES_AHEAD) if device.startswith("cuda") else batches:
        with torch.inference_mode():
            layers = upstream.layers(padded.to(device, non_blocking=True), samples.to(device, non_blocking=True))
        if (got := layers[0].shape[1]) < (due := max(p.kept.stop for p in pieces)):
            raise DataError(
                f"{manifest[pieces[0].utterance].id}: the model gave {got} frames and the manifest says {due}; "
                "is its hop 320 samples?"
            )
        yield Forwarded(pieces, layers)


def read_batches(manifest: Manifest, waves: Store, batches: Iterable[list[Piece]], device: str) -> Iterator[Padded]:
    """Waveforms of planned batches, padded; in pinned memory where a CUDA device will fetch them."""
    for pieces in batches:
        padded, samples = pad_waves([waves.read("wave", manifest[p.utterance].id)[p.samples] for p in pieces])
        yield (
            Padded(pieces, padded.pin_memory(), samples.pin_memory())
            if device.startswith("cuda")
            else Padded(pieces, padded, samples)
        )


def mean_of(layers: Sequence[Float[Tensor, "B T D"]], array: str) -> Float[Tensor, "B T D"]:
    """What an array keeps: a layer, or the mean of several, in float32."""
    first, *others = (layers[layer].float() for layer in layers_of(array))
    return sum(others, first) / (1 + len(others)) if others else first


def draw_utterances(manifest: Manifest, seconds: float, seed: int) -> list[int]:
    """Utterances drawn until they have `seconds` of audio, or all of them."""
    order = np.random.default_rng(seed).permutation(len(manifest))
    enough = np.searchsorted(np.cumsum(manifest.samples[order]), seconds * RATE_HZ)
    drawn: list[int] = order[: int(enough) + 1].tolist()
    return drawn
