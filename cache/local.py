"""The shards of a store in local files in, rows copied into the caller's memory out: each file opened and checked once.

A run of rows is one `preadv`: the chunks of a shard lie in order, and `cache.scatter` steps over the checksums between
them, or compares them.
"""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt64

from cache.errors import StoreError
from cache.plan import StorePlan
from cache.scatter import Reads, read_checked, read_rows
from cache.zarrshard import CRC_BYTES, ArraySpec, Grid, decode_index, shard_bytes, shard_path

MAX_OPEN_SHARDS = 512  # file handles a reader keeps from one call to the next


class LocalShards:
    """The shards of every array of one store, opened when they are first needed."""

    def __init__(self, directory: Path, spec: Callable[[str], ArraySpec], grid: Grid, plan: StorePlan) -> None:
        self.directory, self.spec, self.grid, self.plan = directory, spec, grid, plan
        self._row_bytes = spec("").row_bytes
        self._open: dict[tuple[str, int], int] = {}  # (array, shard) -> handle, oldest first
        self._tables: dict[str, Int64[np.ndarray, "2 N"]] = {}

    def gather(
        self,
        arrays: Sequence[str],
        shard: Int64[np.ndarray, " B"],
        row: Int64[np.ndarray, " B"],
        count: Int64[np.ndarray, " B"],
        address: int,
        strides: tuple[int, int],
        verify: bool,
    ) -> None:
        """Copy `count` rows from `row` of `shard` on of each array, to B x L places in memory.

        Few numpy calls on purpose: after a batch went through the processor's caches each costs 10 to 30 microseconds,
        and a whole batch of a hundred megabytes takes five milliseconds.
        """
        L = len(arrays)
        opened = self.open(arrays, shard)
        # layer after layer of one utterance, as they lie in memory: in the other order the copy itself takes 10 % longer
        reads = Reads(
            handles=opened[::2].T.ravel().tolist(),
            first_chunk=opened[1::2].T.ravel(),
            row=row.repeat(L),
            num_rows=count.repeat(L),
            target=(address + strides[0] * np.arange(len(shard))[:, None] + strides[1] * np.arange(L)).ravel(),
        )
        read = read_checked if verify else read_rows
        for number, chunk in read(reads, self.grid.chunk_rows, self._row_bytes).items():
            where = shard_path(self.directory, self.spec(arrays[number % L]), int(shard[number // L]))
            what = "it is cut short" if chunk is None else f"chunk {chunk} is damaged (its checksum differs)"
            raise StoreError(f"{where}: {what}; extract again to replace the shard")
        while len(self._open) > MAX_OPEN_SHARDS:  # oldest first; never in the middle of a batch
            self._close_shard(next(iter(self._open)))

    def open(self, arrays: Sequence[str], shard: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, "N B"]:
        """Handle and first chunk of each shard, for one array after the other; opens those that are not.

        Raises:
            StoreError: a shard is missing, or its index is not one of format 1.
        """
        opened = np.concatenate([self._shards(array).take(shard, axis=1) for array in arrays])
        if opened[::2].min() < 0:
            for a, b in np.argwhere(opened[::2] < 0).tolist():
                opened[2 * a : 2 * a + 2, b] = self._open_shard(arrays[a], int(shard[b]))
        return opened

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
        size = index_bytes(self.grid)
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing; extract again to replace the shard") from None
        end = os.fstat(handle).st_size
        data = os.pread(handle, size, max(0, end - size))
        try:
            at = check_index(data, end, self.plan.used_rows(shard), spec, self.grid, path)
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


def index_bytes(grid: Grid) -> int:
    """Bytes of the index at the end of a shard."""
    return 16 * grid.chunks + CRC_BYTES


def check_index(data: bytes, end: int, rows: int, spec: ArraySpec, grid: Grid, where: object) -> int:
    """Offset of the first chunk of a shard of `end` bytes, out of its index.

    Raises:
        StoreError: the index is damaged, or says what format 1 does not allow.
    """
    at = first_chunk(decode_index(data, grid, where), rows, spec, grid, where)
    if not 0 <= at <= end - shard_bytes(rows, spec, grid):
        raise StoreError(f"{where}: its chunks do not lie within its {end:,} bytes; extract again")
    return at


def first_chunk(index: UInt64[np.ndarray, "N 2"], rows: int, spec: ArraySpec, grid: Grid, where: object) -> int:
    """Offset of the first chunk of a shard whose chunks lie in order without gaps, which format 1 demands.

    Raises:
        StoreError: a chunk is absent or lies elsewhere.
    """
    used = index[: -(-rows // grid.chunk_rows)].astype(np.int64)
    stride = grid.chunk_rows * spec.row_bytes + CRC_BYTES
    if (used[:, 1] != stride).any() or (np.diff(used[:, 0]) != stride).any():
        raise StoreError(f"{where}: its chunks are not laid in order (written by another program?); extract again")
    return int(used[0, 0])
