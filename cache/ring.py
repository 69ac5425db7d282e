"""Requests in, filled slots of shared memory out, in order: read ahead by processes that a busy interpreter cannot starve.

A thread that reads beside pure Python waits for the interpreter's lock after every call: it falls to a fraction of its
speed. These readers are processes, and their slots are memory that they and the caller see. Everything is made once
and used again, so a batch costs its bytes and no page fault.

Request k is filled into slot k mod slots by worker k mod workers, one pipe each, so order needs no lock. A slot is asked
for as soon as it is free, long before it is needed: workers run ahead by as many batches as there are slots, no further.
"""

import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from jaxtyping import UInt8

from cache.children import Child, Line
from cache.shared import make_shared, map_shared

ALIGNMENT = 4096  # bytes: slots begin on pages
META_BYTES = 128 * 1024  # of all answers that may wait in one pipe, which holds about 200 KiB

Item = TypeVar("Item")
Meta = TypeVar("Meta")


class Ring(Generic[Item, Meta]):
    """An iterator over (what `fill` returned, the bytes it filled), one for each of `items`, in their order.

    The last `hold` slots that were given out stay as they are; the one before them is filled anew during `next`. With
    `hold=1` that is the usual contract of a reused buffer. A trainer that copies to its device without waiting takes
    `hold=2`, and before each `next` waits for the copy of the batch before the last.

    Use it in a `with` statement, which ends the workers however the block is left; so do its last batch, an error, its
    garbage collection, and the end of the parent, SIGKILL included. Views of its slots stay readable.
    """

    def __init__(
        self,
        fill: Callable[[Item, UInt8[np.ndarray, " N"]], Meta],
        items: Iterable[Item],
        slot_bytes: int,
        slots: int,
        workers: int = 1,
        hold: int = 1,
    ) -> None:
        """Reserve the memory, start the workers and let them begin.

        Args:
            fill: puts one item into a slot and says what it put there. An instance or function of an importable module
                (not of a script), sent to each worker once; what that module imports, each worker imports.
            items: small and picklable; taken up to `slots` ahead of the caller, in the caller's process.
            slot_bytes: bytes of one slot.
            slots: how many; at least `hold + workers`, or a worker would have nothing to do.
            workers: processes.
            hold: slots that stay valid after they were given out.

        Raises:
            ResourceError: not enough memory, or a process cannot be started.
        """
        if not (slot_bytes > 0 and workers > 0 and hold > 0 and slots >= hold + workers):
            raise ValueError(
                f"{slots} slots of {slot_bytes} bytes do not suffice for {workers} workers and hold={hold}"
            )
        self._slot_bytes, self._slots, self._hold = slot_bytes, slots, hold
        stride = -(-slot_bytes // ALIGNMENT) * ALIGNMENT
        size = slots * stride
        what = f"reading ahead ({slots} slots of {slot_bytes / 1e6:.1f} MB)"
        handle = make_shared(size, what, "use fewer slots or smaller batches")
        self._workers: list[Child] = []
        # at garbage collection, at the interpreter's end, or from `close`, whichever is first
        self._finish = weakref.finalize(self, _kill, self._workers, os.getpid())
        try:
            self._memory = map_shared(handle, size).reshape(slots, stride)
            for _ in range(workers):
                self._workers.append(
                    Child(
                        _fill_slots, (fill, handle, slot_bytes, slots, META_BYTES // slots), [handle], "reader process"
                    )
                )
        finally:
            os.close(handle)
        self._items: Iterator[Item] | None = iter(items)
        self._sent = self._given = 0
        self._ask()

    @property
    def memory(self) -> tuple[int, int]:
        """Address and bytes of all slots, for a caller that wants them pinned (cudaHostRegister)."""
        return self._memory.ctypes.data, self._memory.nbytes

    @property
    def pids(self) -> Sequence[int]:
        """Process ids of the workers."""
        return [child.pid for child in self._workers]

    def __iter__(self) -> "Ring[Item, Meta]":
        return self

    def __next__(self) -> tuple[Meta, UInt8[np.ndarray, " N"]]:
        """Free the oldest slot that is held, then wait for the next one.

        Raises:
            DecantError: `fill` raised one in its process.
            ResourceError: a worker was killed.
            RuntimeError: any other error of `fill`; its traceback is the cause.
        """
        try:
            self._ask()
            if self._given == self._sent:
                raise StopIteration
            meta = self._workers[self._given % len(self._workers)].recv()
        except BaseException:  # also when interrupted: half an answer may have been read
            self.close()
            raise
        slot = self._memory[self._given % self._slots, : self._slot_bytes]
        self._given += 1
        return meta, slot

    def ready(self) -> bool:
        """Whether `next` would return at once: where it is often False, reading is what the caller waits for."""
        return self._given == self._sent or self._workers[self._given % len(self._workers)].has_answer()

    def _ask(self) -> None:
        """Request a filling of every slot that is free."""
        free = max(0, self._given - self._hold + 1) + self._slots - self._sent
        while free > 0 and self._items is not None:
            try:
                item = next(self._items)
            except StopIteration:
                self._items = None
                return
            self._workers[self._sent % len(self._workers)].send((self._sent % self._slots, item))
            self._sent += 1
            free -= 1

    def close(self) -> None:
        """End the workers now; nothing more is given out."""
        self._items, self._sent = None, self._given
        self._finish()

    def __enter__(self) -> "Ring[Item, Meta]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _kill(workers: list[Child], owner: int) -> None:
    """They only read, so nothing is lost. A forked copy of the owner must not end the owner's workers."""
    if os.getpid() == owner:
        for child in workers:
            child.kill()


def _fill_slots(
    line: Line,
    fill: Callable[[Any, UInt8[np.ndarray, " N"]], Any],
    handle: int,
    slot_bytes: int,
    slots: int,
    limit: int,
) -> None:
    """A worker: slot numbers and items in, what was filled out, until the parent hangs up."""
    stride = -(-slot_bytes // ALIGNMENT) * ALIGNMENT
    memory = map_shared(handle, slots * stride).reshape(slots, stride)
    os.close(handle)
    while True:
        slot, item = line.recv()
        line.send(fill(item, memory[slot, :slot_bytes]), limit)
