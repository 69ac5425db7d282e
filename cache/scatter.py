"""Places in files and in memory in, the bytes moved there out: many `preadv` calls without Python between them.

A batch is some hundred reads of half a megabyte, each cut by checksums into a dozen pieces. Building those pieces as Python
objects costs as much as the copy, so they are computed as arrays and handed to the C library's `preadv` as they are.
"""

import ctypes
import errno
import os
import struct
from dataclasses import dataclass

import google_crc32c
import numpy as np
from jaxtyping import Int64, UInt64

from cache.zarrshard import CRC_BYTES

MAX_VECTORS = 1024  # pieces per preadv: IOV_MAX of Linux

_preadv = ctypes.CDLL(None, use_errno=True).preadv
_preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_preadv.restype = ctypes.c_ssize_t
_skip = np.zeros(CRC_BYTES, dtype=np.uint8)  # where checksums go that nobody looks at; never read


@dataclass(frozen=True, eq=False)
class Reads:
    """R reads of whole rows out of shards whose chunks lie in order."""

    handles: list[int]
    """Open file of each read."""
    first_chunk: Int64[np.ndarray, " R"]
    """File offset of chunk 0 of the shard that each read is in."""
    row: Int64[np.ndarray, " R"]
    """First row, counted inside the shard."""
    count: Int64[np.ndarray, " R"]
    """Rows, at least one."""
    target: Int64[np.ndarray, " R"]
    """Address the rows go to."""


def read_rows(reads: Reads, chunk_rows: int, row_bytes: int) -> list[int]:
    """Bring every read's rows to its address.

    Returns:
        the numbers of the reads whose file ended too early.

    Raises:
        OSError: the kernel refuses a read.
    """
    stride = chunk_rows * row_bytes + CRC_BYTES
    chunk, inside = np.divmod(reads.row, chunk_rows)
    offset = reads.first_chunk + chunk * stride + inside * row_bytes
    pieces = (inside + reads.count - 1) // chunk_rows + 1  # chunks each read touches
    ends = np.cumsum(2 * pieces - 1)  # between two pieces of rows lies one checksum
    vectors = np.zeros((int(ends[-1]), 2), dtype=np.uint64)
    read = np.repeat(np.arange(len(pieces)), 2 * pieces - 1)
    place = np.arange(len(read)) - np.repeat(ends - (2 * pieces - 1), 2 * pieces - 1)
    # rows [begin, end) of the read lie in piece p: the first piece starts inside its chunk
    piece = place // 2
    begin = np.maximum(piece * chunk_rows - inside[read], 0)
    end = np.minimum((piece + 1) * chunk_rows - inside[read], reads.count[read])
    rows = place % 2 == 0
    vectors[:, 0] = np.where(rows, reads.target[read] + begin * row_bytes, _skip.ctypes.data)
    vectors[:, 1] = np.where(rows, (end - begin) * row_bytes, CRC_BYTES)
    wanted = (reads.count * row_bytes + (pieces - 1) * CRC_BYTES).tolist()
    return _run(reads.handles, offset.tolist(), vectors, ends.tolist(), wanted)


def read_checked(reads: Reads, chunk_rows: int, row_bytes: int) -> dict[int, int]:
    """Compare the checksums of all chunks that `read_rows` brought rows of, with those rows where they are now.

    Only the rest of the chunks at both ends of a read is read for it, and the checksums.

    Returns:
        read -> number of its first damaged chunk.
    """
    chunk_bytes, damaged = chunk_rows * row_bytes, {}
    for number, handle in enumerate(reads.handles):
        at, row, count = (int(x[number]) for x in (reads.first_chunk, reads.row, reads.count))
        got = np.ctypeslib.as_array((ctypes.c_uint8 * (count * row_bytes)).from_address(int(reads.target[number])))
        got.flags.writeable = False
        for chunk in range(row // chunk_rows, (row + count - 1) // chunk_rows + 1):
            start = at + chunk * (chunk_bytes + CRC_BYTES)
            lo = max(row - chunk * chunk_rows, 0) * row_bytes  # bytes of the chunk that were read: [lo, hi)
            hi = min(row + count - chunk * chunk_rows, chunk_rows) * row_bytes
            there = (chunk * chunk_rows - row) * row_bytes + lo
            crc = google_crc32c.value(os.pread(handle, lo, start)) if lo else 0
            crc = google_crc32c.extend(crc, got[there : there + hi - lo])
            tail = os.pread(handle, chunk_bytes - hi + CRC_BYTES, start + hi)
            if len(tail) > CRC_BYTES:
                crc = google_crc32c.extend(crc, tail[:-CRC_BYTES])
            if struct.pack("<I", crc) != tail[-CRC_BYTES:]:
                damaged[number] = chunk
                break
    return damaged


def _run(
    handles: list[int], offsets: list[int], vectors: UInt64[np.ndarray, "N 2"], ends: list[int], wanted: list[int]
) -> list[int]:
    base, short, first = vectors.ctypes.data, [], 0
    for number, handle in enumerate(handles):
        num = ends[number] - first
        got = _preadv(handle, base + 16 * first, min(num, MAX_VECTORS), offsets[number])
        if got != wanted[number] and not _finish(
            handle, vectors[first : first + num], offsets[number], wanted[number], got
        ):
            short.append(number)
        first += num
    return short


def _finish(handle: int, vectors: UInt64[np.ndarray, "N 2"], offset: int, wanted: int, got: int) -> bool:
    """Go on after a read that stopped early: a signal, more than 1024 pieces, or the end of the file (then False)."""
    rest = vectors.copy()
    done = 0
    while True:
        if got < 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))
        elif got == 0:
            return False
        else:
            done += got
            while len(rest) and got >= rest[0, 1]:
                got -= int(rest[0, 1])
                rest = rest[1:]
            if done == wanted:
                return True
            rest[0, 0] += np.uint64(got)
            rest[0, 1] -= np.uint64(got)
        got = _preadv(handle, rest.ctypes.data, min(len(rest), MAX_VECTORS), offset + done)
