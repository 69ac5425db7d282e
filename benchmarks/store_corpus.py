"""The benchmark's data: the same numbers as a store, as plain files and as HDF5, and what the page cache holds of them.

The plain files are cut like the store: one a layer and shard. It matters: reading a file brings it into the page cache
in steps of the read-ahead (8 MiB here), whose folios grow from 4 KiB to 2 MiB, and copying from small folios is slower
(here 9 to 10 GB/s against 14 to 16). Of one long file a tenth lies in small folios, of a shard of 100 MB nearly half.
Against one long plain file a layer, the store's reader therefore seemed 7 % slower than it is.
"""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from cache.frames import num_frames
from cache.receipts import make_receipt, store_key, store_path
from cache.writer import open_writer

WIDTH, CHUNK, SHARD, LAYERS, BATCH = 768, 64, 65_536, 4, 32
ROW = 2 * WIDTH  # bytes of a row
NAMES = [f"layer-{i:02d}" for i in range(LAYERS)]
MAX_FRAMES = num_frames(16 * 16_000)
SEED = 0


class Corpus:
    """Everything in one folder; DECANT_STORE points into it. Small enough to send to another process."""

    def __init__(self, place: Path, utterances: int) -> None:
        self.place = place
        rng = np.random.default_rng(SEED)
        self.rows = np.array([num_frames(int(s)) for s in rng.uniform(16_000, 256_000, utterances)], dtype=np.int64)
        self.begin = np.concatenate([[0], np.cumsum(self.rows)])  # in the HDF5 file
        os.environ["DECANT_STORE"] = str(place / "store")
        fingerprint = {"model": "bench"}
        self.header = {"kind": "features", "key": store_key("features", fingerprint), "fingerprint": fingerprint}
        self.header |= {"codec": "float16", "width": WIDTH, "chunk_rows": CHUNK, "shard_rows": SHARD}
        self.store = store_path("features", str(self.header["key"]))
        with self.writer(self.store, NAMES) as writer, h5py.File(place / "all.h5", "w") as hdf:
            self.start = writer.plan.start
            self.num_shards = writer.plan.num_shards
            for name in NAMES:
                dataset = hdf.create_dataset(name, (int(self.begin[-1]), WIDTH), np.float16)
                for shard in range(self.num_shards):
                    which = writer.plan.utterances(shard)
                    lo, hi = int(self.begin[which[0]]), int(self.begin[which[-1] + 1])
                    rows = random_rows(rng, hi - lo)
                    writer.write(name, shard, rows)
                    dataset[lo:hi] = rows
                    self.plain(name, shard).write_bytes(rows.data)
        self.receipt = make_receipt(self.store, NAMES)
        self.files = [p for p in place.rglob("*") if p.is_file()]
        for file in self.files:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())  # what is dirty cannot be dropped

    @property
    def size(self) -> int:
        """Bytes of all rows of all layers."""
        return int(self.rows.sum()) * LAYERS * ROW

    def plain(self, name: str, shard: int) -> Path:
        """The plain file with a shard's rows."""
        return self.place / f"{name}-{shard}.raw"

    def shard(self, name: str, shard: int) -> Path:
        """The store's file of a shard."""
        return self.store / name / "c" / str(shard) / "0"

    def writer(self, place: Path, names: list[str]) -> Any:
        """Open a store of these utterances for writing."""
        ids = [f"u{u}" for u in range(len(self.rows))]
        return open_writer(place, self.header, ids, self.rows, names)

    def drop(self) -> None:
        """Drop all files from the page cache."""
        for file in self.files:
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)

    def warm(self, rng: np.random.Generator) -> None:
        """Bring all files into the page cache anew, in a random order, so that none keeps the pages it was dealt.

        Three times: the kernel notes the first uses of a page, and that must not fall on whoever reads it first.
        """
        self.drop()
        for number in rng.permutation(np.repeat(np.arange(len(self.files)), 3)):
            with open(self.files[number], "rb", buffering=0) as handle:
                while handle.read(2**22):
                    pass

    def draw(self, rng: np.random.Generator) -> list[int]:
        """A batch of different utterances."""
        return rng.choice(len(self.rows), BATCH, replace=False).tolist()

    def bytes_of(self, batches: list[list[int]]) -> int:
        """Useful bytes of some batches."""
        return sum(int(self.rows[batch].sum()) for batch in batches) * LAYERS * ROW


def random_rows(rng: np.random.Generator, count: int) -> np.ndarray:
    """Float16 rows of random finite bits below 2: nothing that a file system could compress."""
    return (rng.integers(0, 2**16, (count, WIDTH), dtype=np.uint16) & 0xBFFF).view(np.float16)
