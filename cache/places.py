"""The name of a folder in, a local path or a URL that is handled like one out, and the bytes of its small files.

Stores are written to local folders and read from either.
"""

import os
from pathlib import Path, PurePath, PurePosixPath
from urllib.parse import unquote_to_bytes

from cache.errors import SettingsError, StoreError
from cache.ranges import Range, fetch


class RemotePath(PurePosixPath):
    """A place behind a URL: `/`, `.name` and `.parent` work, and `str` gives the URL."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)


def place_of(text: str) -> Path | RemotePath:
    """A path, or a URL where there is a "://"; `file:///data` is the path /data.

    Raises:
        SettingsError: a URL that names of files cannot be added to, or a file:// that is no path of this machine.
    """
    if text[:7].lower() == "file://":
        return _path_of(text)
    if "://" not in text:
        return Path(text)
    if "?" in text or "#" in text:
        raise SettingsError(f"{text} has a query or a fragment, and the names of files could not follow it")
    return RemotePath(text)


def _path_of(url: str) -> Path:
    """The path that a file:// URL stands for."""
    host, slash, rest = url[7:].partition("/")
    path = os.fsdecode(unquote_to_bytes(slash + rest))
    if host.lower() not in ("", "localhost") or not slash or any(c in rest for c in "?#") or "\0" in path:
        raise SettingsError(
            f"{url} names no folder of this machine: no host may follow file://, and ? and # are written %3F and %23; "
            "write the path itself (/data/store) or file:///data/store"
        )
    return Path(path)


def local(place: PurePath, why: str) -> Path:
    """The place, if it is a local folder.

    Raises:
        StoreError: it is behind a URL; `why` says what cannot be done there.
    """
    if isinstance(place, Path):
        return place
    raise StoreError(
        f"{place} is behind a URL, where stores can only be read: {why} needs a local folder in DECANT_STORE"
    )


def bytes_of(place: PurePath, most: int | None = None) -> bytes | None:
    """A whole small file, or None if there is none.

    Raises:
        StoreError: larger than `most` bytes or than memory, no plain file, or not to be had from its server.
    """
    try:
        if isinstance(place, RemotePath):
            assert most is not None  # a server may send without end
            (data,) = fetch([Range(str(place), 0, most + 1)], may_end_early=True)
            size = len(data or b"")
        else:
            path = Path(place)
            size = path.stat().st_size
            if not path.is_file():  # a pipe would never end
                raise StoreError(f"{place} is no file; delete it and make it again")
            data = path.read_bytes() if most is None or size <= most else b""
    except FileNotFoundError:
        return None
    except MemoryError:
        raise StoreError(f"{place} takes more memory than there is; make it again") from None
    if most is not None and size > most:
        raise StoreError(f"{place} has {size:,} bytes or more, and may have {most:,}; delete it and make it again")
    return data
