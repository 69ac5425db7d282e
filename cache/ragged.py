"""The ragged store: a folder or URL of sharded Zarr arrays in, the rows of any utterances out.

A store is a Zarr v3 group. Each of its arrays ("layer-04", "wave") holds the rows of all utterances one after another,
cut into the same shards; the columns `start`, `rows`, `ids` and `id_end` say where each utterance lies. Reading one
utterance of one array is one `preadv` into the caller's buffer (`cache.local`), or one range of a request (`cache.remote`):
each shard's index is read once, and the checksums between the chunks are stepped over, or compared if `verify` is set.
"""

import math
import random
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from cache.codecs import Tables
from cache.errors import StoreError
from cache.frames import FrameSpan
from cache.header import load_ids, load_rows, read_header
from cache.local import LocalShards
from cache.places import RemotePath, local, place_of
from cache.plan import StorePlan, plan_rows
from cache.remote import RemoteShards
from cache.tables import read_tables
from cache.zarrshard import ArraySpec, Grid


class Store:
    """A store, read-only: what utterances it has and the rows of each.

    Safe to use after a fork (reads carry their own offset, connections are opened anew); pickling sends the place alone.
    One thread at a time: closing the oldest of very many open shards must not meet a read, so give each thread a store of
    its own.
    """

    def __init__(self, place: PurePath | str, arrays: Sequence[str] = (), verify: bool | float = False) -> None:
        """Open without checking the shards: `cache.receipts` opens against a receipt.

        Args:
            place: the folder of the store, or its URL.
            arrays: names of the arrays that were asked for.
            verify: the share of calls in which the checksum of every chunk that is read is compared: 1 (or True) always,
                0 never, 0.01 one in a hundred, drawn at random.
        """
        self.place: PurePath = place_of(place) if isinstance(place, str) else place
        self.verify = verify
        header = read_header(self.place)
        self.kind: str = header["kind"]
        self.key: str = header["key"]
        self.fingerprint: dict[str, Any] = header["fingerprint"]
        self.codec: str = header["codec"]
        self.width: int | None = header["width"]
        self.grid = Grid(header["chunk_rows"], header["shard_rows"])
        self.arrays = {name: ArraySpec(name, self.width, self.codec) for name in arrays}
        self.rows: Int64[np.ndarray, " U"] = load_rows(self.place, header)
        spec = self.spec("")
        self.dtype, self.row_width, self._row_bytes = spec.dtype, math.prod(spec.inner), spec.row_bytes

    @property
    def directory(self) -> Path:
        """The local folder of the store.

        Raises:
            StoreError: it is behind a URL.
        """
        return local(self.place, "this")

    @cached_property
    def plan(self) -> StorePlan:
        """Where every utterance lies."""
        return plan_rows(self.rows, self.grid.shard_rows)

    @cached_property
    def ids(self) -> list[str]:
        """Utterance ids, in order."""
        return load_ids(self.place, len(self.rows))

    def tables(self, array: str) -> Tables:
        """What the codec was fitted with for this layer; empty for codecs that need nothing."""
        return read_tables(self.place, self.spec(array))

    @cached_property
    def index(self) -> dict[str, int]:
        """Number of each utterance id."""
        index = {name: u for u, name in enumerate(self.ids)}
        if len(index) < len(self.ids):
            raise StoreError(f"{self.place / 'ids'} has an id twice; it is damaged: delete the store and extract again")
        return index

    def spec(self, array: str) -> ArraySpec:
        """What an array of this store is."""
        return ArraySpec(array, self.width, self.codec)

    def _number(self, utterance: int | str) -> int:
        if isinstance(utterance, str):
            try:
                return self.index[utterance]
            except KeyError:
                raise StoreError(
                    f"{self.place} has no utterance {utterance!r}; it was made from another manifest"
                ) from None
        return utterance

    def read(self, array: str, utterance: int | str, span: FrameSpan | None = None) -> Shaped[np.ndarray, "T ..."]:
        """Rows of one utterance as stored: (T, W), or (S,) of a wave; all of it, or the frames of `span`."""
        u = self._number(utterance)
        rows = slice(0, int(self.rows[u])) if span is None else (span.samples if self.width is None else span.rows)
        held, shard, row = self._entries.take([u], axis=1)
        begin, count = np.array([rows.start]), np.array([rows.stop - rows.start])
        self._check_spans(np.array([u]), begin, count, held)
        self._shards.open([array], shard)  # a shard that is not there has no rows to make place for
        out = _room(self.place, (rows.stop - rows.start, *self.spec(array).inner), self.dtype)
        self._shards.gather([array], shard, row + begin, count, out.ctypes.data, (out.nbytes, 0), self._checks())
        return out

    def read_batch(
        self,
        utterances: Sequence[int | str],
        arrays: Sequence[str],
        spans: Sequence[FrameSpan] | None = None,
        out: Shaped[np.ndarray, "B L T W"] | None = None,
    ) -> tuple[Shaped[np.ndarray, "B L T W"], Int64[np.ndarray, " B"]]:
        """Many utterances of many layers in one call.

        Returns:
            (B, L, T, W) as stored (`cache.codecs` says what a row is), with zeros after the end of each utterance, and the
            (B,) frame counts. `out` is used where it is given: a reused buffer saves its page faults. Its T may be larger
            than the longest utterance.
        """
        numbers = [self._number(u) for u in utterances]
        if out is None:
            longest = int(self.rows[numbers].max()) if spans is None else max(s.count for s in spans)
            self._shards.open(arrays, self._entries[1].take(numbers))
            out = _room(self.place, (len(numbers), len(arrays), longest, self.row_width), self.dtype)
        counts = self.read_into(numbers, arrays, out, spans)
        for b, count in enumerate(counts.tolist()):
            out[b, :, count:] = 0
        return out, counts

    def read_into(
        self,
        utterances: Sequence[int | str],
        arrays: Sequence[str],
        out: Shaped[np.ndarray, "B L T W"],
        spans: Sequence[FrameSpan] | None = None,
    ) -> Int64[np.ndarray, " B"]:
        """Like `read_batch`, and what lies in `out` after the end of each utterance stays; gives the frame counts."""
        numbers = np.array([u if isinstance(u, int) else self._number(u) for u in utterances])
        counts, shard, row = self._entries.take(numbers, axis=1)
        if spans is not None:
            begin, held, counts = np.array([s.start for s in spans]), counts, np.array([s.count for s in spans])
            self._check_spans(numbers, begin, counts, held)
            row = row + begin
        assert out.dtype == self.dtype
        assert out.shape[:2] == (len(numbers), len(arrays))
        assert out.shape[2] >= max(counts.tolist())
        assert out[0, 0].flags.c_contiguous
        assert out[0, 0].nbytes == out.shape[2] * self._row_bytes
        self._shards.gather(
            arrays, shard, row, counts, out.ctypes.data, (out.strides[0], out.strides[1]), self._checks()
        )
        return counts

    def _checks(self) -> bool:
        """Whether this call compares checksums; which ones do changes no number, so it needs no seed."""
        return random.random() < self.verify

    def _check_spans(
        self,
        utterances: Int64[np.ndarray, " B"],
        begin: Int64[np.ndarray, " B"],
        count: Int64[np.ndarray, " B"],
        held: Int64[np.ndarray, " B"],
    ) -> None:
        outside = (begin < 0) | (count < 1) | (begin + count > held)
        if outside.any():
            b = int(outside.argmax())
            raise StoreError(
                f"{self.place}: rows {begin[b]} to {begin[b] + count[b]} of {self.ids[int(utterances[b])]} were "
                f"asked for, and it has {held[b]}"
            )

    @cached_property
    def _entries(self) -> Int64[np.ndarray, "3 U"]:
        """Rows of each utterance, its shard, and its first row in there."""
        return np.stack([self.rows, *np.divmod(self.plan.start, self.grid.shard_rows)])

    @cached_property
    def _shards(self) -> LocalShards | RemoteShards:
        """What brings rows out of the files, wherever they are."""
        where = (self.spec, self.grid, self.plan)
        return (
            RemoteShards(self.place, *where)
            if isinstance(self.place, RemotePath)
            else LocalShards(self.directory, *where)
        )

    def close(self) -> None:
        """Close the shards that are open."""
        if "_shards" in self.__dict__:
            self._shards.close()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.place, tuple(self.arrays), self.verify)


def _room(store: PurePath, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Shaped[np.ndarray, "..."]:
    try:
        return np.empty(shape, dtype=dtype)
    except (MemoryError, ValueError):  # ValueError: more than an array may have
        size = math.prod(shape) * dtype.itemsize
        raise StoreError(
            f"{store}: these rows take {size / 1e9:,.1f} GB, more than there is memory; read spans"
        ) from None
