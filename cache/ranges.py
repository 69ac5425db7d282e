"""Byte ranges of files behind URLs in, exactly those bytes out, or one error that names the file and the range.

Through fsspec, so a store can lie wherever DVC can push to. Many ranges are under way at once. One that fails or comes
short is asked for again a few times; an answer of another length never counts. Connections live in a thread that a fork
does not copy, so each process opens its own.
"""

import os
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from cache.errors import SettingsError, StoreError

CONNECTIONS = 32  # ranges under way at once
TRIES = 4
PAUSE_SEC = 0.2  # before the second try, and twice as long before each one after
REMEDY = "check the connection and the server, and run the same command again"

_opened: dict[str, tuple[int, Any]] = {}  # protocol -> the process that opened it, and its file system
_left_behind: list[
    Any
] = []  # of the process we were forked from: collecting one would close connections under its feet


class Range(NamedTuple):
    """Bytes [start, end) of a file."""

    url: str
    start: int
    end: int


def fetch(wanted: Sequence[Range], may_end_early: bool = False) -> list[bytes | None]:
    """The bytes of every range, None of a file that is not there.

    Args:
        wanted: of one protocol, none of them empty.
        may_end_early: the files may be shorter than the ranges: what there is of each is enough.

    Raises:
        StoreError: a range cannot be had, or the server sends other bytes than those asked for.
        SettingsError: nothing is installed that reads such URLs.
    """
    got: dict[int, bytes | None] = {}
    left = list(range(len(wanted)))
    wrong: dict[int, Exception] = {}
    for attempt in range(TRIES):
        if not left:
            break
        if attempt:
            time.sleep(PAUSE_SEC * 2 ** (attempt - 1))
        wrong = {}
        for n, answer in zip(left, _ask([wanted[n] for n in left]), strict=True):
            url, start, end = wanted[n]
            if isinstance(answer, FileNotFoundError):
                got[n] = None
            elif isinstance(answer, (StoreError, PermissionError)):
                raise StoreError(f"{url}: {answer}; {REMEDY}") from answer
            elif isinstance(answer, Exception):
                wrong[n] = answer
            elif isinstance(answer, BaseException):
                raise answer
            elif len(answer) > end - start:
                raise StoreError(f"{url}: {end - start:,} bytes were asked for and {len(answer):,} came; {REMEDY}")
            elif len(answer) < end - start and not may_end_early:
                wrong[n] = EOFError(f"{len(answer):,} of {end - start:,} bytes came")
            else:
                got[n] = answer
        left = list(wrong)
    if not left:
        return [got[n] for n in range(len(wanted))]
    url, start, end = wanted[left[0]]
    reason = wrong[left[0]]
    said = f"{type(reason).__name__}: {reason}".splitlines()[0][:200]
    raise StoreError(f"{url}: bytes {start} to {end} did not come in {TRIES} tries ({said}); {REMEDY}") from reason


def _ask(wanted: Sequence[Range]) -> list[Any]:
    """One request a range; what each gave, errors included."""
    system = _file_system(wanted[0].url.partition("://")[0])
    paths = [system._strip_protocol(r.url) for r in wanted]
    at_once = {"batch_size": CONNECTIONS} if system.async_impl else {}
    answers: list[Any] = system.cat_ranges(
        paths, [r.start for r in wanted], [r.end for r in wanted], on_error="return", **at_once
    )
    return answers


def _file_system(protocol: str) -> Any:
    """What reads URLs of a protocol in this process."""
    process, system = _opened.get(protocol, (0, None))
    if process != os.getpid():
        if system is not None:
            _left_behind.append(system)
        _opened[protocol] = os.getpid(), (system := _open(protocol))
    return system


def _open(protocol: str) -> Any:
    try:
        import fsspec

        if protocol in ("http", "https"):
            from cache.webranges import WebRanges

            return WebRanges(skip_instance_cache=True)
        return fsspec.filesystem(protocol, skip_instance_cache=True)
    except (ImportError, ValueError) as error:
        raise SettingsError(
            f"{protocol}:// cannot be read here ({error}); `uv pip install --editable '.[remote]'`, "
            "and s3fs, gcsfs or adlfs for a bucket"
        ) from error
