"""Frames: a feature store and some utterances in, all frames of their layers one after another out, (L, F, D).

What fits into a stated bound is kept in memory as it is stored (encoded, float16 as a rule); the rest is read from the
store each time it is asked for, so that the size of a corpus is no limit. Nothing is padded.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from cache.errors import DataError, StoreError
from cache.frames import FrameSpan
from cache.manifest import Manifest
from cache.ragged import Store
from pipeline.codecs import Decoder
from pipeline.tasks.features import checked_frames
from pipeline.tasks.heads import normalise

HELD_BYTES = 2 << 30
"""Encoded features held in memory. What does not fit is read again in every epoch."""
AT_ONCE = 16
"""Utterances in one read of the store."""


class Frames(NamedTuple):
    """Some utterances, frame after frame."""

    layers: Float[Tensor, "L F D"]
    counts: list[int]
    """Frames of each utterance; F together."""


class FrameFeatures:
    """Reads the frames of utterances, on the device and as float32."""

    def __init__(
        self,
        store: Store,
        layers: Sequence[str],
        manifest: Manifest,
        ids: Sequence[str],
        normalise_layers: bool,
        device: torch.device,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        """Find every utterance.

        Raises:
            StoreError: not a store of features.
            DataError: an utterance is missing from the store, or has another length there.
        """
        if store.width is None or not layers:
            raise StoreError(f"the store {store.key} holds no layers; give the receipt of a feature store")
        self.layers = tuple(layers)
        self.width: int = store.width
        self._store, self._normalise, self._device = store, normalise_layers, device
        self._decode = Decoder(store, layers, device)
        self._row_bytes = len(layers) * store.row_width * store.dtype.itemsize
        self._counts = dict(zip(ids, checked_frames(store, manifest, ids), strict=True))
        self._room, self._held = held_bytes, dict[str, Shaped[np.ndarray, "L T W"]]()

    def num_frames(self, name: str) -> int:
        """Frames of one utterance."""
        return self._counts[name]

    def hold(self, ids: Sequence[str], on_read: Callable[[float], None] | None = None) -> None:
        """Keep these utterances in memory, in the order of the store, as many as there is room for.

        `on_read` hears how many utterances each read added.
        """
        wanted = []
        for name in sorted(set(ids) - set(self._held), key=self._store.index.__getitem__):
            if self.num_frames(name) * self._row_bytes <= self._room:
                self._room -= self.num_frames(name) * self._row_bytes
                wanted.append(name)
        for at in range(0, len(wanted), AT_ONCE):
            some = wanted[at : at + AT_ONCE]
            self._held.update(zip(some, self._read(some), strict=True))
            if on_read is not None:
                on_read(float(len(some)))

    def of(self, ids: Sequence[str], spans: Sequence[FrameSpan] | None = None) -> Frames:
        """The frames of some utterances, in the order asked for; with `spans`, of each only those.

        Raises:
            DataError: a feature that is not finite.
        """
        absent = [number for number, name in enumerate(ids) if name not in self._held]
        read = self._read([ids[i] for i in absent], spans and [spans[i] for i in absent]) if absent else []
        fresh = dict(zip(absent, read, strict=True))
        rows = [
            fresh[i] if i in fresh else self._held[name] if spans is None else self._held[name][:, spans[i].rows]
            for i, name in enumerate(ids)
        ]
        counts = [part.shape[1] for part in rows]
        layers = self._decode(torch.from_numpy(np.concatenate(rows, axis=1))[None].to(self._device))[0]
        if not bool(layers.isfinite().all()):
            bad = next(i for i, part in enumerate(layers.split(counts, 1)) if not bool(part.isfinite().all()))
            raise DataError(f"{ids[bad]}: its features are not finite; check the model, then extract it again")
        return Frames(normalise(layers) if self._normalise else layers, counts)

    def _read(self, ids: Sequence[str], spans: Sequence[FrameSpan] | None = None) -> list[Shaped[np.ndarray, "L _ W"]]:
        encoded, counts = self._store.read_batch(ids, self.layers, spans)
        return [rows[:, :count].copy() for rows, count in zip(encoded, counts.tolist(), strict=True)]
