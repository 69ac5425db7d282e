"""Pieces of work in, their results in the same order out: on a CPU side by side, a core each, on a GPU one after another.

A small head does not fill two cores: its operations are short, and after each of them the faster core waits. Two heads on
a core each take half the time. One torch thread computes a piece, however many there are: their number changes no bit.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
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

    def begin(self, work: Sequence[Callable[[], Result]], after: Sequence[Future[Result]] = ()) -> list[Future[Result]]:
        """Begin each piece as soon as there is a core, but not before the one at its place in `after` is done.

        So three pieces on two cores take one and a half times as long as one, if there are three more to follow.
        """
        previous: Sequence[Future[Result] | None] = after or [None] * len(work)
        return [self._submit(piece, before) for piece, before in zip(work, previous, strict=True)]

    def each(self, work: Sequence[Callable[[], Result]]) -> list[Result]:
        """All results, when the last is there.

        Raises:
            Exception: what the first piece that failed did; the others may still be under way.
        """
        return [future.result() for future in self.begin(work)]

    def _submit(self, piece: Callable[[], Result], before: Future[Result] | None) -> Future[Result]:
        def run() -> Result:
            if before is not None:
                before.result()  # it was begun first, so it has a core: nothing waits for what waits
            return piece()

        if self._pool is not None:
            return self._pool.submit(run)
        done: Future[Result] = Future()
        done.set_result(run())
        return done

    def __enter__(self) -> "SideBySide":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._threads)  # threads begun later take the number that was set last, in any thread
