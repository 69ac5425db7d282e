"""Writing: whole shards out of memory, by one or two processes, against `write` and `fsync` of the same bytes.

Four shards, one of each layer, lie in shared memory before the clock starts. Processes are up already. All make new files.
"""

import os
import time
from pathlib import Path

import numpy as np
from store_corpus import LAYERS, NAMES, SEED, Corpus, random_rows

from cache.children import Child, Line
from cache.shared import make_shared, map_shared
from cache.writers import ShardPool

PLAIN = {n: f"write + fsync, {n} process{'es' * (n > 1)}" for n in (1, 2)}
POOLS = {0: "StoreWriter.write", 1: "ShardPool, 1 process", 2: "ShardPool, 2 processes"}


def write_plain(data: np.ndarray, path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
        os.fsync(file.fileno())


def serve_plain(line: Line, handle: int, size: int, folder: Path) -> None:
    """A process: numbers of slots in, "done" out."""
    memory = map_shared(handle, LAYERS * size).reshape(LAYERS, size)
    while True:
        slot = line.recv()
        write_plain(memory[slot], folder / f"plain-{slot}")
        line.send("done")


def measure_writes(corpus: Corpus, rounds: int) -> dict[str, list[float]]:
    """MB/s of the rows, per contender and round."""
    rates: dict[str, list[float]] = {name: [] for name in (*PLAIN.values(), *POOLS.values())}
    place = corpus.place / "written"
    rng = np.random.default_rng(SEED)
    with corpus.writer(place / "store", NAMES) as writer:
        used = writer.plan.used_rows(0)
        size = used * next(iter(writer.specs.values())).row_bytes
        handle = make_shared(LAYERS * size, "the benchmark", "use --quick")
        memory = map_shared(handle, LAYERS * size).reshape(LAYERS, size)
        rows = {name: random_rows(rng, used) for name in NAMES}
        for slot, name in enumerate(NAMES):
            memory[slot] = rows[name].reshape(-1).view(np.uint8)
        plain = [Child(serve_plain, (handle, size, place), [handle], "benchmark worker") for _ in range(2)]
        pools = {n: ShardPool(writer, n, 1) for n in POOLS}

        def write_files(processes: int) -> float:
            began = time.perf_counter()
            for slot in range(LAYERS):
                plain[slot % processes].send(slot)
            for slot in range(LAYERS):
                plain[slot % processes].recv()
            return time.perf_counter() - began

        def write_shards(processes: int) -> float:
            pool = pools[processes]
            for name in NAMES:
                pool.buffer(name, 0)[:] = rows[name]
            began = time.perf_counter()
            for name in NAMES:
                pool.commit(name, 0)
            pool.record(wait_for=LAYERS)
            return time.perf_counter() - began

        ways = [(name, write_files, n) for n, name in PLAIN.items()] + [(POOLS[n], write_shards, n) for n in POOLS]
        for number in range(rounds + 1):
            for i in rng.permutation(len(ways)):
                name, write, processes = ways[i]
                for file in [*place.glob("plain-*"), *place.glob("store/*/c/0/0")]:
                    file.unlink()
                os.sync()
                seconds = write(processes)
                if number:  # the first round warms up
                    rates[name].append(LAYERS * size / seconds / 1e6)
        for child in plain:
            child.kill()
        for pool in pools.values():
            pool.__exit__(None, None, None)
        os.close(handle)
    return rates
