"""Pooled features: a feature store and a list of utterances in, one mean per utterance and layer out, (U, L, D).

The store is read once, a few utterances at a time, and never held in memory: what stays is one vector per layer and
utterance, enough for every head, seed and learning rate of a probe (`pipeline.tasks.heads` says why that is exact).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from cache.errors import DataError, StoreError
from cache.manifest import Manifest
from cache.ragged import Store
from pipeline.codecs import Decoder
from pipeline.tasks.heads import mean_over_frames, normalise

BLOCK_VALUES = 1 << 24
"""Numbers (L x T x D, padding included) held at a time while pooling: 64 MiB as float32."""


class PooledFeatures(NamedTuple):
    """The mean of every layer over the frames of every utterance."""

    ids: tuple[str, ...]
    layers: tuple[str, ...]
    means: Float[Tensor, "U L D"]

    def of(self, ids: Sequence[str]) -> Float[Tensor, "V L D"]:
        """The rows of some utterances, in the order asked for."""
        row = {utterance_id: number for number, utterance_id in enumerate(self.ids)}
        return self.means[[row[utterance_id] for utterance_id in ids]]


def pool(
    store: Store,
    layers: Sequence[str],
    manifest: Manifest,
    ids: Sequence[str],
    normalise_layers: bool,
    on_pooled: Callable[[float], None] | None = None,
) -> PooledFeatures:
    """Read `layers` of `ids` once, in the order of the store, and average over time in float32.

    `on_pooled` hears how many utterances each block added.
    """
    width = store.width
    if width is None or not layers:
        raise StoreError(f"the store {store.key} holds no layers; give the receipt of a feature store")
    decode = Decoder(store, layers, "cpu")
    frames = checked_frames(store, manifest, ids)
    means = torch.empty(len(ids), len(layers), width)
    for block in _blocks(store, ids, frames, values_per_frame=len(layers) * width):
        encoded, counts = store.read_batch([ids[number] for number in block], layers)
        batch = decode(torch.from_numpy(encoded))
        if normalise_layers:
            batch = normalise(batch)
        valid = torch.arange(batch.shape[2])[None] < torch.from_numpy(counts)[:, None]
        means[block] = mean_over_frames(batch, valid)
        if on_pooled is not None:
            on_pooled(float(len(block)))
    if not bool(means.isfinite().all()):
        worst = int((~means.isfinite()).flatten(1).any(1).nonzero()[0, 0])
        raise DataError(f"{ids[worst]}: its features are not finite; check the model, then extract it again")
    return PooledFeatures(tuple(ids), tuple(layers), means)


def checked_frames(store: Store, manifest: Manifest, ids: Sequence[str]) -> list[int]:
    """Frames of each utterance, once store and manifest agree on them."""
    missing = [utterance_id for utterance_id in ids if utterance_id not in store.index]
    if missing:
        raise DataError(
            f"{missing[0]} is not in the feature store ({len(missing)} of {len(ids)} utterances are missing); "
            "extract the model over this manifest with `decant extract`"
        )
    frames = []
    for utterance_id in ids:
        got, want = int(store.rows[store.index[utterance_id]]), manifest.by_id[utterance_id].num_frames
        if got != want:
            raise DataError(
                f"{utterance_id}: the feature store has {got} frames but the manifest says {want}; "
                "extract the model over this manifest with `decant extract`"
            )
        frames.append(got)
    return frames


def _blocks(store: Store, ids: Sequence[str], frames: list[int], values_per_frame: int) -> Iterator[list[int]]:
    """Positions in `ids`, in the order of the store, as many at a time as fit into `BLOCK_VALUES` when padded."""
    block: list[int] = []
    longest = 0
    for number in sorted(range(len(ids)), key=lambda number: store.index[ids[number]]):
        grown = max(longest, frames[number])
        if block and (len(block) + 1) * grown * values_per_frame > BLOCK_VALUES:
            yield block
            block, grown = [], frames[number]
        block.append(number)
        longest = grown
    if block:
        yield block
