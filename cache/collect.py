"""A store root and the JSON files of some folders in, the stores that none of these files refers to out.

Receipts and targets refer to a store by its key. To err on the safe side every string in any JSON file that looks like
a key counts, and a receipt that was damaged stops the collection instead of losing its store.
"""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache.errors import ResourceError, SettingsError
from cache.inventory import find_stores, read_receipt
from cache.process import exclusive
from cache.publish import fsync, named_io_errors, partial_of, read_json

KEY = re.compile("[0-9a-f]{20}")


@dataclass(frozen=True, slots=True)
class Garbage:
    """One folder that nothing refers to."""

    place: Path
    bytes: int
    note: str
    """"" | "leftover" (of a run that was killed)."""
    elsewhere: str = ""
    """Where a link leads, what is there stays: others may link to it."""


def json_files(places: Sequence[Path]) -> list[Path]:
    """JSON files among some files and folders.

    Raises:
        SettingsError: a place does not exist.
    """
    found: dict[str, Path] = {}  # by full name: the same file may be named twice
    for place in places:
        if not place.exists():
            raise SettingsError(f"{place} does not exist; name folders or files with receipts")
        files = [place] if place.is_file() else [p for p in place.rglob("*.json") if p.is_file()]
        found |= {os.path.abspath(file): file for file in files}
    return sorted(found.values())


def referenced_keys(places: Sequence[Path]) -> set[str]:
    """Keys of stores that the JSON files in some folders name.

    Raises:
        SettingsError: no file, or none that names a store.
        StoreError: a file that is not JSON, or a receipt that was changed after it was written.
    """
    keys: set[str] = set()
    for file in json_files(places):
        value = read_json(file)
        if isinstance(value, dict) and {"fingerprint", "arrays"} <= set(value):
            read_receipt(file)
        keys |= {text for text in _strings(value) if KEY.fullmatch(text)}
    if not keys:
        raise SettingsError(
            f"no file under {', '.join(map(str, places))} names a store, so all would go; name folders with receipts"
        )
    return keys


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield key
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def find_garbage(root: Path, keys: set[str]) -> list[Garbage]:
    """Stores under `root` with other keys, and what killed runs left beside the stores."""
    stores = [_garbage(p, "") for p in find_stores(root) if p.name not in keys]
    hidden = [p for kind in ("waves", "features") for p in sorted((root / kind).glob(".*partial"))]
    return stores + [_garbage(p, "leftover") for p in hidden if p.is_dir() or p.is_symlink()]


def _garbage(place: Path, note: str) -> Garbage:
    """A folder and what its deletion frees: nothing, if it is a link."""
    if place.is_symlink():
        return Garbage(place, 0, note, str(place.readlink()))
    return Garbage(place, folder_bytes(place), note)


def delete(garbage: Garbage) -> bool:
    """Delete a store or leftover under its writer's lock; False where a writer has it.

    The folder leaves its name in one rename, so no reader meets half a store. Of a link only the link goes.
    """
    folder = garbage.place
    lock = folder.parent if garbage.note == "leftover" else folder
    try:
        with named_io_errors(folder), exclusive(lock / "writer.lock"):
            if folder.is_symlink():
                folder.unlink()
                fsync(folder.parent)
                return True
            gone = folder if garbage.note == "leftover" else partial_of(folder)
            if gone != folder:
                if gone.is_symlink():
                    gone.unlink()
                elif gone.exists():
                    shutil.rmtree(gone)
                os.replace(folder, gone)
                fsync(folder.parent)
            shutil.rmtree(gone)
    except ResourceError as error:
        if "is being written by" in str(error):
            return False
        raise
    return True


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
