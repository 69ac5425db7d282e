"""Products in, whole files and folders out: written beside, flushed to the disk, renamed at the end.

A reader never sees a half-written product. What was being written when a process died lies in a sibling called
`.NAME.partial`, which the next run resumes or replaces; DVC, which deletes a stage's outputs first, does not know it.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

from cache.errors import DataError, ResourceError, StoreError
from cache.places import bytes_of


def canonical_json(value: Any) -> str:
    """The one text of a JSON value: sorted keys, one key a line, no trailing space, a newline at the end."""
    return json.dumps(value, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Publish `value` as canonical JSON."""
    with publish_file(path) as partial:
        partial.write_text(canonical_json(value), encoding="utf-8")


def read_json(path: PurePath, max_bytes: int | None = None) -> Any:
    """Read one JSON file, local or behind a URL.

    Raises:
        StoreError: missing, not JSON, or larger than `max_bytes` or memory; the message names the file.
    """
    data = bytes_of(path, max_bytes)
    if data is None:
        raise StoreError(f"{path} does not exist; run the stage that writes it (`dvc repro`)")
    return parse_json(data, path)


def parse_json(data: bytes, where: PurePath) -> Any:
    """The value of a JSON text.

    Raises:
        StoreError: it is none, or takes more than memory.
    """
    try:
        return json.loads(data)
    except MemoryError:
        raise StoreError(f"{where} takes more memory than there is; make it again") from None
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8, numbers of 5000 digits
        raise StoreError(
            f"{where} is not valid JSON ({error}); delete it and rerun the stage that writes it"
        ) from error


def partial_of(path: Path) -> Path:
    """The sibling in which the product at `path` is prepared."""
    path = Path(path)
    return path.with_name(f".{path.name}.partial")


@contextmanager
def publish_file(path: Path) -> Iterator[Path]:
    """Give a sibling path to write to; on success flush it and rename it to `path`."""
    path, partial = Path(path), partial_of(path)
    with named_io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        fsync(partial)
        os.replace(partial, path)
        fsync(path.parent)


@contextmanager
def publish_dir(path: Path, resume: bool = False) -> Iterator[Path]:
    """Give a sibling folder to write into; on success flush it and let it take the place of `path`.

    With `resume` what an earlier, unfinished run left in the sibling is kept; otherwise the folder is empty.
    On failure the sibling stays.
    """
    path, partial = Path(path), partial_of(path)
    with named_io_errors(path):
        if partial.exists() and not resume:
            shutil.rmtree(partial)
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        for file in sorted(partial.rglob("*")):
            fsync(file)
        before = partial_of(path.with_name(f"{path.name}.before"))
        _remove(before)
        if path.exists():
            os.replace(
                path, before
            )  # out of the way in one rename: deleting it first could be all that a kill lets happen
        os.replace(partial, path)
        fsync(path.parent)
        _remove(before)


def _remove(folder: Path) -> None:
    """Delete a folder, or a link to one, if it is there."""
    if folder.is_symlink():
        folder.unlink()
    elif folder.exists():
        shutil.rmtree(folder)


@contextmanager
def named_io_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one line that names the product and the way out."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(_existing_parent(Path(path))).free
            raise ResourceError(
                f"{where}: the disk is full ({free / 1e6:.0f} MB free); free some space and run the same command again"
            ) from error
        if error.errno == errno.EFBIG:
            raise ResourceError(
                f"{where}: the file is larger than this process or file system allows; raise `ulimit -f` or make shards smaller"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResourceError(f"{where}: {error.strerror}; make it writable or choose another place") from error
        raise


def _existing_parent(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path


def fsync(path: Path) -> None:
    """Flush one file or folder entry to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest_bytes(data: bytes) -> str:
    """SHA-256 of some bytes, as hex."""
    return hashlib.sha256(data).hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of the canonical text of a JSON value."""
    return digest_bytes(canonical_json(value).encode())


def digest_file(path: Path) -> str:
    """SHA-256 of one file's bytes.

    Raises:
        DataError: the file does not exist.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist") from None


def digest_dir(path: Path) -> str:
    """SHA-256 over the names and digests of all files below a folder, hidden ones left out."""
    files = sorted(f for f in Path(path).rglob("*") if f.is_file() and not f.name.startswith("."))
    return digest_json([[f.relative_to(path).as_posix(), digest_file(f)] for f in files])
