"""Places in files and in memory in, the bytes moved there out: many `preadv` calls without Python between them.

A batch is some hundred reads of half a megabyte, each cut by checksums into a dozen pieces. Building those pieces as Python
objects costs as much as the copy, so they are computed as arrays and handed to the C library's `preadv` as they are.
"""

import ctypes
import errno
import os
from typing import NamedTuple

import google_crc32c
import numpy as np
from jaxtyping import Int64

from cache.zarrshard import CRC_BYTES, crc32c

MAX_VECTORS = 1024  # pieces per preadv: IOV_MAX of Linux
WHOLE = google_crc32c.value(b"\0" + crc32c(b"\0"))  # CRC-32C of anything followed by its own CRC-32C

_libc = ctypes.CDLL(None, use_errno=True)
_pread, _preadv, _memmove = _libc.pread, _libc.preadv, _libc.memmove
_preadv2 = getattr(_libc, "preadv2", None)  # Linux: a `preadv` that can be told not to wait for the disk
_pread.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int64]
_preadv.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64]
_memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
if _preadv2 is not None:
    _preadv2.argtypes = [*_preadv.argtypes, ctypes.c_int]
    _preadv2.restype = ctypes.c_ssize_t
_pread.restype = _preadv.restype = ctypes.c_ssize_t
_memmove.restype = None
RWF_NOWAIT = 8
GO_ON = (errno.EINTR, errno.EAGAIN, errno.EOPNOTSUPP)  # a signal; not in memory; a file system that always waits

_skip = np.zeros(CRC_BYTES, dtype=np.uint8)  # where checksums go that nobody looks at; never read


class Reads(NamedTuple):
    """R reads of whole rows out of shards whose chunks lie in order."""

    handles: list[int]
    """Open file of each read."""
    first_chunk: Int64[np.ndarray, " R"]
    """File offset of chunk 0 of the shard that each read is in."""
    row: Int64[np.ndarray, " R"]
    """First row, counted inside the shard."""
    num_rows: Int64[np.ndarray, " R"]
    """Rows, at least one."""
    target: Int64[np.ndarray, " R"]
    """Address the rows go to."""


def read_rows(reads: Reads, chunk_rows: int, row_bytes: int) -> dict[int, int | None]:
    """Bring every read's rows to its address.

    Each read is tried without waiting. At the first that is not in memory the kernel is told of all that are still to
    come, so the disk has many requests and not one piece of one file at a time; told of bytes that it has, it would
    look for every page of them, which costs more than copying.

    Returns:
        number of each read whose file ended too early -> None.

    Raises:
        OSError: the kernel refuses a read.
    """
    stride = chunk_rows * row_bytes + CRC_BYTES
    chunk, inside = np.divmod(reads.row, chunk_rows)
    offset = reads.first_chunk + chunk * stride + inside * row_bytes
    pieces = (inside + reads.num_rows - 1) // chunk_rows + 1  # chunks each read touches
    ends = np.cumsum(pieces)
    starts = ends - pieces
    # piece p of a read is rows [p chunk_rows - inside, (p + 1) chunk_rows - inside) of it, cut at its ends
    begin = (np.arange(int(ends[-1])) - np.repeat(starts, pieces)) * chunk_rows - np.repeat(inside, pieces)
    begin[starts] = 0
    vectors = np.empty((len(begin), 2, 2), dtype=np.int64)  # each piece, and the checksum after it
    vectors[:, 0, 0] = np.repeat(reads.target, pieces) + begin * row_bytes
    vectors[:-1, 0, 1] = vectors[1:, 0, 0] - vectors[:-1, 0, 0]
    vectors[ends - 1, 0, 1] = reads.target + reads.num_rows * row_bytes - vectors[ends - 1, 0, 0]
    vectors[:, 1] = _skip.ctypes.data, CRC_BYTES
    wanted = reads.num_rows * row_bytes + (pieces - 1) * CRC_BYTES
    lists = (offset.tolist(), (2 * starts).tolist(), (2 * ends - 1).tolist(), wanted.tolist())
    flat = vectors.reshape(-1, 2)
    failed: dict[int, int | None] = {}
    base = flat.ctypes.data
    told = False
    for number, (handle, at, start, end, size) in enumerate(zip(reads.handles, *lists, strict=True)):
        num = end - start if end - start < MAX_VECTORS else MAX_VECTORS
        if told or _preadv2 is None:
            got = _preadv(handle, base + 16 * start, num, at)
        else:
            got = _preadv2(handle, base + 16 * start, num, at, RWF_NOWAIT)
            if got != size:
                told = True
                _tell(got, reads.handles[number:], lists[0][number:], lists[3][number:])
                if got == 0:  # not yet the end: Linux 5.9 and 5.10 say so of what is not in memory, too (preadv2(2))
                    got = _preadv(handle, base + 16 * start, num, at)
        if got != size and not _finish(handle, flat[start:end], at, size, got):
            failed[number] = None
    return failed


