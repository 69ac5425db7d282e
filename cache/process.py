"""One writer per product: locks that die with their holder, and children that die with their parent.

DVC and torchrun both leave orphans when they are killed (SIGTERM or SIGKILL); two writers in one store lose data.
"""

import ctypes
import fcntl
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.errors import ResourceError

PR_SET_PDEATHSIG = 1  # prctl(2)
LAUNCHERS = ("DVC_ROOT", "TORCHELASTIC_RUN_ID")  # what they set for the commands they start
ORPHAN_SECONDS = 30.0  # for what a dead process's child is doing: flushing one shard to a slow disk


@contextmanager
def exclusive(path: Path) -> Iterator[int]:
    """Hold the lock file `path`; the kernel frees it when the process ends, however it ends.

    Gives the handle of the lock: a child that inherits it keeps the lock until it has ended too. A lock whose process is
    dead is with such a child, which is about to notice, and is waited for.

    Raises:
        ResourceError: another process holds it; the message says which.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + ORPHAN_SECONDS
    with open(path, "a+", encoding="utf-8") as file:
        while not _try_lock(file.fileno()):
            file.seek(0)
            holder = file.read().strip() or "an unknown process"
            if not _is_dead(holder) or time.monotonic() > deadline:
                raise ResourceError(f"{path.parent} is being written by {holder}; wait for it or stop it")
            time.sleep(0.05)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield file.fileno()
        finally:
            file.truncate(0)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_dead(holder: str) -> bool:
    """Whether what a lock file names is a process of this machine that has ended."""
    named = re.fullmatch(r"process (\d+) on (.+)", holder)
    if named is None or named[2] != socket.gethostname():
        return False
    try:
        os.kill(int(named[1]), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass  # it lives, as somebody else's
    return False


def die_with_parent() -> None:
    """Under DVC and torchrun, end when the parent ends, so that a killed `dvc repro` leaves no writer behind.

    Only there (they set DVC_ROOT and TORCHELASTIC_RUN_ID): a command started by hand with `nohup` is meant to outlive its
    shell. Linux only; elsewhere the lock alone keeps a second writer out.
    """
    if sys.platform == "linux" and any(name in os.environ for name in LAUNCHERS):
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), signal.SIGTERM)
