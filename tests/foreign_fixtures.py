"""Stores that lie, and a process with little memory and time to read them in."""

import json
import os
import resource
import select
import signal
from pathlib import Path

import numpy as np

from cache.errors import StoreError
from cache.hdf5 import export_store
from cache.publish import read_json
from cache.receipts import make_receipt, open_receipt, store_key, store_path
from cache.verify import verify_store
from cache.writer import open_writer
from cache.zarrshard import CRC_BYTES, crc32c
from tests.cache_fixtures import LAYERS, ROWS

HEADROOM_BYTES = 96 * 2**20
CPU_SECONDS = 10  # its own, however many others want the processor; what it does takes milliseconds
WALL_SECONDS = 200  # for one that sleeps
LAYER = "layer-04"


def capped(*works, headroom=HEADROOM_BYTES) -> list[str]:
    """What each of `works` comes to in a child with little memory and time: "read", or "StoreError: ..." or another error."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        told = []
        try:
            with open("/proc/self/statm", encoding="ascii") as file:
                held = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + headroom, held + headroom))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
            for work in works:
                told.append("read")
                try:
                    work()
                except Exception as error:  # whatever it is, it is told: only a StoreError may be
                    told[-1] = f"{type(error).__name__}: {error}"[:4000]
        finally:
            with os.fdopen(theirs, "w", errors="replace") as file:
                json.dump(told, file)
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as file:
        if not select.select([file], [], [], WALL_SECONDS)[0]:
            os.kill(pid, signal.SIGKILL)
        text = file.read()
    os.waitpid(pid, 0)
    assert text, "still running after 10 seconds, or killed"
    return json.loads(text)


def refused(works, *names: str) -> None:
    """Each ends in a StoreError of one line that names all of `names`."""
    works = list(works.values()) if isinstance(works, dict) else [works]
    for told in capped(*works):
        assert told.startswith("StoreError: "), told
        assert "\n" not in told
        assert len(told) < 1000
        for name in names:
            assert name in told


def wrote(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def forge_header(place: Path, **changes) -> None:
    group = read_json(place / "zarr.json")
    group["attributes"]["decant"].update(changes)
    wrote(place / "zarr.json", group)


def forge_column(place: Path, name: str, values: np.ndarray) -> None:
    """Put other values into a column, checksum included."""
    body = values.tobytes()
    (place / name / "c" / "0").write_bytes(body + crc32c(body))


def column(place: Path, name: str, dtype="<i8") -> np.ndarray:
    return np.frombuffer((place / name / "c" / "0").read_bytes()[:-CRC_BYTES], dtype=dtype).copy()


def swell(path: Path, size: int) -> None:
    """A file of any size that takes no room on the disk."""
    with open(path, "r+b") as file:
        file.truncate(size)


def all_ways(place: Path, receipt: Path, tmp_path: Path):
    """Every command that reads a store, by name; to verify is to find the damage."""

    def verify():
        damage = verify_store(place, [receipt], full=True).damage
        if damage:
            raise StoreError(f"{place}: {damage[0].place}: {damage[0].detail.splitlines()[0]}")

    return {
        "open": lambda: [open_receipt(receipt).read(LAYER, u) for u in range(len(ROWS))],
        "open to batch": lambda: open_receipt(receipt).read_batch([f"utt-é{u}" for u in range(len(ROWS))], LAYERS),
        "describe": lambda: make_receipt(place, LAYERS),
        "verify": verify,
        "export": lambda: export_store(place, tmp_path / "out.h5"),
    }


def build_int8():
    """A store with tables beside its layers."""
    fingerprint = {"model": "int8"}
    key = store_key("features", fingerprint)
    header = {"kind": "features", "key": key, "fingerprint": fingerprint, "codec": "int8", "width": 24}
    header |= {"chunk_rows": 16, "shard_rows": 256}
    place, ids = store_path("features", key), [f"utt-é{u}" for u in range(len(ROWS))]
    rng = np.random.default_rng(5)
    with open_writer(place, header, ids, np.array(ROWS, dtype=np.int64), LAYERS) as writer:
        for name in LAYERS:
            tables = {"mean": rng.normal(size=24), "std": rng.uniform(1, 2, size=24)}
            writer.write_tables(name, {table: values.astype(np.float32) for table, values in tables.items()})
        for shard, names in writer.missing().items():
            for name in names:
                writer.write(name, shard, rng.integers(0, 256, (writer.plan.used_rows(shard), 26), dtype=np.uint8))
    return place
