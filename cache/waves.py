"""Waveforms in manifest order in, a wave store out, with one shard in memory."""

import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Int16

from cache.errors import DataError, ResourceError
from cache.header import COLUMNS, write_header
from cache.journal import Journal, read_journal
from cache.plan import plan_rows
from cache.process import exclusive
from cache.publish import fsync, named_io_errors, partial_of, write_json
from cache.verify import verify_store
from cache.writer import write_shard
from cache.zarrshard import ArraySpec, Grid, array_metadata, encode_shard, shard_path

WAVE_GRID = Grid(chunk_rows=16_384, shard_rows=2**24)  # 32 KiB and 32 MiB: 17 minutes of speech a file


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
        """Write the last shard and the columns, and give the store its name under `stores`.

        A sound store that has the name already is the same one: it stays.

        Raises:
            ResourceError: what has the name cannot be moved aside, or the disk refuses.
        """
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
            if not self._is_at(place):
                self._move_to(place)
        return place

    def _is_at(self, place: Path) -> bool:
        """Whether a store lies there that has the facts of the one just made, every byte of it as committed."""
        facts = [
            "zarr.json",
            "wave/zarr.json",
            *(f"{column}/{file}" for column in COLUMNS for file in ("zarr.json", "c/0")),
        ]
        return (
            all((place / f).is_file() and (place / f).read_bytes() == (self.directory / f).read_bytes() for f in facts)
            and read_journal(place).rows == self.journal.rows
            and all(f.kind in ("extra", "leftover") for f in verify_store(place, full=True).findings)
        )

    def _move_to(self, place: Path) -> None:
        """Give the store its name; what has it so far is gone only when the new one is in its place."""
        old = partial_of(place)
        try:
            _remove(old)  # of a preparation or a clean-up that was killed
            if os.path.lexists(place):
                os.replace(place, old)
            os.replace(self.directory, place)
        except OSError as error:
            raise ResourceError(
                f"{place} is in the way and cannot be moved aside ({error.strerror}); move it away and run this again"
            ) from error
        fsync(self.stores)
        if old.is_symlink():
            print(f"{place} was a link, and is a folder now; what is at {old.readlink()} stays", file=sys.stderr)
        _remove(old)


def _remove(place: Path) -> None:
    if place.is_symlink() or place.is_file():
        place.unlink()
    else:
        shutil.rmtree(place, ignore_errors=True)
