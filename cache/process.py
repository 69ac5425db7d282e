"""One writer per product: locks that die with their holder, and children that die with their parent.

DVC and torchrun both leave orphans when they are killed (SIGTERM or SIGKILL); two writers in one store lose data.
"""

import ctypes
import fcntl
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.errors import ResourceError

PR_SET_PDEATHSIG = 1  # prctl(2)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold the lock file `path`; the kernel frees it when the process ends, however it ends.

    Raises:
        ResourceError: another process holds it; the message says which.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "an unknown process"
            raise ResourceError(f"{path.parent} is being written by {holder}; wait for it or stop it") from None
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def die_with_parent() -> None:
    """Under DVC, end when the parent ends, so that a killed `dvc repro` leaves no writer behind.

    Only under DVC (it sets DVC_ROOT): a command started by hand with `nohup` is meant to outlive its shell. Linux only;
    elsewhere the lock alone keeps a second writer out.
    """
    if sys.platform == "linux" and "DVC_ROOT" in os.environ:
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), signal.SIGTERM)
