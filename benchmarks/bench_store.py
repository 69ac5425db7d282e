"""Reading and writing a store against the cost of moving the same bytes without one, and against other readers of it.

python benchmarks/bench_store.py [--dir DIR] [--quick] [--json FILE]

A random batch is 32 utterances of 1 to 16 s by 4 layers (768 wide, float16, chunks of 64 and shards of 65 536 frames).
`preadv` is the bar: a Python loop of `os.preadv` that brings the same bytes, from plain files as many and as large as
the shards (`store_corpus.py` says why that matters), into the same buffer. `gather` (`Store.read_into`) brings them from
the store; a padded batch (`Store.read_batch`) also has zeros after each utterance, so it is held against `preadv` that
writes the same zeros. zarr-python, zarrs and tensorstore read our store, as their documentation says (`array[a:b]`; for
zarrs its codec pipeline under zarr-python; for tensorstore one future a read), and verify every chunk; zarrs and
tensorstore use all cores. h5py reads one long contiguous dataset a layer.

In a round every contender reads the same batches, each a different one at a time: who reads a batch right after
another did is up to 30 % faster. The order of the contenders is drawn for every round. A figure is the median over the
rounds, a ratio the median of the ratios within the rounds. Warm: all files are in the page cache; each round drops them
and reads them in again in another order. Cold: before each batch of each contender the files are dropped from the page
cache (POSIX_FADV_DONTNEED; the caches of the disk, or of the host of a virtual machine, stay as they are); one request
is in flight, but for tensorstore and the rows that say so. Two workers: two processes that each read half of the batches
at the same time; the sum of their bytes over the time until both are done.

Beside Python: the main thread runs pure Python all the time, and takes a batch when there is one. The batches come from a
`cache.ring.Ring` with one worker, or, for contrast, from a thread.

Writing: whole shards from memory through `StoreWriter.write` and through the processes of `cache.writers.ShardPool`
(checksums, hash, fsync, rename, journal) against `write` and `fsync` of the same bytes by as many processes.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from store_contenders import IN_FLIGHT, Contenders, GatherInto, serve
from store_corpus import LAYERS, SEED, Corpus
from store_writes import PLAIN, POOLS, measure_writes

from cache.children import Child
from cache.ring import Ring

Rates = dict[str, list[float]]  # contender -> MB/s in each round

TABLE = ["preadv", "gather", "gather, verified", "memmap", "h5py", "zarr-python", "zarrs", "tensorstore"]
BARS = ["preadv of the shards", "preadv + zeros", "read_batch", "read_batch, verified"]  # warm, one process
DEEP = [f"preadv, {IN_FLIGHT} in flight", f"gather, {IN_FLIGHT} in flight"]  # cold, one process
SLOW = {"h5py", "zarr-python", "zarrs", "tensorstore"}  # one batch a round (and worker) is enough of them
SLOTS = 4  # of the ring
BESIDE = {"preadv": "preadv, nothing beside", "ring": "ring beside Python", "thread": "thread beside Python"}


def check(corpus: Corpus, contenders: Contenders) -> None:
    """Every contender brings the same bytes."""
    batch = corpus.draw(np.random.default_rng(SEED))
    digests = {}
    for name, read in contenders.reads.items():
        contenders.out.fill(7)
        read(batch)
        digest = xxhash.xxh3_64()
        for b, u in enumerate(batch):
            for a in range(LAYERS):
                digest.update(contenders.out[b, a, : corpus.rows[u]].data)
        digests[name] = digest.hexdigest()
    del digests["preadv of the shards"]
    assert len(set(digests.values())) == 1, digests


Timed = Callable[[str, list[list[int]]], float]  # seconds that a contender takes for some batches


def measure(corpus: Corpus, names: list[str], timed: Timed, rounds: int, batches: int, step: int, cold: bool) -> Rates:
    """MB/s of every contender in every round; `step` batches at a time."""
    rng = np.random.default_rng(SEED + 1)
    rates: Rates = {name: [] for name in names}
    for number in range(rounds + 1):
        seconds, sizes = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
        if not cold:
            corpus.warm(rng)
        drawn = [[corpus.draw(rng) for _ in range(step)] for _ in range(batches)]
        order = [names[i] for i in rng.permutation(len(names))]
        for turn in range(batches):
            for place, name in enumerate(order):
                if turn and name in SLOW:
                    continue
                some = drawn[(turn + place) % batches]
                if cold:
                    corpus.drop()
                seconds[name] += timed(name, some)
                sizes[name] += corpus.bytes_of(some)
        if number:  # the first round warms up
            for name in names:
                rates[name].append(sizes[name] / seconds[name] / 1e6)
    return rates


def in_this_process(contenders: Contenders, forget: bool = False) -> Timed:
    """Time a contender here; afterwards let nothing stay mapped, if a page cache is to be emptied."""

    def timed(name: str, batches: list[list[int]]) -> float:
        read = contenders.reads[name]
        began = time.perf_counter()
        for batch in batches:
            read(batch)
        seconds = time.perf_counter() - began
        if forget:
            contenders.forget()
        return seconds

    return timed


def in_workers(workers: list[Child], forget: bool = False) -> Timed:
    """Time a contender in processes that each read their share of the batches at the same time."""

    def timed(name: str, batches: list[list[int]]) -> float:
        began = time.perf_counter()
        for number, worker in enumerate(workers):
            worker.send((name, batches[number :: len(workers)], forget))
        for worker in workers:
            assert worker.recv() == "done"
        seconds = time.perf_counter() - began
        for worker in workers:
            assert worker.recv() == "ready"
        return seconds

    return timed


def burn() -> int:
    """A tenth of a millisecond of pure Python."""
    total = 0
    for i in range(2_000):
        total += i
    return total


def measure_beside(corpus: Corpus, contenders: Contenders, rounds: int, batches: int) -> Rates:
    """MB/s of `preadv` alone, and of batches read ahead beside a main thread that never waits and never sleeps."""
    rng = np.random.default_rng(SEED + 2)
    rates: Rates = {name: [] for name in BESIDE.values()}

    def alone(drawn: list[list[int]]) -> float:
        return in_this_process(contenders)("preadv", drawn)

    def ring(drawn: list[list[int]]) -> float:
        with Ring(GatherInto(corpus), drawn[:SLOTS] + drawn, contenders.out.nbytes, SLOTS) as ahead:
            for number in range(SLOTS + len(drawn)):
                if number == SLOTS:  # what was read while nobody asked is used up
                    began = time.perf_counter()
                while not ahead.ready():
                    burn()
                next(ahead)
            return time.perf_counter() - began

    def thread(drawn: list[list[int]]) -> float:
        began = time.perf_counter()
        with ThreadPoolExecutor(1) as executor:
            for future in [executor.submit(contenders.reads["gather"], batch) for batch in drawn]:
                while not future.done():
                    burn()
        return time.perf_counter() - began

    ways = {"preadv": alone, "ring": ring, "thread": thread}
    for number in range(rounds + 1):
        corpus.warm(rng)
        drawn = [corpus.draw(rng) for _ in range(batches)]
        for i in rng.permutation(len(ways)):
            way = list(ways)[i]
            some = drawn[:3] if way == "thread" else drawn
            seconds = ways[way](some)
            if number:
                rates[BESIDE[way]].append(corpus.bytes_of(some) / seconds / 1e6)
    return rates


def ratio(rates: Rates, one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))


def machine() -> dict[str, Any]:
    import importlib.metadata as metadata

    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
        "?",
    )
    names = ("numpy", "zarr", "zarrs", "tensorstore", "h5py", "google-crc32c", "xxhash")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in names},
    }


def busy_seconds() -> tuple[float, float]:
    """Processor seconds used so far: by everyone on the machine, and by this process and its ended children."""
    fields = list(map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9]))
    everyone = (sum(fields) - fields[3] - fields[4]) / os.sysconf("SC_CLK_TCK")  # less idle and waiting for the disk
    own = os.times()
    return everyone, own.user + own.system + own.children_user + own.children_system


def run(place: Path, utterances: int, rounds: int, batches: int) -> tuple[int, dict[str, Rates]]:
    """Everything that is measured, by part: bytes of all layers, and MB/s."""
    corpus = Corpus(place, utterances)
    contenders = Contenders(corpus)
    check(corpus, contenders)
    workers = [Child(serve, (corpus,), [], "benchmark worker") for _ in range(2)]
    for worker in workers:
        assert worker.recv() == "up"
    here, there = in_this_process(contenders), in_workers(workers)
    found = {
        "warm, one process": measure(corpus, TABLE + BARS, here, rounds, batches, 1, cold=False),
        "warm, two workers": measure(corpus, TABLE, there, rounds, batches // 2, 2, cold=False),
        "beside Python": measure_beside(corpus, contenders, rounds, batches),
    }
    contenders.forget()
    there, here = in_workers(workers, forget=True), in_this_process(contenders, forget=True)
    there("memmap", [corpus.draw(np.random.default_rng(SEED))] * 2)  # lets go of what the workers mapped when warm
    # a disk differs more from one second to the next than two readers do: more rounds, and several batches in each
    thorough = rounds > 5
    if thorough:
        found["cold, two workers"] = measure(corpus, TABLE, there, 5, 1, 2, cold=True)
    names = TABLE + DEEP if thorough else ["preadv", "gather", *DEEP]
    found["cold, one process"] = measure(corpus, names, here, 11 if thorough else 5, 3, 1, cold=True)
    for worker in workers:
        worker.kill()
    found["write"] = measure_writes(corpus, 15 if thorough else 5)
    return corpus.size, found


def promises(found: dict[str, Rates]) -> list[tuple[str, float, float]]:
    """Name, figure and bar of everything that is promised."""
    warm, cold = found["warm, one process"], found["cold, one process"]
    beside, write = found["beside Python"], found["write"]
    return [
        ("warm: gather / preadv", ratio(warm, "gather", "preadv"), 0.95),
        ("warm: read_batch / preadv + zeros", ratio(warm, "read_batch", "preadv + zeros"), 0.95),
        ("warm, two workers: gather / preadv", ratio(found["warm, two workers"], "gather", "preadv"), 0.95),
        ("warm, every chunk verified: gather / preadv", ratio(warm, "gather, verified", "preadv"), 0.50),
        ("warm, verified: read_batch / preadv + zeros", ratio(warm, "read_batch, verified", "preadv + zeros"), 0.50),
        ("warm: gather / zarr-python", ratio(warm, "gather", "zarr-python"), 25.0),
        ("warm: ring beside Python / preadv alone", ratio(beside, BESIDE["ring"], BESIDE["preadv"]), 0.80),
        ("cold: gather / preadv, one in flight", ratio(cold, "gather", "preadv"), 0.90),
        (f"cold: gather / preadv, {IN_FLIGHT} in flight", ratio(cold, DEEP[1], DEEP[0]), 0.90),
        ("write: StoreWriter / write + fsync", ratio(write, POOLS[0], PLAIN[1]), 0.80),
        ("write: 1 process / write + fsync by 1", ratio(write, POOLS[1], PLAIN[1]), 0.80),
        ("write: 2 processes / write + fsync by 2", ratio(write, POOLS[2], PLAIN[2]), 0.80),
    ]


def show(found: dict[str, Rates]) -> None:
    columns = [name for name in found if name.startswith(("warm", "cold"))]
    print(f"  {'':<24}" + "".join(f"{name:>19}" for name in columns))
    for name in [*TABLE, *BARS, *DEEP]:
        cells = [f"{statistics.median(found[c][name]):19.0f}" if name in found[c] else f"{'':>19}" for c in columns]
        print(f"  {name:<24}{''.join(cells)}")
    print()
    for part in ("beside Python", "write"):
        for name, rates in found[part].items():
            print(f"  {name:<24}{statistics.median(rates):19.0f}")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="folder for the temporary files (default: the system's)")
    parser.add_argument("--quick", action="store_true", help="a third of the data, five short rounds, few cold readers")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    utterances, rounds, batches = (150, 5, 4) if options.quick else (460, 7, 10)
    head = machine()
    print(
        f"{head['cpu']}, {head['cores']} cores, {head['memory_gb']} GB, Linux {head['kernel']}, Python {head['python']}"
    )
    print("  ".join(f"{k} {v}" for k, v in head["versions"].items()))
    began, before = time.monotonic(), busy_seconds()
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="bench-store-") as place:
        size, found = run(Path(place), utterances, rounds, batches)
    everyone, own = (after - was for after, was in zip(busy_seconds(), before, strict=True))
    head["seconds"] = round(time.monotonic() - began)
    head["busy_by_others"] = round((everyone - own) / (time.monotonic() - began), 2)
    print(f"{size / 1e9:.2f} GB: {utterances} utterances x {LAYERS} layers; medians, MB/s")
    print(f"{head['seconds']} s, of {head['cores']} cores {head['busy_by_others']} were busy with other work\n")
    show(found)
    kept = promises(found)
    for name, figure, bar in kept:
        print(f"{name}: {figure:.3g} (bar: {bar:g}) {'ok' if figure >= bar else 'FALLS SHORT'}")
    if options.json:
        rounded = {p: {name: [round(r) for r in runs] for name, runs in rates.items()} for p, rates in found.items()}
        whole = {"machine": head, "bytes": size, "seed": SEED, "mb_per_s": rounded}
        whole["promises"] = [{"name": n, "figure": round(f, 3), "bar": b} for n, f, b in kept]
        options.json.write_text(json.dumps(whole, indent=1) + "\n")
    sys.exit(any(figure < bar for _, figure, bar in kept))


if __name__ == "__main__":
    main()
