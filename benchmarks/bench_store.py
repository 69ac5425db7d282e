"""Reading and writing a store against the cost of moving the same bytes without one, and against other readers of it.

python benchmarks/bench_store.py [--dir DIR] [--quick] [--json FILE]

A random batch is 32 utterances of 1 to 16 s by 4 layers (768 wide, float16, chunks of 64 and shards of 65 536 frames).
`preadv` is the bar: a Python loop of `os.preadv` that brings the same bytes from plain files, one a layer, into the same
buffer. `gather` brings them from the store; a padded batch (`Store.read_batch`) also has zeros after each utterance, so
it is held against `preadv` that writes the same zeros. `memmap` is numpy over the plain files, `h5py` one contiguous
dataset a layer; zarr-python and tensorstore (one future a read, then a copy; it uses all cores) read our
store. zarrs is not measured.

In a round every contender reads the same batches, each a different one at a time: who reads a batch right after
another did is up to 30 % faster. The order of the contenders is drawn for every round.

A figure is the median over the rounds, a ratio the median of the ratios within the rounds. Warm: all files are in the
page cache; each round drops them and reads them in again in another order. `preadv of the shards` is the same loop on
the store's own files, so on the very same pages: checksums come along, so it is a bar and not a reader. Cold: before
each batch of each contender the files are dropped from the page cache (POSIX_FADV_DONTNEED; the caches of the disk, or
of the host of a virtual machine, stay as they are). Warm and cold, every contender has one request in flight, apart
from tensorstore, which has many.

What was found on a shared virtual machine of 2 cores, where warm bars against `preadv` of the plain files fall short:
`gather` is as fast as `preadv of the shards`, and that is slower than `preadv` of the plain files, by 8 % in the run
kept in results/. With one shard a layer (150 utterances) it once was not there (1.01). Neither the pieces of a
read nor their alignment cost anything (one, seven or fourteen pieces, at any offset: within 2 %). Why pages of the
shards are slower was not found. Of a batch of 5 ms, 0.2 to 0.3 ms are numpy preparing it (0.08 when nothing else went
through the processor's caches); verifying costs as much again as the copy, at 15 to 30 GB/s of CRC-32C.

Writing: whole shards from memory through `StoreWriter.write` (checksums, hash, fsync, rename, journal) against
`write` and `fsync` of the same bytes to a plain file.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
import zarr

from cache.frames import num_frames
from cache.receipts import make_receipt, open_receipt, store_key, store_path
from cache.writer import StoreWriter, open_writer

WIDTH, CHUNK, SHARD, LAYERS, BATCH = 768, 64, 65_536, 4, 32
ROW = 2 * WIDTH
NAMES = [f"layer-{i:02d}" for i in range(LAYERS)]
MAX_FRAMES = num_frames(16 * 16_000)
SEED = 0

Read = Callable[[list[int]], None]  # fills the shared batch buffer with these utterances


class Corpus:
    """The same numbers as a store, as plain files, and as HDF5, all in one folder."""

    def __init__(self, place: Path, utterances: int) -> None:
        self.place = place
        rng = np.random.default_rng(SEED)
        self.rows = np.array([num_frames(int(s)) for s in rng.uniform(16_000, 256_000, utterances)], dtype=np.int64)
        self.begin = np.concatenate([[0], np.cumsum(self.rows)])
        os.environ["DECANT_STORE"] = str(place / "store")
        fingerprint = {"model": "bench"}
        self.header = {"kind": "features", "key": store_key("features", fingerprint), "fingerprint": fingerprint}
        self.header |= {"codec": "float16", "width": WIDTH, "chunk_rows": CHUNK, "shard_rows": SHARD}
        self.store = store_path("features", str(self.header["key"]))
        with self.writer(self.store, NAMES) as writer, h5py.File(place / "all.h5", "w") as hdf:
            self.start = writer.plan.start
            for name in NAMES:
                dataset = hdf.create_dataset(name, (int(self.begin[-1]), WIDTH), np.float16)
                with open(place / f"{name}.raw", "wb") as raw:
                    for shard in range(writer.plan.num_shards):
                        which = writer.plan.utterances(shard)
                        lo, hi = int(self.begin[which[0]]), int(self.begin[which[-1] + 1])
                        rows = random_rows(rng, hi - lo)
                        writer.write(name, shard, rows)
                        dataset[lo:hi] = rows
                        raw.write(rows.data)
        self.receipt = make_receipt(self.store, NAMES)
        self.files = [p for p in place.rglob("*") if p.is_file()]
        for file in self.files:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())  # what is dirty cannot be dropped

    def writer(self, place: Path, names: list[str]) -> Any:
        ids = [f"u{u}" for u in range(len(self.rows))]
        return open_writer(place, self.header, ids, self.rows, names)

    def drop(self) -> None:
        """Drop all files from the page cache."""
        for file in self.files:
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)

    def warm(self, rng: np.random.Generator) -> None:
        """Bring all files into the page cache anew, in a random order, so that none keeps the pages it was dealt."""
        self.drop()
        for number in rng.permutation(len(self.files)):
            file = self.files[number]
            with open(file, "rb", buffering=0) as handle:
                while handle.read(2**22):
                    pass

    def batch(self, rng: np.random.Generator) -> list[int]:
        return sorted(rng.choice(len(self.rows), BATCH, replace=False).tolist(), key=lambda u: rng.random())


def random_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    """Float16 rows of random finite bits below 2: nothing that a file system could compress."""
    return (rng.integers(0, 2**16, (count, WIDTH), dtype=np.uint16) & 0xBFFF).view(np.float16)


def map_raw(corpus: Corpus) -> list[np.ndarray]:
    return [np.memmap(corpus.place / f"{n}.raw", np.float16, "r").reshape(-1, WIDTH) for n in NAMES]


def contenders(corpus: Corpus, out: np.ndarray) -> dict[str, Read]:
    """Name -> read one batch of all layers into `out` (B, L, T, D)."""
    flat = memoryview(out.reshape(-1).view(np.uint8))
    raw = [os.open(corpus.place / f"{n}.raw", os.O_RDONLY) for n in NAMES]
    num_shards = int(corpus.start[-1]) // SHARD + 1
    shards = [[os.open(corpus.store / n / "c" / str(s) / "0", os.O_RDONLY) for s in range(num_shards)] for n in NAMES]
    hdf = h5py.File(corpus.place / "all.h5")
    datasets = [hdf[n] for n in NAMES]
    arrays = [zarr.open_array(corpus.store / n, mode="r") for n in NAMES]
    loose, checked = open_receipt(corpus.receipt), open_receipt(corpus.receipt, verify=True)
    rows, begin, start = corpus.rows.tolist(), corpus.begin.tolist(), corpus.start.tolist()

    def preadv(batch: list[int]) -> None:
        for b, u in enumerate(batch):
            for a, handle in enumerate(raw):
                at = (b * LAYERS + a) * MAX_FRAMES * ROW
                size = rows[u] * ROW
                assert os.preadv(handle, [flat[at : at + size]], begin[u] * ROW) == size

    def preadv_shards(batch: list[int]) -> None:
        for b, u in enumerate(batch):
            shard, row = divmod(start[u], SHARD)
            chunk, inside = divmod(row, CHUNK)
            size = rows[u] * ROW  # the checksums among the rows come too, and as many bytes of rows stay out
            for a in range(LAYERS):
                at = (b * LAYERS + a) * MAX_FRAMES * ROW
                offset = chunk * (CHUNK * ROW + 4) + inside * ROW
                assert os.preadv(shards[a][shard], [flat[at : at + size]], offset) == size

    def preadv_padded(batch: list[int]) -> None:
        preadv(batch)
        for b, u in enumerate(batch):
            out[b, :, rows[u] :] = 0

    def gather(batch: list[int]) -> None:
        loose.read_into(batch, NAMES, out)

    def gather_checked(batch: list[int]) -> None:
        checked.read_into(batch, NAMES, out)

    def read_batch(batch: list[int]) -> None:
        loose.read_batch(batch, NAMES, out=out)

    def read_batch_checked(batch: list[int]) -> None:
        checked.read_batch(batch, NAMES, out=out)

    def memmap(batch: list[int]) -> None:
        sources = map_raw(corpus)  # for one batch: what is mapped cannot be dropped from the page cache
        for b, u in enumerate(batch):
            for a, source in enumerate(sources):
                out[b, a, : rows[u]] = source[begin[u] : begin[u] + rows[u]]

    def hdf5(batch: list[int]) -> None:
        for b, u in enumerate(batch):
            for a, source in enumerate(datasets):
                source.read_direct(out[b, a, : rows[u]], np.s_[begin[u] : begin[u] + rows[u]])

    def zarr_python(batch: list[int]) -> None:
        for b, u in enumerate(batch):
            for a, source in enumerate(arrays):
                out[b, a, : rows[u]] = source[start[u] : start[u] + rows[u]]

    found: dict[str, Read] = {
        "preadv": preadv,
        "preadv of the shards": preadv_shards,
        "gather": gather,
        "gather, verified": gather_checked,
        "preadv + zeros": preadv_padded,
        "read_batch": read_batch,
        "read_batch, verified": read_batch_checked,
        "memmap": memmap,
        "h5py": hdf5,
        "zarr-python": zarr_python,
    }
    try:
        import tensorstore
    except ImportError:
        return found
    driver = {"driver": "zarr3", "kvstore": {"driver": "file"}}
    stores = [
        tensorstore.open({**driver, "kvstore": {"driver": "file", "path": str(corpus.store / n)}}).result()
        for n in NAMES
    ]

    def through_tensorstore(batch: list[int]) -> None:
        futures = [
            (b, a, u, s[start[u] : start[u] + rows[u]].read())
            for b, u in enumerate(batch)
            for a, s in enumerate(stores)
        ]
        for b, a, u, future in futures:
            out[b, a, : rows[u]] = future.result()

    found["tensorstore"] = through_tensorstore
    return found


def check(corpus: Corpus, reads: dict[str, Read], out: np.ndarray) -> None:
    """Every contender brings the same bytes."""
    batch = corpus.batch(np.random.default_rng(SEED))
    digests = set()
    for name, read in reads.items():
        if name == "preadv of the shards":
            continue
        out.fill(7)
        read(batch)
        digest = xxhash.xxh3_64()
        for b, u in enumerate(batch):
            for a in range(LAYERS):
                digest.update(out[b, a, : corpus.rows[u]].data)
        digests.add(digest.hexdigest())
    assert len(digests) == 1


def measure(corpus: Corpus, reads: dict[str, Read], rounds: int, batches: int, cold: bool) -> dict[str, list[float]]:
    """MB/s of every contender in every round."""
    rng = np.random.default_rng(SEED + 1)
    rates: dict[str, list[float]] = {name: [] for name in reads}
    for number in range(rounds + 1):
        seconds = dict.fromkeys(reads, 0.0)
        if not cold:
            corpus.warm(rng)
        drawn = [corpus.batch(rng) for _ in range(batches)]
        size = sum(int(corpus.rows[batch].sum()) for batch in drawn) * LAYERS * ROW
        names = [list(reads)[i] for i in rng.permutation(len(reads))]
        for turn in range(batches):
            for place, name in enumerate(names):
                batch = drawn[(turn + place) % batches]
                if cold:
                    corpus.drop()
                began = time.perf_counter()
                reads[name](batch)
                seconds[name] += time.perf_counter() - began
        if number:  # the first round warms up
            for name, spent in seconds.items():
                rates[name].append(size / spent / 1e6)
    return rates


def measure_writes(corpus: Corpus, rounds: int) -> dict[str, list[float]]:
    """MB/s of whole shards, and of the same bytes into plain files."""
    rates: dict[str, list[float]] = {"write + fsync": [], "StoreWriter.write": []}
    place = corpus.place / "written"
    with corpus.writer(place / "store", NAMES[:1]) as writer:
        rows = random_rows(np.random.default_rng(SEED), writer.plan.used_rows(0))

        def plain() -> None:
            with open(place / "plain", "wb", buffering=0) as file:
                left = memoryview(rows.reshape(-1).view(np.uint8))
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())

        def shard(writer: StoreWriter = writer) -> None:
            writer.write(NAMES[0], 0, rows)

        for number in range(rounds + 1):
            pairs = [("write + fsync", plain), ("StoreWriter.write", shard)]
            for name, write in pairs if number % 2 else pairs[::-1]:
                for file in [p for p in place.rglob("*") if p.name in ("plain", "0") and p.stat().st_size > 2**20]:
                    file.unlink()  # both make a new file
                os.sync()
                began = time.perf_counter()
                write()
                if number:
                    rates[name].append(rows.nbytes / (time.perf_counter() - began) / 1e6)
    shutil.rmtree(place)
    return rates


def ratio(rates: dict[str, list[float]], one: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(rates[one], rates[other], strict=True))


def machine() -> dict[str, Any]:
    import importlib.metadata as metadata

    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
        "?",
    )
    names = ("numpy", "zarr", "tensorstore", "h5py", "zarrs", "google-crc32c", "xxhash")
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="folder for the temporary files (default: the system's)")
    parser.add_argument("--quick", action="store_true", help="a third of the data, five short rounds")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    utterances, rounds, batches = (150, 5, 9) if options.quick else (460, 7, 9)
    with tempfile.TemporaryDirectory(dir=options.dir, prefix="bench-store-") as place:
        corpus = Corpus(Path(place), utterances)
        out = np.zeros((BATCH, LAYERS, MAX_FRAMES, WIDTH), dtype=np.float16)
        reads = contenders(corpus, out)
        check(corpus, reads, out)
        slow = ("zarr-python", "tensorstore", "h5py")
        warm = measure(corpus, {n: r for n, r in reads.items() if n not in slow}, rounds, batches, cold=False)
        beside = measure(corpus, {n: reads[n] for n in ("preadv", "gather", *slow) if n in reads}, 5, 1, cold=False)
        warm |= {name: beside[name] for name in slow if name in beside}
        names = list(reads)
        first = ["preadv", "gather", "gather, verified", "memmap"]
        cold = measure(corpus, {n: reads[n] for n in first}, 5 if options.quick else rounds, 1, cold=True)
        if not options.quick:
            cold |= measure(corpus, {n: reads[n] for n in slow if n in reads}, 5, 1, cold=True)
        written = measure_writes(corpus, 5 if options.quick else rounds)
        size = int(corpus.rows.sum()) * LAYERS * ROW
    zarr_times = ratio(beside, "gather", "zarr-python")
    promises = [
        ("warm: gather / preadv", ratio(warm, "gather", "preadv"), 0.95),
        ("warm: gather / preadv of the shards", ratio(warm, "gather", "preadv of the shards"), 0.95),
        ("warm: read_batch / preadv + zeros", ratio(warm, "read_batch", "preadv + zeros"), 0.95),
        ("warm, every chunk verified: gather / preadv", ratio(warm, "gather, verified", "preadv"), 0.50),
        ("warm, verified: read_batch / preadv + zeros", ratio(warm, "read_batch, verified", "preadv + zeros"), 0.50),
        ("warm: gather / zarr-python", zarr_times, 25.0),
        ("cold: gather / preadv, one request in flight", ratio(cold, "gather", "preadv"), 0.90),
        ("write: StoreWriter / write + fsync", ratio(written, "StoreWriter.write", "write + fsync"), 0.80),
    ]
    head = machine()
    print(
        f"{head['cpu']}, {head['cores']} cores, {head['memory_gb']} GB, Linux {head['kernel']}, Python {head['python']}"
    )
    print("  ".join(f"{k} {v}" for k, v in head["versions"].items()))
    print(f"{size / 1e9:.2f} GB: {utterances} utterances x {LAYERS} layers; medians, MB/s\n")
    print(f"  {'':<24}{'warm':>8}{'cold':>8}")
    for name in [*names, "zarrs"]:
        if name not in names:
            print(f"  {name:<24}{'not installed' if head['versions'][name] == 'not installed' else 'not measured'}")
            continue
        cells = [f"{statistics.median(r[name]):8.0f}" if name in r else f"{'':>8}" for r in (warm, cold)]
        print(f"  {name:<24}{''.join(cells)}")
    for name, rates in written.items():
        print(f"  {name:<24}{statistics.median(rates):8.0f}")
    print()
    for name, figure, bar in promises:
        print(f"{name}: {figure:.3g} (bar: {bar:g}) {'ok' if figure >= bar else 'FALLS SHORT'}")
    if options.json:
        rounded = {
            part: {name: [round(r) for r in runs] for name, runs in rates.items()}
            for part, rates in (("warm", warm), ("cold", cold), ("write", written))
        }
        kept = {"machine": head, "bytes": size, "seed": SEED, "mb_per_s": rounded}
        kept["promises"] = [{"name": n, "figure": round(f, 3), "bar": b} for n, f, b in promises]
        options.json.write_text(json.dumps(kept, indent=1) + "\n")
    sys.exit(any(figure < bar for _, figure, bar in promises))


if __name__ == "__main__":
    main()
