"""Receipts: what a finished store holds, as one small deterministic JSON; and opening a store against it.

DVC tracks receipts, never stores. A receipt has no time, host or absolute path, so making the same store again gives
the same bytes. It names every shard with its size and hash: a store that was damaged, swapped or made from something
else is refused when it is opened, before a number is read.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cache.errors import StoreError
from cache.header import FORMAT, REMEDY, check_array, journal_limit
from cache.journal import Journal
from cache.names import keeps_layers, layers_of
from cache.places import RemotePath, local, place_of
from cache.publish import digest_json, read_json
from cache.ragged import Store
from cache.tables import describe_tables, table_names, table_path
from cache.zarrshard import shard_bytes, shard_path


def store_root() -> Path:
    """Where stores are written: $DECANT_STORE, else store/ of the DVC checkout that runs us, else store/ here.

    Under `dvc exp run --temp` or `--queue` DVC_ROOT names the main checkout, so experiments share its stores.

    Raises:
        StoreError: $DECANT_STORE is a URL, from which stores are only read.
    """
    return local(_any_root(), "this command")


def _any_root() -> Path | RemotePath:
    """Where stores are read."""
    if place := os.environ.get("DECANT_STORE"):
        return place_of(place)
    return Path(os.environ.get("DVC_ROOT", ".")) / "store"


def store_key(kind: str, fingerprint: dict[str, Any]) -> str:
    """The name of a store: a digest of everything that decides its bytes."""
    return digest_json({"format": FORMAT, "kind": kind, "fingerprint": fingerprint})[:20]


def store_path(kind: str, key: str) -> Path:
    """The local folder of a store of kind "waves" or "features"."""
    return store_root() / kind / key


def make_receipt(directory: Path, arrays: Iterable[str]) -> dict[str, Any]:
    """The receipt of some arrays of a store, from its journal.

    Raises:
        StoreError: a shard of them is missing or not as it was committed.
    """
    store = Store(directory)
    journal = Journal(directory)
    described = {name: _describe(store, journal, name) for name in arrays}
    return {
        "format": FORMAT,
        "kind": store.kind,
        "key": store.key,
        "fingerprint": store.fingerprint,
        "arrays": described,
        "utterances": len(store.rows),
        "rows": int(store.rows.sum()),
        "bytes": sum(size for a in described.values() for size, _ in files_of(a)),
    }


def array_digest(described: dict[str, Any]) -> str:
    """What stands for all bytes of an array, and for those of the tables that its codec was fitted with."""
    shards = described["shards"]
    return digest_json({"shards": shards, "tables": described["tables"]} if "tables" in described else shards)


def files_of(described: dict[str, Any]) -> list[list[Any]]:
    """[bytes, xxh3] of every file that a receipt names for an array."""
    return [*described["shards"], *described.get("tables", {}).values()]


def _describe(store: Store, journal: Journal, array: str) -> dict[str, Any]:
    """What a receipt says of an array, after comparing names and sizes with what lies there, and tables byte by byte."""
    spec = store.spec(array)
    check_array(store.place, spec, store.grid, store.plan.num_rows)
    shards: list[list[Any]] = []
    for shard in range(store.plan.num_shards):
        path = shard_path(store.place, spec, shard)
        row = journal.rows.get((array, shard))
        if row is None:
            raise StoreError(
                f"{path} was never finished; run the stage that writes it again, it goes on where it stopped"
            )
        if isinstance(path, Path):
            _check_file(path, row[0])
        if row[0] != (want := shard_bytes(store.plan.used_rows(shard), spec, store.grid)):
            raise StoreError(f"{path} was committed with {row[0]} bytes and its utterances take {want}; {REMEDY}")
        shards.append([row[0], row[1]])
    described: dict[str, Any] = {"width": store.width, "codec": store.codec, "shards": shards}
    if keeps_layers(array) and len(layers := layers_of(array)) > 1:
        described["mean_of_layers"] = list(layers)
    if names := table_names(spec):
        there = describe_tables(store.place, spec)
        for table, name in names.items():
            if there.get(name) != journal.rows.get((name, 0)):
                raise StoreError(
                    f"{table_path(store.place, spec, table)} is missing or damaged, and {array} cannot be decoded without "
                    "it; run the stage that writes it again (`dvc repro -f`), it makes this layer anew"
                )
        described["tables"] = {table: list(there[name]) for table, name in names.items()}
    return {**described, "digest": array_digest(described)}


def _check_file(path: Path, size: int) -> None:
    """Of a local store. Behind a URL a shard that is missing or of another size is found when it is first read."""
    if not path.exists():
        raise StoreError(
            f"{path} is missing; run the stage that writes it again (`dvc repro -f`), it makes only this shard"
        )
    if (found := path.stat().st_size) != size:
        raise StoreError(
            f"{path} has {found} bytes and was committed with {size}; run the stage that writes it again (`dvc repro -f`)"
        )


def open_arrays(kind: str, key: str, arrays: dict[str, str], verify: bool | float = False) -> Store:
    """Open a store of which these arrays, by name and digest, are wanted.

    Raises:
        StoreError: the store is not there, unfinished, or not the one that was meant.
    """
    directory = _any_root() / kind / key
    if isinstance(directory, Path) and not (directory / "zarr.json").exists():
        stage = "prepare" if kind == "waves" else "extract"
        raise StoreError(
            f"the store {kind}/{key} is not under {store_root()}; make it with `dvc repro -f {stage}`, "
            "or set DECANT_STORE to where it is"
        )
    store = Store(directory, tuple(arrays), verify)
    journal = Journal(directory, journal_limit(store.rows, store.grid.shard_rows))
    if (store.kind, store.key) != (kind, key):
        raise StoreError(
            f"{directory} says it is {store.kind}/{store.key}: a store was copied over another; extract again"
        )
    if store_key(kind, store.fingerprint) != key:
        raise StoreError(f"{directory}: its fingerprint is not the one that its key {key} was made of; {REMEDY}")
    for name, digest in arrays.items():
        if _describe(store, journal, name)["digest"] != digest:
            raise StoreError(
                f"{directory}: {name} is not what the receipt describes; run `dvc repro` to bring both in step"
            )
    return store


def open_receipt(receipt: Path | dict[str, Any], verify: bool | float = False) -> Store:
    """Open the store that a receipt describes, with all arrays it names.

    Raises:
        StoreError: see `open_arrays`; also a receipt of another format.
    """
    described = receipt if isinstance(receipt, dict) else read_json(receipt)
    if described.get("format") != FORMAT:
        raise StoreError(f"{receipt}: receipt format {described.get('format')!r}, this version reads {FORMAT}")
    arrays = {name: a["digest"] for name, a in described["arrays"].items()}
    return open_arrays(described["kind"], described["key"], arrays, verify)
