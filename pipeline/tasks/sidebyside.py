"""Pieces of work in, their results in the same order out: on a CPU side by side, a core each, on a GPU one after another.

A small head does not fill two cores: its operations are short, and after each of them the faster core waits. Two heads on
a core each take half the time. One torch thread computes a piece, however many there are: their number changes no bit.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TypeVar

import torch

Result = TypeVar("Result")


class SideBySide:
    """As many pieces at a time as torch has threads; one, in the caller's thread, on a GPU. A context manager."""

    def __init__(self, device: torch.device) -> None:
        self._threads = torch.get_num_threads()
        self._pool = (
            ThreadPoolExecutor(self._threads, "head", initializer=torch.set_num_threads, initargs=(1,))
            if device.type == "cpu"
            else None
        )

    def each(self, work: Sequence[Callable[[], Result]]) -> list[Result]:
        """All results, when the last is there; the first failure, if there is one, when all are over."""
        if self._pool is None:
            return [piece() for piece in work]
        return [future.result() for future in [self._pool.submit(piece) for piece in work]]

    def __enter__(self) -> "SideBySide":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # threads begun later take the number that was set last, in any thread
