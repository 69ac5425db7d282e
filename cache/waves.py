"""Waveforms in manifest order in, a wave store out, with one shard in memory."""

import os
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from jaxtyping import Int16

from cache.errors import DataError
from cache.header import write_header
from cache.journal import Journal
from cache.plan import plan_rows
from cache.process import exclusive
from cache.publish import fsync, named_io_errors, write_json
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
