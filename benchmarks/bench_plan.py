"""A corpus of 60 000 h on paper: can it be planned, opened and sampled in seconds and under 2 GB of memory?

python benchmarks/bench_plan.py [--quick] [--json FILE]

17 million lengths are drawn (log-normal, 1 to 35 s, as LibriLight and LibriSpeech are cut), and every step then runs on
the real code in a process of its own, whose peak memory the kernel tells. The store has its true number of shards, but
they are links to one real shard of 8 channels of each length: what is measured is the bookkeeping. Promises have bars;
limits (what still needs an object an utterance) are measured at 1/20 of the size, because they break the 2 GB at the
full one.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The parent imports nothing large: a child's peak memory counts from the size of its parent.
UTTERANCES = 17_000_000
QUICK = 20  # --quick and the limits: a twentieth
SHARD_ROWS, CHUNK_ROWS, WIDTH = 65_536, 64, 8
BAR_SECONDS, BAR_BYTES = 10.0, 2e9
BATCHES = 1_000


def header() -> dict[str, Any]:
    from cache.receipts import store_key

    fingerprint = {"bench": "plan"}
    shape = {"codec": "float16", "width": WIDTH, "chunk_rows": CHUNK_ROWS, "shard_rows": SHARD_ROWS}
    return {"kind": "features", "key": store_key("features", fingerprint), "fingerprint": fingerprint, **shape}


def load_samples(folder: Path) -> Any:
    import numpy as np

    return np.load(folder / "samples.npy")


def draw(folder: Path, size: int) -> dict[str, Any]:
    import numpy as np

    rng = np.random.default_rng(0)
    samples = np.empty(size, dtype=np.int64)
    for at in range(0, size, 1_000_000):
        seconds = rng.lognormal(2.382, 0.6, min(1_000_000, size - at))
        samples[at : at + 1_000_000] = np.clip(seconds, 1, 35) * 16_000
    np.save(folder / "samples.npy", samples)
    return {"utterances": size, "hours": round(int(samples.sum()) / 16_000 / 3600)}


def plan_features(folder: Path, size: int) -> dict[str, Any]:
    from cache.frames import frames_of
    from cache.plan import plan_rows

    plan = plan_rows(frames_of(load_samples(folder)), SHARD_ROWS)
    return {"shards": plan.num_shards, "rows": plan.num_rows}


def plan_waves(folder: Path, size: int) -> dict[str, Any]:
    from cache.plan import plan_rows
    from cache.waves import WAVE_GRID

    plan = plan_rows(load_samples(folder), WAVE_GRID.shard_rows)
    return {"shards": plan.num_shards, "rows": plan.num_rows}


def predict(folder: Path, size: int) -> dict[str, Any]:
    """Bytes and missing shards of four layers of 768, as `check_space` sums them before the first forward."""
    from cache.frames import frames_of
    from cache.plan import plan_rows
    from cache.writer import StoreWriter
    from cache.zarrshard import ArraySpec, Grid

    plan = plan_rows(frames_of(load_samples(folder)), SHARD_ROWS)
    specs = [ArraySpec(f"layer-{i:02d}", 768, "float16") for i in range(4)]
    return {"bytes": StoreWriter(folder / "nothing", plan, specs, Grid(CHUNK_ROWS, SHARD_ROWS)).predicted_bytes()}


def write(folder: Path, size: int) -> dict[str, Any]:
    """Columns and header as `write_header` leaves them, from arrays; then the shards (links), the journal, a receipt."""
    import numpy as np

    from cache.frames import frames_of
    from cache.plan import plan_rows
    from cache.publish import write_json
    from cache.zarrshard import write_column

    head = header()
    place = folder / "features" / head["key"]
    digits = 10 ** np.arange(8, -1, -1)
    ids = np.empty((size, 20), dtype=np.uint8)
    ids[:, :11] = np.frombuffer(b"librilight/", dtype=np.uint8)
    for at in range(0, size, 1_000_000):
        numbers = np.arange(at, min(at + 1_000_000, size))
        ids[at : at + 1_000_000, 11:] = numbers[:, None] // digits % 10 + ord("0")
    write_column(place / "ids", ids.reshape(-1))
    del ids
    write_column(place / "id_end", np.arange(20, 20 * size + 1, 20, dtype=np.int64))
    plan = plan_rows(frames_of(load_samples(folder)), SHARD_ROWS)
    write_column(place / "rows", plan.rows)
    write_column(place / "start", plan.start)
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"decant": {"format": 1, **head}}}
    write_json(place / "zarr.json", group)
    return {"column_bytes": sum(p.stat().st_size for p in place.rglob("c/0"))}


def link_shards(folder: Path, size: int) -> dict[str, Any]:
    import numpy as np

    from cache.publish import digest_json, write_json
    from cache.ragged import Store
    from cache.writer import write_shard
    from cache.zarrshard import array_metadata, encode_shard, shard_path

    head = header()
    store = Store(folder / "features" / head["key"])
    spec, plan = store.spec("layer-00"), store.plan
    rows = np.repeat((np.arange(SHARD_ROWS) % 2048).astype(np.float16)[:, None], WIDTH, axis=1)
    parent = shard_path(store.directory, spec, 0).parent.parent
    parent.mkdir(parents=True)
    write_json(store.directory / "layer-00" / "zarr.json", array_metadata(spec, store.grid, plan.num_rows))
    made: dict[int, tuple[int, str]] = {}  # chunks -> bytes, hash of the one shard of that size
    described = []
    with open(store.directory / "journal.jsonl", "w", encoding="ascii") as journal:
        for shard in range(plan.num_shards):
            used = plan.used_rows(shard)
            chunks = -(-used // store.grid.chunk_rows)
            one = folder / "one" / str(chunks)
            if chunks not in made:
                made[chunks] = write_shard(
                    one / "0", encode_shard(rows[: chunks * store.grid.chunk_rows], spec, store.grid)
                )
            os.symlink(one, parent / str(shard))
            described.append(list(made[chunks]))
            row = {"array": "layer-00", "shard": shard, "bytes": made[chunks][0], "xxh3": made[chunks][1]}
            journal.write(json.dumps(row) + "\n")
    arrays = {"layer-00": {"width": WIDTH, "codec": "float16", "digest": digest_json(described)}}
    write_json(folder / "receipt.json", {"format": 1, **{k: head[k] for k in ("kind", "key")}, "arrays": arrays})
    return {"files": plan.num_shards}


def open_columns(folder: Path, size: int) -> dict[str, Any]:
    from cache.ragged import Store

    store = Store(folder / "features" / header()["key"], ["layer-00"])
    return {"utterances": len(store.rows), "shards": store.plan.num_shards}


def open_against_receipt(folder: Path, size: int) -> dict[str, Any]:
    from cache.receipts import open_receipt

    return {"files_checked": open_receipt(folder / "receipt.json").plan.num_shards}


def sample(folder: Path, size: int) -> dict[str, Any]:
    """Random batches of 32 whole utterances, nearly each in another shard, read and compared."""
    import numpy as np

    from cache.ragged import Store

    store = Store(folder / "features" / header()["key"], ["layer-00"])
    rng = np.random.default_rng(1)
    assert store.plan.num_shards
    out = np.empty((32, 1, int(store.rows.max()), WIDTH), dtype=np.float16)
    start = time.perf_counter()
    for _ in range(BATCHES):
        chosen = rng.integers(0, len(store.rows), 32)
        _, counts = store.read_batch(chosen.tolist(), ["layer-00"], out=out)
        row = store.plan.start[chosen] % SHARD_ROWS + counts - 1
        assert (out[np.arange(32), 0, counts - 1, 0] == row % 2048).all()
    return {"ms_per_batch": round((time.perf_counter() - start) / BATCHES * 1e3, 3)}


def epoch(kind: str) -> Callable[[Path, int], dict[str, Any]]:
    def step(folder: Path, size: int) -> dict[str, Any]:
        from pipeline.distill.plan import Aligned, Full, plan_epoch

        crop = Full(kind="full") if kind == "full" else Aligned(kind="aligned", max_seconds=15.6)
        plan = plan_epoch(load_samples(folder), crop, 240.0, seed=0, epoch=1)
        start = time.perf_counter()
        items = sum(len(plan[i]) for i in range(BATCHES))
        return {
            "batches": len(plan),
            "items_of_1000": items,
            "us_per_batch": round((time.perf_counter() - start) * 1e3),
        }

    return step


def list_ids(folder: Path, size: int) -> dict[str, Any]:
    from cache.ragged import Store

    return {"ids": len(Store(folder / "features" / header()["key"]).ids)}


def index_ids(folder: Path, size: int) -> dict[str, Any]:
    from cache.ragged import Store

    return {"ids": len(Store(folder / "features" / header()["key"]).index)}


def write_ids(folder: Path, size: int) -> dict[str, Any]:
    import numpy as np

    from cache.header import write_header

    ids = [f"librilight/{u:09d}" for u in range(size)]
    write_header(folder / "again", header(), ids, np.full(size, 500, dtype=np.int64))
    return {"ids": size}


def write_manifest_text(folder: Path) -> None:
    import numpy as np

    samples = np.load(folder / "samples.npy").tolist()
    with open(folder / "manifest.jsonl", "w", encoding="ascii") as file:
        for u, count in enumerate(samples):
            row = {"id": f"librilight/{u:09d}", "corpus": "librilight", "path": f"medium/{u // 1000}/{u:09d}.flac"}
            row |= {"samples": count, "rate_hz": 16_000, "file_samples": count, "file_bytes": count}
            row |= {"audio": f"{u:032x}", "split": "train", "tasks": {}}
            file.write(json.dumps(row) + "\n")


def manifest(folder: Path, size: int) -> dict[str, Any]:
    from cache.manifest import read_manifest

    return {"utterances": len(read_manifest(folder / "manifest.jsonl").samples)}


STEPS: dict[str, tuple[Callable[[Path, int], dict[str, Any]], str | None]] = {
    "draw": (draw, None),
    "plan": (plan_features, "plan of the features (frames_of, plan_rows)"),
    "plan-waves": (plan_waves, "plan of the waveforms (plan_rows)"),
    "predict": (predict, "shards and bytes of 4 layers x 768, before a forward"),
    "write": (write, "the store's columns written, from arrays"),
    "link": (link_shards, None),
    "open": (open_columns, "opened: columns read and checked, plan made"),
    "open-receipt": (open_against_receipt, "opened against its receipt, every shard of a layer"),
    "sample": (sample, "1000 random batches of 32 utterances read"),
    "epoch-full": (epoch("full"), "an epoch of planned batches, whole utterances"),
    "epoch-aligned": (epoch("aligned"), "an epoch of planned batches, crops of 15.6 s"),
}
LIMITS: dict[str, tuple[Callable[[Path, int], dict[str, Any]], str]] = {
    "ids": (list_ids, "Store.ids, a list of str"),
    "index": (index_ids, "Store.index, with Store.ids"),
    "write-ids": (write_ids, "write_header from a list of ids"),
    "manifest": (manifest, "read_manifest, checks included"),
}


def child(name: str, folder: Path, size: int) -> dict[str, Any]:
    """One step in a process of its own: seconds from its first line to its last, imports included."""
    command = [sys.executable, __file__, "--step", name, "--folder", str(folder), "--size", str(size)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def run_step(name: str, folder: Path, size: int) -> None:
    os.environ["DECANT_STORE"] = str(folder)
    start = time.perf_counter()
    told = {**STEPS, **LIMITS}[name][0](folder, size)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": round(seconds, 3), "peak_bytes": peak, **told}))


def measure(size: int) -> tuple[dict[str, Any], dict[str, Any], bool]:
    steps, limits, kept = {}, {}, True
    with tempfile.TemporaryDirectory() as root:
        for name, (_, promise) in STEPS.items():
            steps[name] = got = child(name, Path(root), size)
            if name == "draw":
                print(f"{got['utterances']:,} utterances, {got['hours']:,} h")
            if promise is not None:
                good = got["seconds"] <= BAR_SECONDS and got["peak_bytes"] <= BAR_BYTES
                kept &= good
                told = f"{got['seconds']:7.2f} s (bar {BAR_SECONDS:.0f})  {got['peak_bytes'] / 1e9:5.2f} GB (bar 2)"
                print(f"  {'ok   ' if good else 'SHORT'} {promise:<54}{told}", flush=True)
    part = UTTERANCES // QUICK
    print(f"known limits, at {part:,} utterances (no bar; the last column is memory at {UTTERANCES:,})")
    with tempfile.TemporaryDirectory() as root:
        for name in ("draw", "write"):
            child(name, Path(root), part)
        empty = child("draw", Path(root), 1)["peak_bytes"]  # the interpreter and numpy alone
        child("draw", Path(root), part)
        write_manifest_text(Path(root))
        for name, (_, what) in LIMITS.items():
            limits[name] = got = child(name, Path(root), part)
            got["utterances"] = part
            got["bytes_per_utterance"] = each = round((got["peak_bytes"] - empty) / part)
            told = f"{got['seconds']:7.2f} s {each:14,} B each  -> {each * UTTERANCES / 1e9:5.1f} GB"
            print(f"        {what:<54}{told}", flush=True)
    return steps, limits, kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the utterances")
    parser.add_argument("--json", help="write the figures here")
    for name in ("--step", "--folder", "--size"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        return run_step(options.step, Path(options.folder), int(options.size))
    machine = f"Python {platform.python_version()} on {platform.machine()}, {os.cpu_count()} cores, {platform.system()}"
    print(f"{machine}; each step a process, imports included in memory and seconds")
    steps, limits, kept = measure(UTTERANCES // QUICK if options.quick else UTTERANCES)
    if options.json:
        figures = {"machine": machine, "quick": options.quick, "steps": steps, "limits": limits, "kept": kept}
        Path(options.json).write_text(json.dumps(figures, indent=1) + "\n")
    print("all promises kept" if kept else "a promise was not kept")
    sys.exit(not kept)


if __name__ == "__main__":
    main()
