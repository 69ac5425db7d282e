"""The shards of a store in local files in, rows copied into the caller's memory out: each file opened and checked once.

A run of rows is one `preadv`: the chunks of a shard lie in order, and `cache.scatter` steps over the checksums between
them, or compares them.
"""

import errno
import os
import resource
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt64

from cache.errors import ResourceError, StoreError
from cache.plan import StorePlan
from cache.scatter import Reads, read_checked, read_rows
from cache.zarrshard import CRC_BYTES, ArraySpec, Grid, decode_index, shard_bytes, shard_path

MAX_OPEN_SHARDS = 4096  # file handles that the stores of a process keep from one call to the next, where it may

_held: set[int] = set()  # the handles of every store of this process; each closes only its own: a thread may be reading


class LocalShards:
    """The shards of every array of one store, opened when they are first needed."""

    def __init__(self, directory: Path, spec: Callable[[str], ArraySpec], grid: Grid, plan: StorePlan) -> None:
        self.directory, self.grid, self.plan = directory, grid, plan
        self._any = spec("")  # `spec` itself would keep its store, and so these files open, until garbage is collected
        self._row_bytes = self._any.row_bytes
        self._open: dict[tuple[str, int], int] = {}  # (array, shard) -> handle, oldest first
        self._tables: dict[str, Int64[np.ndarray, "2 N"]] = {}
        self._grown = False  # whether shards were opened since the oldest were last closed

    def spec(self, array: str) -> ArraySpec:
        """What an array of this store is."""
        return replace(self._any, name=array)

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

        Raises:
            StoreError: a shard is missing or damaged.
            ResourceError: this process may not open one file more.
        """
        L = len(arrays)
        try:
            opened = self._opened(arrays, shard)
        except ResourceError as error:
            for a, b in _halves(L, len(shard), error):
                at = address + b.start * strides[0] + a.start * strides[1]
                self.gather(arrays[a], shard[b], row[b], count[b], at, strides, verify)
            return
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
        if self._grown:
            self._close_oldest()

    def open(self, arrays: Sequence[str], shard: Int64[np.ndarray, " B"]) -> None:
        """Open the shards that are not, and check their indexes.

        Raises:
            StoreError: a shard is missing, or its index is not one of format 1.
            ResourceError: this process may not open one file more.
        """
        try:
            self._opened(arrays, shard)
        except ResourceError as error:
            for a, b in _halves(len(arrays), len(shard), error):
                self.open(arrays[a], shard[b])

    def _opened(self, arrays: Sequence[str], shard: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, "N B"]:
        """Handle and first chunk of each shard, for one array after the other.

        Raises:
            StoreError: a shard is missing, or its index is not one of format 1.
            ResourceError: so many files cannot be open at once; of this store only these still are.
        """
        opened = np.concatenate([self._shards(array).take(shard, axis=1) for array in arrays])
        if opened[::2].min() < 0:
            for a, b in np.argwhere(opened[::2] < 0).tolist():
                try:
                    opened[2 * a : 2 * a + 2, b] = self._open_shard(arrays[a], int(shard[b]))
                except ResourceError:
                    self._close_others(arrays, shard)
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
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
            raise ResourceError(
                f"{path} cannot be opened: this process has as many files open as it may ({limit}), {len(_held)} of them "
                f"shards; allow it more with `ulimit -n {4 * limit}`"
            ) from None
        end = os.fstat(handle).st_size
        data = os.pread(handle, size, max(0, end - size))
        try:
            at = check_index(data, end, self.plan.used_rows(shard), spec, self.grid, path)
        except StoreError:
            os.close(handle)
            raise
        self._shards(array)[:, shard] = handle, at
        self._open[array, shard] = handle
        _held.add(handle)
        self._grown = True
        return handle, at

    def _close_oldest(self) -> None:
        """Keep half of what the other stores leave: the next store finds room, and all come to the same share.

        Only between batches. A quarter of the files that the process may open is left to everything else.
        """
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        most = MAX_OPEN_SHARDS if limit == resource.RLIM_INFINITY else min(MAX_OPEN_SHARDS, limit * 3 // 4)
        keep = max(0, (most - (len(_held) - len(self._open))) // 2)
        while len(self._open) > keep:
            self._close_shard(next(iter(self._open)))
        self._grown = False

    def _close_others(self, arrays: Sequence[str], shard: Int64[np.ndarray, " B"]) -> None:
        """Close all shards but these."""
        wanted = {(array, s) for array in arrays for s in shard.tolist()}
        for place in [place for place in self._open if place not in wanted]:
            self._close_shard(place)

    def _close_shard(self, place: tuple[str, int]) -> None:
        self._tables[place[0]][:, place[1]] = -1
        handle = self._open.pop(place)
        _held.discard(handle)  # first: once it is closed, another thread may get the same number
        os.close(handle)

    def close(self) -> None:
        """Close the shards that are open."""
        while self._open:
            self._close_shard(next(iter(self._open)))


def _halves(L: int, B: int, error: ResourceError) -> list[tuple[slice, slice]]:
    """A batch whose files cannot all be open at once as two, each some arrays of some utterances.

    Raises:
        ResourceError: it is a single one.
    """
    if B > 1:
        return [(slice(0, L), slice(0, B // 2)), (slice(0, L), slice(B // 2, B))]
    if L > 1:
        return [(slice(0, L // 2), slice(0, B)), (slice(L // 2, L), slice(0, B))]
    raise error


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
