"""The ragged store: a folder of sharded Zarr arrays in, the rows of any utterances out.

A store is a Zarr v3 group. Each of its arrays ("layer-04", "wave") holds the rows of all utterances one after another,
cut into the same shards; the columns `start`, `rows`, `ids` and `id_end` say where each utterance lies. Reading one
utterance of one array is one `preadv` into the caller's buffer: each shard's index is read once, and the checksums
between the chunks are stepped over, or compared if `verify` is set.
"""

import math
import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt64

from cache.codecs import Tables
from cache.errors import StoreError
from cache.frames import FrameSpan
from cache.header import FORMAT as FORMAT
from cache.header import load_ids, load_rows, read_header
from cache.plan import StorePlan, plan_rows
from cache.scatter import Reads, read_checked, read_rows
from cache.tables import read_tables
from cache.zarrshard import (
    CRC_BYTES,
    ArraySpec,
    Grid,
    decode_index,
    shard_bytes,
    shard_path,
)

MAX_OPEN_SHARDS = 512  # file handles a reader keeps from one call to the next


def layer_name(layer: int) -> str:
    """Name of the array that holds one layer: layer 0 is the input of the first block."""
    return f"layer-{layer:02d}"


def layer_of(name: str) -> int:
    """The layer an array's name stands for."""
    return int(name.removeprefix("layer-"))


