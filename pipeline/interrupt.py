"""Signals in, a question out: has anybody asked this training to stop?"""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # DVC and people; a terminal; SLURM before its time limit
ONE_REQUEST_SEC = 0.5
"""Linux tells of the death of a launcher of several threads once per thread that it outlives (prctl(2), PR_SET_PDEATHSIG); on
two cores these come within 2 ms."""


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether a signal has come; a second one, half a second later, ends the process at once."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def remember(number: int, _: FrameType | None) -> None:
        came.append(number)
        if len(came) == 1:
            time.sleep(ONE_REQUEST_SEC)  # signals of the same request come in here again
            restore()

    for number in SIGNALS:
        signal.signal(number, remember)
    try:
        yield lambda: bool(came)
    finally:
        restore()
