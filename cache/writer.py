"""Rows of whole shards in, a growing store out: each shard written beside, flushed, renamed, and only then recorded.

One process writes a store at a time (`cache.process.exclusive`); `cache.writers` lets it have helpers.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Int64, Shaped

from cache.codecs import Tables
from cache.errors import ResourceError, StoreError
from cache.header import FORMAT, JOURNAL, MAX_JSON_BYTES, check_array, read_header, write_header
from cache.journal import Journal
from cache.plan import StorePlan, plan_rows
from cache.process import exclusive
from cache.publish import fsync, named_io_errors, partial_of, read_json, write_json
from cache.scatter import start_flush
from cache.tables import describe_tables, read_tables, table_names, tables_bytes, write_tables
from cache.zarrshard import ArraySpec, Grid, array_metadata, encode_shard, shard_bytes, shard_path

PIECES_AT_ONCE = 64  # of a shard, in one call to the kernel: 32 chunks and their checksums
FLUSH_BYTES = 8 * 2**20  # what the disk is told to start on while more comes


class StoreWriter:
    """The one writer of a store. Use `open_writer`."""

    def __init__(
        self, directory: Path, plan: StorePlan, specs: Sequence[ArraySpec], grid: Grid, lock: int | None = None
    ) -> None:
        self.directory, self.plan, self.grid = directory, plan, grid
        self.lock = lock  # handle of the store's lock, for processes that write on its behalf
        self.specs = {s.name: s for s in specs}
        self.journal = Journal(directory)

    def missing(self) -> dict[int, list[str]]:
        """Shards that still have to be made, and which arrays of each: not committed, or no longer as committed."""
        todo: dict[int, list[str]] = {}
        unfitted = {name for name in self.specs if self.tables(name) is None}
        for shard in range(self.plan.num_shards):
            names = [n for n in self.specs if n in unfitted or not self._is_whole(n, shard)]
            if names:
                todo[shard] = names
        return todo

    def tables(self, array: str) -> Tables | None:
        """What the codec of an array was fitted with, {} if it needs nothing; None if that is still to be done."""
        spec = self.specs[array]
        there = describe_tables(self.directory, spec)
        if any(
            there.get(name) is None or there[name] != self.journal.rows.get((name, 0))
            for name in table_names(spec).values()
        ):
            return None
        return read_tables(self.directory, spec)

    def write_tables(self, array: str, tables: Tables) -> None:
        """Commit what the codec of an array was fitted with; shards of it that are there were encoded with other tables."""
        self.journal.keep_only({place: row for place, row in self.journal.rows.items() if place[0] != array})
        for name, (size, digest) in write_tables(self.directory, self.specs[array], tables).items():
            self.journal.append(name, 0, size, digest)

    def _is_whole(self, array: str, shard: int) -> bool:
        row = self.journal.rows.get((array, shard))
        path = shard_path(self.directory, self.specs[array], shard)
        return row is not None and path.exists() and path.stat().st_size == row[0]

    def write(self, array: str, shard: int, rows: Shaped[np.ndarray, "R ..."]) -> None:
        """Commit one shard of one array: all its rows up to the end of its last utterance."""
        assert len(rows) == self.plan.used_rows(shard)
        spec = self.specs[array]
        path = shard_path(self.directory, spec, shard)
        size, digest = write_shard(path, encode_shard(rows, spec, self.grid))
        self.journal.append(array, shard, size, digest)

    def adopt(self, array: str, shard: int, name: str, size: int, digest: str) -> None:
        """Commit one shard that another process, on this machine or elsewhere, wrote whole to the file `name` beside it.

        Raises:
            StoreError: the file is not here, or not whole.
        """
        path = shard_path(self.directory, self.specs[array], shard)
        partial = path.with_name(Path(name).name)
        found = partial.stat().st_size if partial.exists() else None
        if found != size:
            raise StoreError(
                f"{partial} was written with {size} bytes elsewhere and here it "
                f"{'is absent' if found is None else f'has {found}'}; "
                "set DECANT_STORE to a disk that all workers share with this process"
            )
        with named_io_errors(path):
            _rename(partial, path)
        self.journal.append(array, shard, size, digest)

    def predicted_bytes(self) -> int:
        """Bytes that the missing shards and tables will take."""
        shards = sum(
            shard_bytes(self.plan.used_rows(shard), self.specs[name], self.grid)
            for shard, names in self.missing().items()
            for name in names
        )
        return shards + sum(tables_bytes(spec) for spec in self.specs.values() if self.tables(spec.name) is None)

    def check_space(self) -> None:
        """Refuse before the first forward what will not fit.

        Raises:
            ResourceError: the disk has less free than the missing shards take.
        """
        need, free = self.predicted_bytes(), shutil.disk_usage(self.directory).free
        if need > free:
            raise ResourceError(
                f"{self.directory} needs {need / 1e9:.2f} GB more and the disk has {free / 1e9:.2f} GB free; "
                "free space, keep fewer layers, or set DECANT_STORE to a larger disk"
            )


@contextmanager
def open_writer(
    directory: Path, header: dict[str, Any], ids: Sequence[str], rows: Int64[np.ndarray, " U"], arrays: Sequence[str]
) -> Iterator[StoreWriter]:
    """Make a store or go on with it, holding its lock.

    Args:
        directory: the folder of the store.
        header: kind, key, fingerprint, codec, width, chunk_rows, shard_rows.
        ids: the utterances, in the manifest's order.
        rows: rows of each.
        arrays: the arrays to be written in this run; others may already be there.

    Raises:
        ResourceError: another process writes it, or the disk refuses.
        StoreError: what lies there is not this store.
    """
    grid = Grid(header["chunk_rows"], header["shard_rows"])
    plan = plan_rows(rows, grid.shard_rows)
    specs = [ArraySpec(name, header["width"], header["codec"]) for name in arrays]
    with named_io_errors(directory), exclusive(directory / "writer.lock") as lock:
        if not (directory / "zarr.json").exists():
            # a header is on the disk before the first line of its journal is: this journal is nobody knows whose
            (directory / JOURNAL).unlink(missing_ok=True)
            fsync(directory)
            write_header(directory, header, ids, rows)
        elif awaits_header(directory, header["key"]):
            write_header(directory, header, ids, rows)
        elif (found := read_header(directory))["key"] != header["key"]:
            raise StoreError(f"{directory} holds the store {found['key']}, not {header['key']}; move it away")
        clear_partials(directory)
        for spec in specs:
            if not (directory / spec.name / "zarr.json").exists():
                (directory / spec.name).mkdir(exist_ok=True)
                write_json(directory / spec.name / "zarr.json", array_metadata(spec, grid, plan.num_rows))
            check_array(directory, spec, grid, plan.num_rows)
        yield StoreWriter(directory, plan, specs, grid, lock)


def await_header(directory: Path, key: str) -> None:
    """Leave of a damaged header only whose it was: the next `open_writer` of that key writes header and columns anew."""
    write_json(directory / "zarr.json", _bare_header(key))


def awaits_header(directory: Path, key: str) -> bool:
    """Whether the header of a store is what `await_header` left there for this key."""
    try:
        return bool(read_json(directory / "zarr.json", MAX_JSON_BYTES) == _bare_header(key))
    except StoreError:
        return False


def _bare_header(key: str) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": {"decant": {"format": FORMAT, "key": key}}}


def clear_partials(directory: Path) -> None:
    """Remove what killed writers left. The caller holds the store's lock: nobody else publishes a file there."""
    for partial in directory.rglob(".*.partial"):
        partial.unlink(missing_ok=True)