class Store:
    """A store on disk, read-only: what utterances it has and the rows of each.

    Safe to use after a fork (reads carry their own offset); pickling sends the path alone. One thread at a time: closing
    the oldest of very many open shards must not meet a read, so give each thread a store of its own.
    """

    def __init__(self, directory: Path, arrays: Sequence[str] = (), verify: bool = False) -> None:
        """Open without checking the shards: `cache.receipts` opens against a receipt.

        Args:
            directory: the folder of the store.
            arrays: names of the arrays that were asked for.
            verify: compare the checksum of every chunk that is read.
        """
        self.directory = Path(directory)
        self.verify = verify
        header = read_header(self.directory)
        self.kind: str = header["kind"]
        self.key: str = header["key"]
        self.fingerprint: dict[str, Any] = header["fingerprint"]
        self.codec: str = header["codec"]
        self.width: int | None = header["width"]
        self.grid = Grid(header["chunk_rows"], header["shard_rows"])
        self.arrays = {name: ArraySpec(name, self.width, self.codec) for name in arrays}
        self.rows: Int64[np.ndarray, " U"] = load_rows(self.directory, header)
        spec = self.spec("")
        self.dtype, self.row_width, self._row_bytes = spec.dtype, math.prod(spec.inner), spec.row_bytes
        self._open: dict[tuple[str, int], int] = {}  # (array, shard) -> handle, oldest first
        self._tables: dict[str, Int64[np.ndarray, "2 N"]] = {}

    @cached_property
    def plan(self) -> StorePlan:
        """Where every utterance lies."""
        return plan_rows(self.rows, self.grid.shard_rows)

    @cached_property
    def ids(self) -> list[str]:
        """Utterance ids, in order."""
        return load_ids(self.directory, len(self.rows))

    def tables(self, array: str) -> Tables:
        """What the codec was fitted with for this layer; empty for codecs that need nothing."""
        return read_tables(self.directory, self.spec(array))

    @cached_property
    def index(self) -> dict[str, int]:
        """Number of each utterance id."""
        index = {name: u for u, name in enumerate(self.ids)}
        if len(index) < len(self.ids):
            raise StoreError(
                f"{self.directory / 'ids'} has an id twice; it is damaged: delete the store and extract again"
            )
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
                    f"{self.directory} has no utterance {utterance!r}; it was made from another manifest"
                ) from None
        return utterance

    def read(self, array: str, utterance: int | str, span: FrameSpan | None = None) -> Shaped[np.ndarray, "T ..."]:
        """Rows of one utterance as stored: (T, W), or (S,) of a wave; all of it, or the frames of `span`."""
        u = self._number(utterance)
        rows = slice(0, int(self.rows[u])) if span is None else (span.samples if self.width is None else span.rows)
        held, shard, row = self._entries.take([u], axis=1)
        begin, count = np.array([rows.start]), np.array([rows.stop - rows.start])
        self._check_spans(np.array([u]), begin, count, held)
        self._opened([array], shard)  # a shard that is not there has no rows to make place for
        out = _place(self.directory, (rows.stop - rows.start, *self.spec(array).inner), self.dtype)
        self._gather([array], shard, row + begin, count, out.ctypes.data, (out.nbytes, 0))
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
            self._opened(arrays, self._entries[1].take(numbers))
            out = _place(self.directory, (len(numbers), len(arrays), longest, self.row_width), self.dtype)
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
        self._gather(arrays, shard, row, counts, out.ctypes.data, (out.strides[0], out.strides[1]))
        return counts

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
                f"{self.directory}: rows {begin[b]} to {begin[b] + count[b]} of {self.ids[int(utterances[b])]} were "
                f"asked for, and it has {held[b]}"
            )

    def _gather(
        self,
        arrays: Sequence[str],
        shard: Int64[np.ndarray, " B"],
        row: Int64[np.ndarray, " B"],
        count: Int64[np.ndarray, " B"],
        address: int,
        strides: tuple[int, int],
    ) -> None:
        """Copy `count` rows from `row` of `shard` on of each array, to B x L places in memory.

        Few numpy calls on purpose: after a batch went through the processor's caches each costs 10 to 30 microseconds,
        and a whole batch of a hundred megabytes takes five milliseconds.
        """
        L = len(arrays)
        opened = self._opened(arrays, shard)
        # layer after layer of one utterance, as they lie in memory: in the other order the copy itself takes 10 % longer
        reads = Reads(
            handles=opened[::2].T.ravel().tolist(),
            first_chunk=opened[1::2].T.ravel(),
            row=row.repeat(L),
            num_rows=count.repeat(L),
            target=(address + strides[0] * np.arange(len(shard))[:, None] + strides[1] * np.arange(L)).ravel(),
        )
        read = read_checked if self.verify else read_rows
        for number, chunk in read(reads, self.grid.chunk_rows, self._row_bytes).items():
            where = shard_path(self.directory, self.spec(arrays[number % L]), int(shard[number // L]))
            what = "it is cut short" if chunk is None else f"chunk {chunk} is damaged (its checksum differs)"
            raise StoreError(f"{where}: {what}; extract again to replace the shard")
        while len(self._open) > MAX_OPEN_SHARDS:  # oldest first; never in the middle of a batch
            self._close_shard(next(iter(self._open)))

    def _opened(self, arrays: Sequence[str], shard: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, "N B"]:
        """Handle and first chunk of each shard, for one array after the other; opens those that are not."""
        opened = np.concatenate([self._shards(array).take(shard, axis=1) for array in arrays])
        if opened[::2].min() < 0:
            for a, b in np.argwhere(opened[::2] < 0).tolist():
                opened[2 * a : 2 * a + 2, b] = self._open_shard(arrays[a], int(shard[b]))
        return opened

    @cached_property
    def _entries(self) -> Int64[np.ndarray, "3 U"]:
        """Rows of each utterance, its shard, and its first row in there."""
        return np.stack([self.rows, *np.divmod(self.plan.start, self.grid.shard_rows)])

    def _shards(self, array: str) -> Int64[np.ndarray, "2 N"]:
        """Handle of each shard of an array and the offset of its first chunk; -1 where it is not open."""
        if array not in self._tables:
            self._tables[array] = np.full((2, self.plan.num_shards), -1, dtype=np.int64)
        return self._tables[array]

    def _open_shard(self, array: str, shard: int) -> tuple[int, int]:
        """Open one shard and check its index, once."""
        if (array, shard) in self._open:
            handle, at = self._shards(array)[:, shard].tolist()
            return handle, at
        spec = self.spec(array)
        path = shard_path(self.directory, spec, shard)
        size = 16 * self.grid.chunks + CRC_BYTES
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing; extract again to replace the shard") from None
        end = os.fstat(handle).st_size
        data = os.pread(handle, size, max(0, end - size))
        used = self.plan.used_rows(shard)
        try:
            at = first_chunk(decode_index(data, self.grid, path), used, spec, self.grid, path)
            if not 0 <= at <= end - shard_bytes(used, spec, self.grid):
                raise StoreError(f"{path}: its chunks do not lie within its {end:,} bytes; extract again")
        except StoreError:
            os.close(handle)
            raise
        self._shards(array)[:, shard] = handle, at
        self._open[array, shard] = handle
        return handle, at

    def _close_shard(self, place: tuple[str, int]) -> None:
        self._tables[place[0]][:, place[1]] = -1
        os.close(self._open.pop(place))

    def close(self) -> None:
        """Close the shards that are open."""
        while self._open:
            self._close_shard(next(iter(self._open)))

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.directory, tuple(self.arrays), self.verify)


def _place(store: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Shaped[np.ndarray, "..."]:
    try:
        return np.empty(shape, dtype=dtype)
    except (MemoryError, ValueError):  # ValueError: more than an array may have
        size = math.prod(shape) * dtype.itemsize
        raise StoreError(
            f"{store}: these rows take {size / 1e9:,.1f} GB, more than there is memory; read spans"
        ) from None


def first_chunk(index: UInt64[np.ndarray, "N 2"], rows: int, spec: ArraySpec, grid: Grid, where: Path) -> int:
    """Offset of the first chunk of a shard whose chunks lie in order without gaps, which format 1 demands.

    Raises:
        StoreError: a chunk is absent or lies elsewhere.
    """
    used = index[: -(-rows // grid.chunk_rows)].astype(np.int64)
    stride = grid.chunk_rows * spec.row_bytes + CRC_BYTES
    if (used[:, 1] != stride).any() or (np.diff(used[:, 0]) != stride).any():
        raise StoreError(f"{where}: its chunks are not laid in order (written by another program?); extract again")
    return int(used[0, 0])
