"""A store root and receipt files in, which stores, arrays and receipts there are out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache.errors import StoreError
from cache.findings import Finding
from cache.header import FORMAT
from cache.journal import read_journal
from cache.names import keeps_layers
from cache.publish import read_json
from cache.ragged import Store
from cache.receipts import array_digest, files_of, store_key, store_path
from cache.zarrshard import shard_path


def read_receipt(path: Path) -> dict[str, Any]:
    """A receipt whose own parts agree.

    Raises:
        StoreError: it is none, or was changed after it was written.
    """
    receipt = read_json(path)
    remedy = "take it from git, or run the stage that writes it (`dvc repro -f`)"
    if not isinstance(receipt, dict) or not {"kind", "key", "fingerprint", "arrays"} <= set(receipt):
        raise StoreError(f"{path} is no receipt of a store; {remedy}")
    if receipt.get("format") != FORMAT:
        raise StoreError(f"{path}: receipt format {receipt.get('format')!r}, this version reads {FORMAT}; {remedy}")
    if receipt["key"] != store_key(receipt["kind"], receipt["fingerprint"]):
        raise StoreError(f"{path} is damaged: its key is not the digest of its fingerprint; {remedy}")
    try:
        for name, array in receipt["arrays"].items():
            if array_digest(array) != array["digest"]:
                raise StoreError(f"{path} is damaged: {name}.digest is not that of its shards; {remedy}")
        total = sum(size for a in receipt["arrays"].values() for size, _ in files_of(a))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{path} is damaged: its arrays are not a receipt's ({error}); {remedy}") from error
    if receipt.get("bytes") != total:
        raise StoreError(f"{path} is damaged: bytes is {receipt.get('bytes')} and its shards sum to {total}; {remedy}")
    return receipt


def arrays_of(store: Store) -> list[str]:
    """Arrays a store has, told by their folders."""
    return sorted(p.name for p in store.directory.glob("*") if p.is_dir() and is_array_name(p.name))


def is_array_name(array: str) -> bool:
    """Whether a store may have an array of this name."""
    return array == "wave" or keeps_layers(array)


def is_complete(store: Store) -> bool:
    """Every shard of every array committed and of the size it was committed with."""
    journal = read_journal(store.directory)
    arrays = arrays_of(store)
    wanted = [(a, s) for a in arrays for s in range(store.plan.num_shards)]
    return bool(arrays) and all(
        (row := journal.rows.get((a, s))) is not None
        and (path := shard_path(store.directory, store.spec(a), s)).exists()
        and path.stat().st_size == row[0]
        for a, s in wanted
    )


def find_stores(root: Path) -> list[Path]:
    """Folders of stores under a store root, the unreadable ones too."""
    places = [p for kind in ("waves", "features") for p in sorted((root / kind).glob("*"))]
    return [p for p in places if p.is_dir() and not p.name.startswith(".")]


def receipts_by_store(files: Sequence[Path]) -> tuple[dict[Path, list[Path]], list[Finding]]:
    """Receipt files by the folder of the store each names, and those that name none."""
    by_store: dict[Path, list[Path]] = {}
    findings = []
    for file in files:
        try:
            receipt = read_receipt(file)
            by_store.setdefault(store_path(receipt["kind"], receipt["key"]), []).append(file)
        except StoreError as error:
            findings.append(Finding("receipt", str(file), str(error)))
    return by_store, findings
