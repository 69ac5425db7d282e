"""How alike the layers of a teacher are: one feature store in, one (L, L) matrix out.

The store is read a block of frames at a time and never held in memory; dask reads and adds up blocks side by side.
Everything is summed in float64. Linear CKA needs the cross-covariance of every pair of layers, (D, D) each, so pairs are
worked through in as many passes over the sample as the memory allows.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import dask
import numpy as np
from jaxtyping import Float, Float64
from pydantic import BaseModel, Field

from cache.codecs import decode
from cache.errors import StoreError
from cache.frames import HOP, RATE_HZ, FrameSpan
from cache.names import keeps_layers, layers_of
from cache.ragged import Store

BLOCK_FRAMES = 4096
THREADS = 4
"""Blocks under way at a time: what is in memory must not grow with the cores of the machine."""
SMALL = 1e-300


class SimilarityParams(BaseModel, frozen=True, extra="forbid"):
    """How layers are compared."""

    measure: Literal["cka", "cosine", "distance"]
    """cka: linear centred kernel alignment (Kornblith et al. 2019, arXiv 1905.00414). cosine: of two layers at the same
    frame, the mean over frames. distance: what DPHuBERT's loss is between them, mean |x - y| + 1 - cos; 0 is the same."""
    seconds: float = Field(gt=0)
    """Audio drawn for it."""
    seed: int = Field(ge=0)
    """Of the draw."""
    memory_gb: float = Field(gt=0)
    """Of blocks and sums, about; less memory takes more passes over the sample and gives the same numbers but for rounding."""


class Similarity(NamedTuple):
    """What was found."""

    layers: tuple[int, ...]
    matrix: Float64[np.ndarray, "L L"]
    """Symmetric."""
    frames: int
    """Of the sample."""


Block = Float64[np.ndarray, "L F D"]
Stretch = tuple[int, FrameSpan]
"""Frames of an utterance."""


def similarity(store: Store, params: SimilarityParams) -> Similarity:
    """Compare all layers that a store keeps one by one.

    Raises:
        StoreError: fewer than two layers.
    """
    names = sorted(name for name in store.arrays if keeps_layers(name) and len(layers_of(name)) == 1)
    if len(names) < 2:
        raise StoreError(
            f"{store.place} keeps {len(names)} layer; extract two or more (keep: {{layers: all}}) to compare them"
        )
    drawn = draw(store, params.seconds, params.seed)
    width = store.width or 0
    limit = block_frames(len(names), width, params.memory_gb)
    blocks = [dask.delayed(read_block)(store, names, some) for some in blocks_of(store, drawn, limit)]
    compare = {"cka": _cka, "cosine": _cosine, "distance": _distance}[params.measure]
    matrix = compare(blocks, len(names), width, params.memory_gb)
    frames = int(store.rows[drawn].sum())
    return Similarity(tuple(layers_of(name)[0] for name in names), matrix, frames)


def draw(store: Store, seconds: float, seed: int) -> list[int]:
    """Utterances drawn until they have `seconds` of audio, or all of them; in the order of the store."""
    order = np.random.default_rng(seed).permutation(len(store.rows))
    enough = np.searchsorted(np.cumsum(store.rows[order]), seconds * RATE_HZ / HOP)
    drawn: list[int] = sorted(order[: int(enough) + 1].tolist())
    return drawn


def block_frames(num: int, width: int, memory_gb: float) -> int:
    """Frames of a block: half the memory is for the blocks under way, each in float64 and once more as it is stored."""
    return min(BLOCK_FRAMES, max(64, int(memory_gb * 1e9 / 2 / THREADS / (num * width * (8 + 4)))))


def blocks_of(store: Store, utterances: Sequence[int], limit: int) -> Iterator[list[Stretch]]:
    """The utterances in blocks of at most `limit` frames; one that is longer is cut."""
    block: list[Stretch] = []
    frames = 0
    for u in utterances:
        for start in range(0, int(store.rows[u]), limit):
            count = min(limit, int(store.rows[u]) - start)
            if frames + count > limit:
                yield block
                block, frames = [], 0
            block.append((u, FrameSpan(start, count)))
            frames += count
    yield block


