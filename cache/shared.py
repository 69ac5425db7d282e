"""A number of bytes in, memory that several processes see out: without a name, so that nothing can leak.

A named block in /dev/shm outlives a killed process, and in a container /dev/shm often ends at 64 MiB, which a process
learns by SIGBUS. A memfd has no name, does not count towards /dev/shm, and is gone with the last process that holds it.
Its pages are reserved before the first of them is touched.
"""

import mmap
import os
import tempfile
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from cache.errors import ResourceError

# Page tables are made at once: a fault per page would fall into the first pass over each slot.
_FLAGS = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)


def make_shared(size: int, what: str, remedy: str) -> int:
    """Reserve `size` bytes of memory; gives a file handle that children inherit and everyone maps.

    Args:
        size: bytes.
        what: what needs it, for the message.
        remedy: what a person can set to need less.

    Raises:
        ResourceError: the machine, or the container's limit, does not have so much.
    """
    available = available_bytes()
    if available is not None and size > available:
        raise ResourceError(
            f"{what} needs {size / 1e9:.2f} GB of memory and {available / 1e9:.2f} GB are available; {remedy}"
        )
    if hasattr(os, "memfd_create"):
        handle = os.memfd_create("decant", os.MFD_CLOEXEC)
    else:  # not Linux: a file that has lost its name already
        with tempfile.TemporaryFile() as file:
            handle = os.dup(file.fileno())
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle, 0, size)  # now, by name, and not later, by SIGBUS
        else:
            os.truncate(handle, size)
    except OSError as error:
        os.close(handle)
        raise ResourceError(f"{what} needs {size / 1e9:.2f} GB of shared memory: {error.strerror}; {remedy}") from error
    return handle


def map_shared(handle: int, size: int) -> UInt8[np.ndarray, " N"]:
    """The bytes of `make_shared` as an array; they stay mapped as long as the array or a view of it lives."""
    return np.frombuffer(mmap.mmap(handle, size, flags=_FLAGS), dtype=np.uint8)


def available_bytes(root: Path = Path("/")) -> int | None:
    """Memory that can be had without swapping: the machine's, or the container's whole limit where that is less.

    None where the system does not say (only Linux does).
    """
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
    except FileNotFoundError:
        return None
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    limit = root / "sys/fs/cgroup/memory.max"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        available = int(text) if available is None else min(available, int(text))
    return available
