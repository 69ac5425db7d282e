"""The shards of a store behind a URL in, rows copied into the caller's memory out: all ranges of a batch at once.

A range is a whole utterance of a layer, and neighbours in a shard share one. Each shard's index is read once, at the
place that follows from the plan, so a store of any number of shards opens without a request for any of them. Checksums
are stepped over, or compared if `verify` is set, as in local files.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import google_crc32c
import numpy as np
from jaxtyping import Int64, UInt8

from cache.errors import StoreError
from cache.local import check_index, index_bytes
from cache.places import RemotePath
from cache.plan import StorePlan
from cache.ranges import Range, fetch
from cache.scatter import WHOLE, Memory
from cache.zarrshard import CRC_BYTES, ArraySpec, Grid, shard_bytes, shard_path

GAP_BYTES = 256 * 1024  # between two utterances: reading over so much costs less than a second request
JOINT_BYTES = 16 * 2**20  # of one request, unless a single utterance is longer
REMEDY = "upload the store again"


class _Piece(NamedTuple):
    """Rows of one array of one shard, and where they go."""

    array: str
    shard: int
    start: int
    """First byte in the shard's file."""
    end: int
    chunk: int
    """First chunk they lie in."""
    inside: int
    """Rows of that chunk before them."""
    rows: int
    target: int
    """Address."""


class RemoteShards:
    """The shards of every array of one store."""

    def __init__(self, place: RemotePath, spec: Callable[[str], ArraySpec], grid: Grid, plan: StorePlan) -> None:
        self.place, self.spec, self.grid, self.plan = place, spec, grid, plan
        self._row_bytes = spec("").row_bytes
        self._first: dict[str, Int64[np.ndarray, " N"]] = {}  # offset of the first chunk of each shard; -1: not known

    def open(self, arrays: Sequence[str], shard: Int64[np.ndarray, " B"]) -> Int64[np.ndarray, "L B"]:
        """Offset of the first chunk of each shard, for one array after the other; reads the indexes not read yet.

        Raises:
            StoreError: a shard is missing, or its index is not one of format 1.
        """
        for array in arrays:
            if array not in self._first:
                self._first[array] = np.full(self.plan.num_shards, -1, dtype=np.int64)
        unknown = [
            (array, s)
            for array in dict.fromkeys(arrays)
            for s in np.unique(shard).tolist()
            if self._first[array][s] < 0
        ]
        sizes = [shard_bytes(self.plan.used_rows(s), self.spec(a), self.grid) for a, s in unknown]
        ranges = [
            Range(self._url(*place), size - index_bytes(self.grid), size)
            for place, size in zip(unknown, sizes, strict=True)
        ]
        for (array, s), size, (url, *_), data in zip(unknown, sizes, ranges, self._fetch(ranges), strict=True):
            self._first[array][s] = check_index(data, size, self.plan.used_rows(s), self.spec(array), self.grid, url)
        return np.stack([self._first[array].take(shard) for array in arrays])

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
        """Copy `count` rows from `row` of `shard` on of each array, to B x L places in memory."""
        first = self.open(arrays, shard)
        pieces = [
            self._piece(
                array,
                int(shard[b]),
                int(first[a, b]),
                int(row[b]),
                int(count[b]),
                address + a * strides[1] + b * strides[0],
                verify,
            )
            for a, array in enumerate(arrays)
            for b in range(len(shard))
        ]
        joint = _join(pieces)
        ranges = [Range(self._url(p[0].array, p[0].shard), p[0].start, max(q.end for q in p)) for p in joint]
        low = min(p.target for p in pieces)
        high = max(p.target + p.rows * self._row_bytes for p in pieces)
        memory = np.asarray(Memory(low, high - low, writable=True))
        for some, (_, begin, _), data in zip(joint, ranges, self._fetch(ranges), strict=True):
            block = np.frombuffer(data, dtype=np.uint8)
            for piece in some:
                at = piece.target - low
                self._copy(
                    piece,
                    block[piece.start - begin : piece.end - begin],
                    memory[at : at + piece.rows * self._row_bytes],
                    verify,
                )

    def _piece(self, array: str, shard: int, first: int, row: int, rows: int, target: int, verify: bool) -> _Piece:
        stride = self.grid.chunk_rows * self._row_bytes + CRC_BYTES
        chunk, inside = divmod(row, self.grid.chunk_rows)
        last, end = divmod(row + rows - 1, self.grid.chunk_rows)
        if verify:  # whole chunks, each with its checksum
            span = first + chunk * stride, first + (last + 1) * stride
        else:
            span = (
                first + chunk * stride + inside * self._row_bytes,
                first + last * stride + (end + 1) * self._row_bytes,
            )
        return _Piece(array, shard, *span, chunk, inside, rows, target)

    def _copy(
        self, piece: _Piece, source: UInt8[np.ndarray, " N"], target: UInt8[np.ndarray, " M"], verify: bool
    ) -> None:
        """Chunk by chunk, without what lies between them."""
        chunk_rows, row_bytes = self.grid.chunk_rows, self._row_bytes
        stride = chunk_rows * row_bytes + CRC_BYTES
        chunk, skip, at, done = piece.chunk, piece.inside * row_bytes, 0, 0
        while done < len(target):
            num = min(chunk_rows * row_bytes - skip, len(target) - done)
            if verify:
                if google_crc32c.value(source[at : at + stride]) != WHOLE:
                    url = self._url(piece.array, piece.shard)
                    raise StoreError(f"{url}: chunk {chunk} is damaged (its checksum differs); {REMEDY}")
                target[done : done + num] = source[at + skip : at + skip + num]
                at += stride
            else:
                target[done : done + num] = source[at : at + num]
                at += num + CRC_BYTES
            chunk, skip, done = chunk + 1, 0, done + num

    def _url(self, array: str, shard: int) -> str:
        return str(shard_path(self.place, self.spec(array), shard))

    def _fetch(self, ranges: Sequence[Range]) -> list[bytes]:
        got = []
        for wanted, data in zip(ranges, fetch(ranges), strict=True):
            if data is None:
                raise StoreError(f"{wanted.url} is missing; {REMEDY}")
            got.append(data)
        return got

    def close(self) -> None:
        """Nothing is held here: connections belong to the process."""


def _join(pieces: Sequence[_Piece]) -> list[list[_Piece]]:
    """Pieces that one request brings: of one shard, with little between them."""
    joint: list[list[_Piece]] = []
    end = 0
    for piece in sorted(pieces):
        near = bool(joint) and piece[:2] == joint[-1][0][:2] and piece.start <= end + GAP_BYTES
        if near and max(end, piece.end) - joint[-1][0].start <= JOINT_BYTES:
            joint[-1].append(piece)
            end = max(end, piece.end)
        else:
            joint.append([piece])
            end = piece.end
    return joint
