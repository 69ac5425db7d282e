"""Planned batches of one manifest in, padded tensors on the host out, read ahead by processes of their own.

Reader processes fill a ring of shared buffers (`cache.ring`), so the tensors of a batch are views that the next
batch may overwrite. On a GPU the ring is pinned, and a batch is copied to the device without a detour. Where the student
hears noise (`pipeline.distill.noisy`), it is the reader processes that make it.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

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
from pipeline.distill.noisy import NoisyBatches, NoisyRequest
from pipeline.distill.plan import Item, Planned
from pipeline.distortion.distort import Distortion

SLOTS = 4  # batches in memory: one that is computed, three read ahead


class Batch(NamedTuple):
    """What one forward reads, on the host."""

    number: int
    """Its place in the training (`pipeline.distill.plan.Planned`); -1 of a batch that validates."""
    ids: list[str]
    waves: Int16[Tensor, "B S"]
    """As stored, or distorted; zero after each utterance's end."""
    samples: Int64[Tensor, " B"]
    targets: list[Shaped[Tensor, "B _ T _"]]
    """Of each feature store rows as stored, (B, N, T, W), decoded on the device; zero after each utterance's end."""
    frames: Int64[Tensor, " B"]


class BatchReader:
    """Reads planned batches of one manifest out of its waveforms and the targets of one teacher or several."""

    def __init__(
        self,
        manifest: Manifest,
        waves: Store,
        features: Sequence[Store],
        arrays: Sequence[Sequence[str]],
        distort: Distortion | None = None,
        seed: int = 0,
    ) -> None:
        """Find every utterance in all stores.

        Args:
            manifest: what is read.
            waves: its waveforms.
            features: K stores with targets; none where only waveforms are read.
            arrays: what to read of each.
            distort: what happens to the waveforms of planned batches; None: nothing.
            seed: of the training; the noise is drawn from it.

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
        first = [*features, waves][0]
        places_there = self._places[:, 1 if features else 0]
        self.shards: Int64[np.ndarray, " U"] = first.plan.start[places_there] // first.grid.shard_rows
        """The shard that each utterance is in: of the first feature store, and of all that are cut alike."""
        self._noisy: NoisyBatches | None = None
        if distort is not None:
            self._noisy = NoisyBatches(self.padded, distort, self._places[:, 0].astype(np.int32), seed)

    def read_clean(self, items: Sequence[Item]) -> Batch:
        """A batch that validates: as it is stored, read here and now into a buffer of its own."""
        return self._read(Planned(-1, list(items)), noisy=None)

    def read(self, planned: Planned) -> Batch:
        """One planned batch, read here and now into a buffer of its own: what `ahead` gives, noise included."""
        return self._read(planned, self._noisy)

    def _read(self, planned: Planned, noisy: NoisyBatches | None) -> Batch:
        request, rows = self._request(planned.items), len(planned.items)
        padded = int(request.waves[:, 2].max()) * rows, int(request.frames[:, 1].max()) * rows
        buffer = np.empty(self.padded.buffer_bytes(*padded), dtype=np.uint8)
        if noisy is None:
            self.padded(request, buffer)
        else:
            noisy(_with_noise(planned, request), buffer)
        return self._batch(planned, request, buffer)

    @contextmanager
    def ahead(
        self, plan: Iterable[Planned], batch_seconds: float, readers: int, device: torch.device
    ) -> Iterator[Iterator[Batch]]:
        """The planned batches, read ahead by `readers` processes; each is valid until the next is asked for.

        Raises:
            StoreError: a shard is damaged or missing.
            ResourceError: not enough memory, or a reader was killed.
        """
        samples = int(batch_seconds * RATE_HZ)
        size = self.padded.buffer_bytes(samples, samples // HOP + FIELD)
        asked: deque[tuple[Planned, Request]] = deque()  # what the batches in the ring are of

        def requests() -> Iterator[Request | NoisyRequest]:
            for planned in plan:
                request = self._request(planned.items)
                asked.append((planned, request))
                yield request if self._noisy is None else _with_noise(planned, request)

        fill: Any = self._noisy or self.padded  # what is of `cache` imports no torch
        with Ring(fill, requests(), size, SLOTS + readers - 1, readers) as ring, pinned(ring.memory, device):
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

    def _batch(self, planned: Planned, request: Request, buffer: UInt8[np.ndarray, " _"]) -> Batch:
        waves, rows = self.padded.views(request, buffer)
        return Batch(
            planned.number,
            [self.manifest[item.utterance].id for item in planned.items],
            torch.from_numpy(waves),
            torch.from_numpy(request.waves[:, 2].copy()),
            [torch.from_numpy(of_store) for of_store in rows],
            torch.from_numpy(request.frames[:, 1].copy()),
        )


def _with_noise(planned: Planned, request: Request) -> NoisyRequest:
    return NoisyRequest(request, planned.number, np.array([item.utterance for item in planned.items], dtype=np.int64))


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
