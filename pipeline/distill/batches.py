"""Planned batches of one manifest in, padded tensors on the host out, read ahead by processes of their own.

Reader processes fill a ring of shared buffers (`cache.ring`), so the tensors of a batch are views that the next
batch may overwrite. On a GPU the ring is pinned, and a batch is copied to the device without a detour.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int16, Int64, Shaped, UInt8
from torch import Tensor

from cache.errors import DataError
from cache.frames import FIELD, HOP, RATE_HZ
from cache.manifest import Manifest
from cache.padded import PaddedBatches, Request
from cache.ragged import Store
from cache.ring import Ring
from pipeline.distill.plan import Item

SLOTS = 4  # batches in memory: one that is computed, three read ahead


class Batch(NamedTuple):
    """What one step reads, on the host."""

    ids: list[str]
    waves: Int16[Tensor, "B S"]
    """As stored; zero after each utterance's end."""
    samples: Int64[Tensor, " B"]
    targets: list[Shaped[Tensor, "B _ T _"]]
    """Of each feature store rows as stored, (B, N, T, W), decoded on the device; zero after each utterance's end."""
    frames: Int64[Tensor, " B"]


class BatchReader:
    """Reads planned batches of one manifest out of its waveforms and the targets of one teacher or several."""

    def __init__(
        self, manifest: Manifest, waves: Store, features: Sequence[Store], arrays: Sequence[Sequence[str]]
    ) -> None:
        """Find every utterance in all stores.

        Args:
            manifest: what is read.
            waves: its waveforms.
            features: K stores with targets.
            arrays: what to read of each.

        Raises:
            DataError: an utterance is absent from a store or has another length there.
        """
        self.manifest = manifest
        self.padded = PaddedBatches(waves, features, arrays)
        places = []
        for u in manifest:
            for store in (waves, *features):
                want, unit = (u.samples, "samples") if store is waves else (u.num_frames, "frames")
                at = store.index.get(u.id)
                if at is None or int(store.rows[at]) != want:
                    got = "nothing" if at is None else f"{int(store.rows[at])} {unit}"
                    raise DataError(
                        f"{u.id}: the manifest says {want} {unit} but {store.place} has {got}; "
                        "bring them in step with `dvc repro`"
                    )
                places.append(at)
        shape = len(manifest), 1 + len(features)
        self._places: Int64[np.ndarray, "U 1+K"] = np.array(places, dtype=np.int64).reshape(shape)
        self.samples = manifest.samples
        first = features[0]
        self.shards: Int64[np.ndarray, " U"] = first.plan.start[self._places[:, 1]] // first.grid.shard_rows
        """The shard that each utterance is in: of the first feature store, and of all that are cut alike."""

    def read(self, items: Sequence[Item]) -> Batch:
        """One planned batch, read here and now into a buffer of its own."""
        request = self._request(items)
        padded = int(request.waves[:, 2].max()) * len(items), int(request.frames[:, 1].max()) * len(items)
        buffer = np.empty(self.padded.buffer_bytes(*padded), dtype=np.uint8)
        self.padded(request, buffer)
        return self._batch([item.utterance for item in items], request, buffer)

    @contextmanager
    def ahead(
        self, plan: Iterable[list[Item]], batch_seconds: float, readers: int, device: torch.device
    ) -> Iterator[Iterator[Batch]]:
        """The planned batches, read ahead by `readers` processes; each is valid until the next is asked for.

        Raises:
            StoreError: a shard is damaged or missing.
            ResourceError: not enough memory, or a reader was killed.
        """
        samples = int(batch_seconds * RATE_HZ)
        size = self.padded.buffer_bytes(samples, samples // HOP + FIELD)
        asked: deque[tuple[list[int], Request]] = deque()  # what the batches in the ring are of

        def requests() -> Iterator[Request]:
            for items in plan:
                request = self._request(items)
                asked.append(([item.utterance for item in items], request))
                yield request

        with Ring(self.padded, requests(), size, SLOTS + readers - 1, readers) as ring, pinned(ring.memory, device):
            yield (self._batch(*asked.popleft(), buffer) for _, buffer in ring)

    def _request(self, items: Sequence[Item]) -> Request:
        places = self._places[[item.utterance for item in items]]
        samples, frames = [], []
        for item in items:
            if item.span is None:  # with the samples after the last frame, which the teacher's norm saw too
                u = self.manifest[item.utterance]
                samples.append((0, u.samples))
                frames.append((0, u.num_frames))
            else:
                cut = item.span.samples
                samples.append((cut.start, cut.stop - cut.start))
                frames.append((item.span.start, item.span.count))
        waves = np.column_stack([places[:, 0], np.array(samples, dtype=np.int64)])
        return Request(waves, places[:, 1:].T, np.array(frames, dtype=np.int64))

    def _batch(self, utterances: list[int], request: Request, buffer: UInt8[np.ndarray, " _"]) -> Batch:
        waves, rows = self.padded.views(request, buffer)
        return Batch(
            [self.manifest[u].id for u in utterances],
            torch.from_numpy(waves),
            torch.from_numpy(request.waves[:, 2].copy()),
            [torch.from_numpy(of_store) for of_store in rows],
            torch.from_numpy(request.frames[:, 1].copy()),
        )


@contextmanager
def pinned(memory: tuple[int, int], device: torch.device) -> Iterator[None]:
    """Lock shared memory for the time of a block, so that a CUDA device copies from it directly and without waiting."""
    if device.type != "cuda":
        yield
        return
    runtime = torch.cuda.cudart()
    torch.cuda.check_error(int(runtime.cudaHostRegister(*memory, 0)))
    try:
        yield
    finally:
        torch.cuda.synchronize()
        torch.cuda.check_error(int(runtime.cudaHostUnregister(memory[0])))
