"""Signals in, a question out: has anybody asked this training to stop?"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # DVC and people; a terminal; SLURM before its time limit


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Give a function that tells whether a signal has come; a second signal ends the process at once."""
    came: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def remember(number: int, _: FrameType | None) -> None:
        came.append(number)
        restore()

    for number in SIGNALS:
        signal.signal(number, remember)
    try:
        yield lambda: bool(came)
    finally:
        restore()