def write_shard(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Publish one shard, made of `pieces`; gives its bytes and xxh3-128."""
    partial = partial_of(path)
    with named_io_errors(path):
        size, digest = write_partial(partial, pieces)
        _rename(partial, path)
    return size, digest


def write_partial(partial: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Write one shard, made of `pieces`, to a file that nobody reads yet, and flush it; gives its bytes and xxh3-128.

    Each piece is hashed and written while the processor still has it at hand, and the disk starts on it before the
    last one is there.
    """
    digest, size, begun = xxhash.xxh3_128(), 0, 0
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "wb", buffering=0) as file:
        some: list[bytes | memoryview] = []
        for piece in pieces:
            digest.update(piece)
            some.append(piece)
            if len(some) == PIECES_AT_ONCE:
                size += _write_all(file, some)
                some = []
                if size - begun >= FLUSH_BYTES:
                    start_flush(file.fileno(), begun, size - begun)
                    begun = size
        size += _write_all(file, some)
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _rename(partial: Path, path: Path) -> None:
    os.replace(partial, path)
    fsync(path.parent)


def _write_all(file: FileIO, pieces: list[bytes | memoryview]) -> int:
    size = sum(map(len, pieces))
    done = os.writev(file.fileno(), pieces)
    if done < size:  # a signal, or a disk that is nearly full: the next write says which
        rest = memoryview(b"".join(pieces))[done:]
        while rest:
            rest = rest[file.write(rest) :]
    return size
