"""The record of a store: one line per committed shard of an array. What it does not name does not exist.

It is only ever appended to, each line flushed before it counts, so that after kill -9 a shard is either committed or
made again. `Journal` is what writers and readers trust, and refuses a damaged file; `read_journal` is for looking at one.
"""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePath

from cache.errors import StoreError
from cache.header import JOURNAL
from cache.places import bytes_of, local
from cache.publish import named_io_errors, publish_file


class Journal:
    """Committed shards: (array, shard) -> (bytes, xxh3-128)."""

    def __init__(self, store: PurePath, most: int | None = None) -> None:
        """Read what there is; behind a URL no more than `most` bytes."""
        self.path = store / JOURNAL
        self.rows: dict[tuple[str, int], tuple[int, str]] = {}
        data = bytes_of(self.path, most) or b""
        self.whole_bytes = data.rfind(b"\n") + 1  # after kill -9 the last line may be torn: it does not count
        for number, line in enumerate(data[: self.whole_bytes].splitlines(), 1):
            try:
                row = json.loads(line)
                array, shard, size, digest = row["array"], row["shard"], row["bytes"], row["xxh3"]
                if (type(array), type(shard), type(size), type(digest)) != (str, int, int, str):
                    raise TypeError(row)
                self.rows[array, shard] = size, digest
            except (ValueError, KeyError, TypeError, RecursionError):
                raise StoreError(f"{self.path}, line {number} is damaged; delete {store} and extract again") from None

    def append(self, array: str, shard: int, size: int, digest: str) -> None:
        """Record a shard; it counts once the line is on the disk."""
        line = journal_line(array, shard, size, digest)
        path = local(self.path, "writing")
        with named_io_errors(path), open(path, "ab") as file:
            if file.tell() != self.whole_bytes:
                file.truncate(self.whole_bytes)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self.whole_bytes += len(line)
        self.rows[array, shard] = size, digest

    def keep_only(self, rows: dict[tuple[str, int], tuple[int, str]]) -> None:
        """Write the journal anew, in one rename."""
        if rows == self.rows:
            return
        lines = [journal_line(*place, *row) for place, row in rows.items()]
        with publish_file(local(self.path, "writing")) as partial:
            partial.write_bytes(b"".join(lines))
        self.rows, self.whole_bytes = dict(rows), sum(map(len, lines))


def journal_line(array: str, shard: int, size: int, digest: str) -> bytes:
    """How the journal records one committed file."""
    return json.dumps({"array": array, "shard": shard, "bytes": size, "xxh3": digest}).encode() + b"\n"


@dataclass(frozen=True)
class JournalText:
    """A journal read line by line, damaged lines put aside where `Journal` refuses the file."""

    rows: dict[tuple[str, int], tuple[int, str]]
    damaged: list[int]
    torn: bool


def read_journal(directory: Path) -> JournalText:
    """The committed shards of a store, and the numbers of the lines that are no record of one."""
    path = directory / JOURNAL
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    rows: dict[tuple[str, int], tuple[int, str]] = {}
    damaged = []
    for number, line in enumerate(data[:whole].split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            array, shard, size, digest = row["array"], row["shard"], row["bytes"], row["xxh3"]
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(number)
            continue
        sound = isinstance(array, str) and type(shard) is int and type(size) is int and isinstance(digest, str)
        if sound and set(row) == {"array", "shard", "bytes", "xxh3"} and re.fullmatch("[0-9a-f]{32}", digest):
            rows[array, shard] = size, digest
        else:
            damaged.append(number)
    return JournalText(rows, damaged, torn=whole < len(data))