def read_block(store: Store, names: Sequence[str], stretches: Sequence[Stretch]) -> Block:
    """All frames of some utterances, layer by layer, decoded; with a reader of its own, so that threads may do it."""
    reader = Store(store.place, names, store.verify)
    coding = reader.spec("").coding
    tables = [reader.tables(name) for name in names]
    numbers, spans = zip(*stretches, strict=True)
    rows, counts = reader.read_batch(numbers, names, spans)
    reader.close()
    block = np.empty((len(names), int(counts.sum()), store.width or 0))
    ends = np.cumsum(counts).tolist()
    for n in range(len(names)):
        for b, (end, count) in enumerate(zip(ends, counts.tolist(), strict=True)):
            block[n, end - count : end] = decode(rows[b, n, :count], coding, tables[n])
    return block


def _cka(blocks: Sequence[object], num: int, width: int, memory_gb: float) -> Float64[np.ndarray, "L L"]:
    """Linear CKA: ||X'Y||^2 / (||X'X|| ||Y'Y||) of centred features, in Frobenius norms (eq. 5 there).

    Cov = sum x y' - n mean(x) mean(y)', so one pass gives sums and means together.
    """
    pairs = [(i, j) for i in range(num) for j in range(i, num)]
    held = 2 * THREADS + 4  # every thread adds one sum to another at most; those of the tree above wait
    at_once = max(1, int(memory_gb * 1e9 / 2 / (8 * width * width * held)))
    shared = np.empty((num, num))
    for begin in range(0, len(pairs), at_once):
        some = pairs[begin : begin + at_once]
        total = _add_up([dask.delayed(_products)(block, some) for block in blocks])
        for (i, j), gram in zip(some, total.grams, strict=True):
            covariance = gram - np.outer(total.sums[i], total.sums[j]) / total.frames
            shared[i, j] = shared[j, i] = np.square(covariance).sum()
    own = np.sqrt(np.maximum(np.diag(shared), SMALL))
    return shared / np.outer(own, own)


class _Sums(NamedTuple):
    grams: Float64[np.ndarray, "P D D"]
    sums: Float64[np.ndarray, "L D"]
    frames: int


def _products(block: Block, pairs: Sequence[tuple[int, int]]) -> _Sums:
    grams = np.empty((len(pairs), block.shape[2], block.shape[2]))
    for gram, (i, j) in zip(grams, pairs, strict=True):
        np.matmul(block[i].T, block[j], out=gram)
    return _Sums(grams, block.sum(1), block.shape[1])


def _plus(a: _Sums, b: _Sums) -> _Sums:
    """Into a, which nobody else reads."""
    return _Sums(np.add(a.grams, b.grams, out=a.grams), a.sums + b.sums, a.frames + b.frames)


def _add_up(parts: list[object]) -> _Sums:
    """Their sum, two by two: a tree that dask works through depth first, so few parts are in memory at a time."""
    while len(parts) > 1:
        pairs = [dask.delayed(_plus)(a, b) for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(parts) - len(parts) % 2 :]
    (total,) = dask.compute(parts[0], scheduler="threads", num_workers=THREADS)
    return _Sums(*total)


def _cosine(blocks: Sequence[object], num: int, width: int, memory_gb: float) -> Float64[np.ndarray, "L L"]:
    return _mean_over_frames([dask.delayed(_cosines)(block) for block in blocks], num)


def _distance(blocks: Sequence[object], num: int, width: int, memory_gb: float) -> Float64[np.ndarray, "L L"]:
    return _mean_over_frames([dask.delayed(_distances)(block) for block in blocks], num)


def _mean_over_frames(parts: list[object], num: int) -> Float64[np.ndarray, "L L"]:
    """The mean of pairwise sums over frames."""
    total, frames = np.zeros((num, num)), 0
    for summed, count in dask.compute(*parts, scheduler="threads", num_workers=THREADS):
        total, frames = total + summed, frames + count
    return total / frames


def _cosines(block: Block) -> tuple[Float64[np.ndarray, "L L"], int]:
    unit = block / np.maximum(np.linalg.norm(block, axis=2, keepdims=True), SMALL)
    return np.einsum("ifd,jfd->ij", unit, unit), block.shape[1]


def _distances(block: Block) -> tuple[Float64[np.ndarray, "L L"], int]:
    """mean |x - y| + 1 - cos(x, y), summed over frames."""
    num, frames, _ = block.shape
    found = np.zeros((num, num))
    unit = block / np.maximum(np.linalg.norm(block, axis=2, keepdims=True), SMALL)
    for i in range(num):
        for j in range(i + 1, num):
            cosine: Float[np.ndarray, " F"] = (unit[i] * unit[j]).sum(1)
            found[i, j] = found[j, i] = (np.abs(block[i] - block[j]).mean(1) + 1.0 - cosine).sum()
    return found, frames
