"""Rows of whole shards in, a growing store out: each shard written beside, flushed, renamed, and only then recorded.

The journal (`journal.jsonl`, one line per committed shard of an array) is the record. What it does not name does not
exist: after kill -9 a shard is either committed or made again.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Int16, Int64, Shaped

from cache.codecs import Tables
from cache.errors import DataError, ResourceError, StoreError
from cache.header import JOURNAL, check_array, read_header, write_header
from cache.places import bytes_of, local
from cache.plan import StorePlan, plan_rows
from cache.process import exclusive
from cache.publish import fsync, named_io_errors, publish_file, write_json
from cache.scatter import start_flush
from cache.tables import describe_tables, read_tables, table_names, tables_bytes, write_tables
from cache.zarrshard import ArraySpec, Grid, array_metadata, encode_shard, shard_bytes, shard_path

WAVE_GRID = Grid(chunk_rows=16_384, shard_rows=2**24)  # 32 KiB and 32 MiB: 17 minutes of speech a file
PIECES_AT_ONCE = 64  # of a shard, in one call to the kernel: 32 chunks and their checksums
FLUSH_BYTES = 8 * 2**20  # what the disk is told to start on while more comes


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
            write_header(directory, header, ids, rows)
        elif (found := read_header(directory))["key"] != header["key"]:
            raise StoreError(f"{directory} holds the store {found['key']}, not {header['key']}; move it away")
        for partial in directory.rglob(".*.partial"):  # what a killed writer left
            partial.unlink()
        for spec in specs:
            if not (directory / spec.name / "zarr.json").exists():
                (directory / spec.name).mkdir(exist_ok=True)
                write_json(directory / spec.name / "zarr.json", array_metadata(spec, grid, plan.num_rows))
            check_array(directory, spec, grid, plan.num_rows)
        yield StoreWriter(directory, plan, specs, grid, lock)


def write_shard(path: Path, pieces: Iterable[bytes | memoryview]) -> tuple[int, str]:
    """Publish one shard, made of `pieces`; gives its bytes and xxh3-128.

    Each piece is hashed and written while the processor still has it at hand, and the disk starts on it before the
    last one is there.
    """
    partial = path.with_name(f".{path.name}.partial")
    digest, size, begun = xxhash.xxh3_128(), 0, 0
    with named_io_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
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
        os.replace(partial, path)
        fsync(path.parent)
    return size, digest.hexdigest()


def _write_all(file: FileIO, pieces: list[bytes | memoryview]) -> int:
    size = sum(map(len, pieces))
    done = os.writev(file.fileno(), pieces)
    if done < size:  # a signal, or a disk that is nearly full: the next write says which
        rest = memoryview(b"".join(pieces))[done:]
        while rest:
            rest = rest[file.write(rest) :]
    return size


class WaveWriter:
    """Waveforms in manifest order, a wave store out; one shard in memory.

    The store's key is known only when the manifest is, so the store grows in a folder of its own and takes its name in
    `finish`.
    """

    def __init__(self, stores: Path) -> None:
        self.stores = stores
        self.spec = ArraySpec("wave", None, "int16")
        self.ids: list[str] = []
        self.rows: list[int] = []
        self._shard: list[Int16[np.ndarray, " S"]] = []
        self._num_shards = 0

    def __enter__(self) -> "WaveWriter":
        self._lock = ExitStack()
        self.directory = self.stores / ".partial"
        with named_io_errors(self.stores):
            self._lock.enter_context(exclusive(self.stores / "writer.lock"))
            shutil.rmtree(self.directory, ignore_errors=True)  # what a killed preparation left
            self.directory.mkdir()
        self.journal = Journal(self.directory)
        return self

    def __exit__(self, *error: object) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)  # gone already after `finish`
        self._lock.close()

    def add(self, utterance_id: str, wave: Int16[np.ndarray, " S"]) -> str:
        """Append one utterance; gives the xxh3-128 of its samples.

        Raises:
            DataError: longer than a shard.
        """
        if len(wave) > WAVE_GRID.shard_rows:
            raise DataError(
                f"{utterance_id} has {len(wave)} samples, more than a shard of {WAVE_GRID.shard_rows}; cut it"
            )
        if sum(map(len, self._shard)) + len(wave) > WAVE_GRID.shard_rows:
            self._flush()
        self._shard.append(wave)
        self.ids.append(utterance_id)
        self.rows.append(len(wave))
        return xxhash.xxh3_128_hexdigest(wave.tobytes())

    def _flush(self) -> None:
        data = encode_shard(np.concatenate(self._shard), self.spec, WAVE_GRID)
        size, digest = write_shard(shard_path(self.directory, self.spec, self._num_shards), data)
        self.journal.append("wave", self._num_shards, size, digest)
        self._num_shards += 1
        self._shard = []

    def finish(self, key: str, fingerprint: dict[str, Any]) -> Path:
        """Write the last shard and the columns, and give the store its name under `stores`."""
        self._flush()
        rows = np.array(self.rows, dtype=np.int64)
        header = {
            "kind": "waves",
            "key": key,
            "fingerprint": fingerprint,
            "codec": "int16",
            "width": None,
            "chunk_rows": WAVE_GRID.chunk_rows,
            "shard_rows": WAVE_GRID.shard_rows,
        }
        metadata = array_metadata(self.spec, WAVE_GRID, plan_rows(rows, WAVE_GRID.shard_rows).num_rows)
        write_json(self.directory / "wave" / "zarr.json", metadata)
        write_header(self.directory, header, self.ids, rows)
        place = self.stores / key
        with named_io_errors(place):
            if place.exists():
                shutil.rmtree(place)
            os.replace(self.directory, place)
            fsync(self.stores)
        return place
