"""Rows of whole shards in, a growing store out, through processes: one computes rows while others write the last ones.

The caller holds the store's lock and is the only one that writes its journal. A process gets the number of a slot of
shared memory, makes one shard file of the rows there (checksums, hash, flush, rename) and says what it became. A shard
goes to one process once, so no file has two writers; and each of them holds the lock too, so that the next run waits
until the last orphan of a killed one is gone.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType

import numpy as np
from jaxtyping import Shaped, UInt8

from cache.children import Child, Line
from cache.errors import DecantError
from cache.shared import make_shared, map_shared
from cache.writer import StoreWriter, write_shard
from cache.zarrshard import ArraySpec, Grid, encode_shard, shard_path

ALIGNMENT = 4096  # bytes: slots begin on pages

Place = tuple[str, int]  # array, shard


class ShardPool:
    """Shared memory for whole shards, and processes that write what was put there. A context manager.

    For each shard: `rows = pool.buffer(array, shard)`, fill all of `rows`, `pool.commit(array, shard)`. A buffer must not
    be touched after its commit. Leaving the block waits until everything that was committed is on the disk and in the
    journal; leaving it by an exception records what is done already and ends the rest: the next run makes it.
    """

    def __init__(
        self,
        writer: StoreWriter,
        workers: int,
        shard_buffers: int,
        committed: Callable[[str, int], None] = lambda array, shard: None,
    ) -> None:
        """Reserve the memory and start the processes.

        Args:
            writer: the open store.
            workers: processes; 0 writes in this one, at `commit`.
            shard_buffers: shards whose arrays are all in memory at one time; 2 are one to compute and one to write.
            committed: told each shard of an array, in this process, once the journal has it.

        Raises:
            ResourceError: not enough memory, or a process cannot be started.
        """
        self._writer, self._committed = writer, committed
        plan, todo = writer.plan, writer.missing()
        rows = max((plan.used_rows(shard) for shard in todo), default=0)
        row_bytes = max((spec.row_bytes for spec in writer.specs.values()), default=0)
        self._slot_bytes = max(1, -(-rows * row_bytes // ALIGNMENT)) * ALIGNMENT
        places = sum(map(len, todo.values()))
        slots = max(1, min(places, shard_buffers * len(writer.specs)))
        self._free = list(range(slots))
        self._filling: dict[Place, int] = {}  # slot of what the caller has
        self._tasks: list[dict[Place, int]] = [{} for _ in range(workers)]  # slots of what each process has
        self._workers: list[Child] = []
        what = f"writing ahead ({slots} shards of {self._slot_bytes / 1e6:.1f} MB)"
        size = slots * self._slot_bytes
        handle = make_shared(size, what, "keep fewer layers or make shards smaller")
        try:
            self._memory = map_shared(handle, size).reshape(slots, -1)
            arguments = (writer.directory, writer.specs, writer.grid, handle, self._memory.shape)
            handles = [handle] if writer.lock is None else [handle, writer.lock]
            for _ in range(workers):
                self._workers.append(Child(_write_slots, arguments, handles, "writer process"))
        except BaseException:
            self._kill()
            raise
        finally:
            os.close(handle)

    @property
    def pids(self) -> Sequence[int]:
        """Process ids of the workers."""
        return [child.pid for child in self._workers]

    def buffer(self, array: str, shard: int) -> Shaped[np.ndarray, "R ..."]:
        """Room for all rows of one shard of one array, full of what was there before; waits until a slot is free.

        Raises:
            DecantError: writing an earlier shard failed, as `StoreWriter.write` would say it.
            ResourceError: a process was killed.
        """
        place = (array, shard)
        assert place not in self._filling
        assert not any(place in tasks for tasks in self._tasks)
        while not self._free:
            assert any(self._tasks), "every buffer is with the caller; commit one, or have more shard_buffers"
            self.record(wait_for=1)
        slot = self._filling[place] = self._free.pop()
        return _rows(self._memory[slot], self._writer.specs[array], self._writer.plan.used_rows(shard))

    def commit(self, array: str, shard: int) -> None:
        """Have a buffer written, as it is now.

        Raises:
            DecantError: like `buffer`.
        """
        place = (array, shard)
        slot, used = self._filling.pop(place), self._writer.plan.used_rows(shard)
        if self._workers:
            number = min(range(len(self._tasks)), key=lambda n: len(self._tasks[n]))
            self._tasks[number][place] = slot
            self._workers[number].send((place, used, slot))
            self.record()
        else:
            writer = self._writer
            self._enter(
                place,
                slot,
                *_write(writer.directory, writer.specs[array], writer.grid, shard, used, self._memory[slot]),
            )

    def record(self, wait_for: int = 0) -> None:
        """Enter what the processes have written into the journal: to be called now and then while rows are computed.

        Args:
            wait_for: shards to wait for if fewer are done; else nothing is waited for.

        Raises:
            DecantError: like `buffer`.
        """
        while any(self._tasks):
            busy = {child.fileno(): n for n, child in enumerate(self._workers) if self._tasks[n]}
            ready = wait(list(busy), timeout=None if wait_for > 0 else 0)
            if not ready:
                return
            for handle in ready:
                self._receive(busy[handle])  # type: ignore[index]
                wait_for -= 1

    def _receive(self, number: int) -> None:
        place, size, digest = self._workers[number].recv()
        self._enter(place, self._tasks[number].pop(place), size, digest)

    def _enter(self, place: Place, slot: int, size: int, digest: str) -> None:
        self._writer.journal.append(*place, size, digest)
        self._free.append(slot)
        self._committed(*place)

    def _salvage(self) -> None:
        """After an error: record what the other processes have finished."""
        for number, child in enumerate(self._workers):
            with suppress(DecantError, RuntimeError):  # the first error is the one to tell
                while self._tasks[number] and child.has_answer():
                    self._receive(number)

    def _kill(self) -> None:
        for child in self._workers:
            child.kill()

    def __enter__(self) -> "ShardPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.record(wait_for=sum(map(len, self._tasks)))
        finally:
            try:
                self._salvage()
            finally:
                self._kill()  # with nothing left to do, or with what the next run makes again


def _rows(slot: UInt8[np.ndarray, " N"], spec: ArraySpec, used: int) -> Shaped[np.ndarray, "R ..."]:
    """The part of a slot that one shard of one array takes, as its rows."""
    return slot[: used * spec.row_bytes].view(spec.dtype).reshape(used, *spec.inner)


def _write(
    store: Path, spec: ArraySpec, grid: Grid, shard: int, used: int, slot: UInt8[np.ndarray, " N"]
) -> tuple[int, str]:
    return write_shard(shard_path(store, spec, shard), encode_shard(_rows(slot, spec, used), spec, grid))


def _write_slots(
    line: Line, store: Path, specs: dict[str, ArraySpec], grid: Grid, handle: int, shape: tuple[int, int]
) -> None:
    """A process: places and slots in, bytes and hashes of whole files out, until the parent hangs up."""
    memory = map_shared(handle, shape[0] * shape[1]).reshape(shape)
    while True:
        (array, shard), used, slot = line.recv()
        line.send(((array, shard), *_write(store, specs[array], grid, shard, used, memory[slot])))