def _tell(got: int, handles: list[int], offsets: list[int], sizes: list[int]) -> None:
    """Have the kernel bring stretches of files into memory, all at once, without waiting for any.

    Not where a read that must not wait failed for another reason (`got` is what it gave): a file system that cannot do
    without waiting says so of bytes that are in memory, too.
    """
    error = ctypes.get_errno()
    if got >= 0 or error == errno.EAGAIN:
        for stretch in zip(handles, offsets, sizes, strict=True):
            os.posix_fadvise(*stretch, os.POSIX_FADV_WILLNEED)
    ctypes.set_errno(error)


class Memory:
    """Bytes at an address, for `np.asarray`; read-only where google_crc32c looks: it takes nothing that could change."""

    def __init__(self, address: int, size: int, writable: bool = False) -> None:
        self.__array_interface__ = {"data": (address, not writable), "shape": (size,), "typestr": "|u1", "version": 3}


def read_checked(reads: Reads, chunk_rows: int, row_bytes: int) -> dict[int, int | None]:
    """Like `read_rows`, and compare the checksums of all chunks that rows come from.

    Chunk by chunk, so that it is still in the processor's cache when its checksum is computed, which is twice as fast
    as doing so later. A chunk of which not all rows are wanted goes through a scratch buffer; the others go where they
    belong, and their checksum where the next chunk will lie over it.

    Returns:
        number of each read whose file ended too early -> None, or -> number of its first damaged chunk.

    Raises:
        OSError: the kernel refuses a read.
    """
    chunk_bytes = chunk_rows * row_bytes
    stride = chunk_bytes + CRC_BYTES
    scratch = np.empty(stride, dtype=np.uint8)
    aside = scratch.ctypes.data
    scratch.flags.writeable = False
    base = int(reads.target.min())
    memory = np.asarray(Memory(base, int((reads.target + reads.num_rows * row_bytes).max()) - base))
    value = google_crc32c.value
    first, inside = np.divmod(reads.row, chunk_rows)
    offset = reads.first_chunk + first * stride
    reach = ((inside + reads.num_rows - 1) // chunk_rows + 1) * stride  # bytes of the chunks each read touches
    one = np.array([[aside, 1]])  # room for a byte: is it in memory?
    told = False
    failed: dict[int, int | None] = {}
    for number, (handle, at, skip, target, size) in enumerate(
        zip(
            reads.handles,
            offset.tolist(),
            (inside * row_bytes).tolist(),  # bytes of the first chunk before the rows
            reads.target.tolist(),
            (reads.num_rows * row_bytes).tolist(),
            strict=True,
        )
    ):
        end, here, start = target + size, target, at
        if not told and _preadv2 is not None:
            got = _preadv2(handle, one.ctypes.data, 1, at, RWF_NOWAIT)
            if got != 1:
                told = True
                _tell(got, reads.handles[number:], offset.tolist()[number:], reach.tolist()[number:])
        while here < end:
            if not skip and here + stride <= end:
                place, view = here, memory[here - base : here - base + stride]
            else:
                place, view = aside, scratch
            got = _pread(handle, place, stride, at)
            if got != stride and not _finish(handle, np.array([[place, stride]]), at, stride, got):
                failed[number] = None
                break
            if value(view) != WHOLE:
                failed[number] = int(first[number]) + (at - start) // stride
                break
            num = min(chunk_bytes - skip, end - here)
            if place == aside:
                _memmove(here, aside + skip, num)
            here, at, skip = here + num, at + stride, 0
    return failed


def _finish(handle: int, vectors: Int64[np.ndarray, "N 2"], offset: int, wanted: int, got: int) -> bool:
    """Go on after a read that stopped early: a signal, more than 1024 pieces, or the end of the file (then False)."""
    rest = vectors.copy()
    done = 0
    while True:
        if got < 0:
            number = ctypes.get_errno()
            if number not in GO_ON:
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
            rest[0] += got, -got
        got = _preadv(handle, rest.ctypes.data, min(len(rest), MAX_VECTORS), offset + done)


def start_flush(handle: int, offset: int, size: int) -> None:
    """Let the disk start on some written bytes, without waiting: a hint, which only Linux knows."""
    if hasattr(_libc, "sync_file_range"):
        _libc.sync_file_range(ctypes.c_int(handle), ctypes.c_int64(offset), ctypes.c_int64(size), 2)  # ..._WRITE
