"""An iterator in, the same items out, made in a thread while the caller is busy with those before."""

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class _End:
    """After the last item: how the making ended."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def ahead(items: Iterable[Item], depth: int) -> Iterator[Item]:
    """The items, at most `depth` of them made and not yet asked for.

    Reading files and numpy let go of the interpreter, so a thread overlaps with a forward. What the making raises is
    raised here, in its place; a caller that leaves ends the thread before its next item.
    """
    ready: queue.Queue[Item | _End] = queue.Queue(depth)
    left = threading.Event()

    def put(item: Item | _End) -> bool:
        while not left.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                if not put(item):
                    return
        except BaseException as raised:  # told to the caller, whatever it is
            error = raised
        put(_End(error))

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        left.set()
        thread.join()
