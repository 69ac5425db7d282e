"""A small real store and the ways to damage it, for the tests that look after stores."""

import json
import shutil
from pathlib import Path

import numpy as np

from cache.publish import write_json
from cache.receipts import make_receipt, store_key, store_path
from cache.writer import open_writer

LAYERS = ("layer-00", "layer-04")
ROWS = [1, 100, 16, 256, 31, 200, 57, 64, 3, 255]  # five shards of at most 256 rows
FINGERPRINT = {"model": {"kind": "hubert", "digest": "ab" * 32}, "audio": "cd" * 32}
SHARD = "layer-04/c/1/0"


def build(fingerprint=FINGERPRINT, layers=LAYERS, codec="float16"):
    """Write a store, or what is missing of it, as an extraction would; its folder and the shards that were made."""
    rng = np.random.default_rng(3)
    data = {name: [rng.normal(size=(r, 24)).astype(codec) for r in ROWS] for name in LAYERS}
    key = store_key("features", fingerprint)
    header = {"kind": "features", "key": key, "fingerprint": fingerprint, "codec": codec, "width": 24}
    header |= {"chunk_rows": 16, "shard_rows": 256}
    place, made = store_path("features", key), []
    ids = [f"utt-é{u}" for u in range(len(ROWS))]
    with open_writer(place, header, ids, np.array(ROWS, dtype=np.int64), layers) as writer:
        for shard, names in writer.missing().items():
            for name in names:
                writer.write(name, shard, np.concatenate([data[name][u] for u in writer.plan.utterances(shard)]))
                made.append(f"{name}/c/{shard}/0")
    return place, made


def with_receipt(path: Path):
    """A store and its receipt at `path`."""
    place, _ = build()
    write_json(path, make_receipt(place, LAYERS))
    return place


def flip(path: Path, at: int, bit: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def journal_line(place: Path) -> int:
    """Offset in the journal of the line of `SHARD`."""
    at = 0
    for line in (place / "journal.jsonl").read_bytes().splitlines(keepends=True):
        row = json.loads(line)
        if (row["array"], row["shard"]) == ("layer-04", 1):
            return at
        at += len(line)
    raise AssertionError


def damage(kind: str, place: Path) -> None:
    """Do to a store what disks, people and other programs do."""
    shard = place / SHARD
    match kind:
        case "payload":
            flip(shard, 100, 4)
        case "checksum":
            flip(shard, 16 * 48)
        case "index":
            flip(shard, -20)
        case "truncated":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "empty":
            shard.write_bytes(b"")
        case "deleted":
            shard.unlink()
        case "swapped":  # the same size: shards 1 and 3 hold 256 rows, or as many chunks
            shutil.copy(place / "layer-00" / "c" / "1" / "0", shard)
        case "extra":
            shutil.copy(shard, shard.parent.parent / "9")
        case "metadata":
            edit(place / "layer-04" / "zarr.json", "24", "28")
        case "metadata-lost":
            (place / "layer-04" / "zarr.json").unlink()
        case "header":
            edit(place / "zarr.json", "ab" * 32, "ab" * 31 + "ac")
        case "header-text":
            edit(place / "zarr.json", "{", "[")
        case "header-field":
            edit(place / "zarr.json", '"chunk_rows"', '"chunk_rowt"')
        case "rows" | "ids" | "start":
            flip(place / kind / "c" / "0", 8)
        case "column-metadata":
            edit(place / "rows" / "zarr.json", "10", "11")
        case "column-lost":
            shutil.rmtree(place / "id_end")
        case "journal-line":
            edit(place / "journal.jsonl", '{"array": "layer-04", "shard": 1', '{"arrax": "layer-04", "shard": 1')
        case "journal-hash":
            line = (place / "journal.jsonl").read_bytes()[journal_line(place) :].split(b"\n")[0]
            at = journal_line(place) + len(line) - 4
            data = bytearray((place / "journal.jsonl").read_bytes())
            data[at] = ord("0") if data[at] != ord("0") else ord("1")
            (place / "journal.jsonl").write_bytes(data)
        case "journal-size":
            edit(place / "journal.jsonl", '"layer-04", "shard": 1, "bytes": ', '"layer-04", "shard": 1, "bytes": 1')
        case "journal-array":
            edit(place / "journal.jsonl", '"layer-04", "shard": 1', '"layer-05", "shard": 1')
        case "journal-shard":
            edit(place / "journal.jsonl", '"layer-04", "shard": 1', '"layer-04", "shard": 9')
        case _:
            raise AssertionError(kind)
