"""The benchmark's readers: a corpus in, functions out that each bring one batch of all layers into the same buffer.

`preadv` is the bar: a Python loop of `os.preadv` over plain files. `preadv of the shards` is the same loop on the store's
own files, on the very same pages: checksums come along, so it is a bar and not a reader. Of the others, zarr-python,
zarrs and tensorstore read our store and verify what they read; h5py has one contiguous dataset a layer.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import tensorstore
import zarr
from store_corpus import BATCH, CHUNK, LAYERS, MAX_FRAMES, NAMES, ROW, SHARD, WIDTH, Corpus

from cache.children import Line
from cache.receipts import open_receipt

IN_FLIGHT = 16  # requests at a time, for the cold rows that have more than one

Read = Callable[[list[int]], None]


class Contenders:
    """Open files of every contender, and the batch buffer (B, L, T, D) they all fill."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self.out = np.zeros((BATCH, LAYERS, MAX_FRAMES, WIDTH), dtype=np.float16)
        self.flat = memoryview(self.out.reshape(-1).view(np.uint8))
        self.rows, self.begin, self.start = corpus.rows.tolist(), corpus.begin.tolist(), corpus.start.tolist()
        shards = range(corpus.num_shards)
        self.plain = [[os.open(corpus.plain(n, s), os.O_RDONLY) for s in shards] for n in NAMES]
        self.shards = [[os.open(corpus.shard(n, s), os.O_RDONLY) for s in shards] for n in NAMES]
        self.maps: list[list[np.ndarray]] = []
        self.loose, self.checked = open_receipt(corpus.receipt), open_receipt(corpus.receipt, verify=True)
        self.hdf = h5py.File(corpus.place / "all.h5")
        self.datasets = [self.hdf[n] for n in NAMES]
        self.zarrs_of = {"zarr-python": [zarr.open_array(corpus.store / n, mode="r") for n in NAMES]}
        with zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline", "threading.max_workers": 2}):
            self.zarrs_of["zarrs"] = [zarr.open_array(corpus.store / n, mode="r") for n in NAMES]
        driver = {"driver": "zarr3"}
        self.tensorstores = [
            tensorstore.open({**driver, "kvstore": {"driver": "file", "path": str(corpus.store / n)}}).result()
            for n in NAMES
        ]
        self.threads = ThreadPoolExecutor(IN_FLIGHT)
        self.stores = [open_receipt(corpus.receipt) for _ in range(IN_FLIGHT)]
        self.reads: dict[str, Read] = {
            "preadv": self._preadv,
            "preadv of the shards": self._preadv_of_shards,
            "preadv + zeros": self._preadv_padded,
            "memmap": self._memmap,
            "gather": lambda batch: void(self.loose.read_into(batch, NAMES, self.out)),
            "gather, verified": lambda batch: void(self.checked.read_into(batch, NAMES, self.out)),
            "read_batch": lambda batch: void(self.loose.read_batch(batch, NAMES, out=self.out)),
            "read_batch, verified": lambda batch: void(self.checked.read_batch(batch, NAMES, out=self.out)),
            "zarr-python": lambda batch: self._zarr(batch, "zarr-python"),
            "zarrs": lambda batch: self._zarr(batch, "zarrs"),
            "tensorstore": self._tensorstore,
            "h5py": self._hdf5,
            f"preadv, {IN_FLIGHT} in flight": self._preadv_threads,
            f"gather, {IN_FLIGHT} in flight": self._gather_threads,
        }

    def forget(self) -> None:
        """Let go of what keeps pages in the page cache: a mapped page cannot be dropped."""
        self.maps = []

    def _pieces(self, batch: list[int]) -> list[tuple[int, int, int, int]]:
        """Place in the batch, utterance, shard and first row in it."""
        return [(b, u, *divmod(self.start[u], SHARD)) for b, u in enumerate(batch)]

    def _preadv(self, batch: list[int]) -> None:
        for b, u in enumerate(batch):
            self._preadv_one(b, u)

    def _preadv_one(self, b: int, u: int) -> None:
        shard, row = divmod(self.start[u], SHARD)
        size = self.rows[u] * ROW
        for a in range(LAYERS):
            at = (b * LAYERS + a) * MAX_FRAMES * ROW
            assert os.preadv(self.plain[a][shard], [self.flat[at : at + size]], row * ROW) == size

    def _preadv_of_shards(self, batch: list[int]) -> None:
        for b, u in enumerate(batch):
            shard, row = divmod(self.start[u], SHARD)
            chunk, inside = divmod(row, CHUNK)
            size = self.rows[u] * ROW  # the checksums among the rows come too, and as many bytes of rows stay out
            for a in range(LAYERS):
                at = (b * LAYERS + a) * MAX_FRAMES * ROW
                offset = chunk * (CHUNK * ROW + 4) + inside * ROW
                assert os.preadv(self.shards[a][shard], [self.flat[at : at + size]], offset) == size

    def _preadv_padded(self, batch: list[int]) -> None:
        self._preadv(batch)
        for b, u in enumerate(batch):
            self.out[b, :, self.rows[u] :] = 0

    def _preadv_threads(self, batch: list[int]) -> None:
        list(self.threads.map(self._preadv_one, range(len(batch)), batch))

    def _gather_threads(self, batch: list[int]) -> None:
        def some(t: int) -> None:
            self.stores[t].read_into(batch[t::IN_FLIGHT], NAMES, self.out[t : len(batch) : IN_FLIGHT])

        list(self.threads.map(some, range(min(IN_FLIGHT, len(batch)))))

    def _memmap(self, batch: list[int]) -> None:
        if not self.maps:
            paths = [[self.corpus.plain(n, s) for s in range(self.corpus.num_shards)] for n in NAMES]
            self.maps = [[np.memmap(p, np.float16, "r").reshape(-1, WIDTH) for p in some] for some in paths]
        for b, u, shard, row in self._pieces(batch):
            for a in range(LAYERS):
                self.out[b, a, : self.rows[u]] = self.maps[a][shard][row : row + self.rows[u]]

    def _hdf5(self, batch: list[int]) -> None:
        for b, u in enumerate(batch):
            for a, source in enumerate(self.datasets):
                source.read_direct(self.out[b, a, : self.rows[u]], np.s_[self.begin[u] : self.begin[u + 1]])

    def _zarr(self, batch: list[int], name: str) -> None:
        for b, u in enumerate(batch):
            for a, source in enumerate(self.zarrs_of[name]):
                self.out[b, a, : self.rows[u]] = source[self.start[u] : self.start[u] + self.rows[u]]

    def _tensorstore(self, batch: list[int]) -> None:
        futures = [
            (b, a, u, s[self.start[u] : self.start[u] + self.rows[u]].read())
            for b, u in enumerate(batch)
            for a, s in enumerate(self.tensorstores)
        ]
        for b, a, u, future in futures:
            self.out[b, a, : self.rows[u]] = future.result()


def void(_: object) -> None:
    """For a reader whose result nobody looks at: the bytes are in the buffer."""


def serve(line: Line, corpus: Corpus) -> None:
    """A worker process: (contender, batches, whether nothing may stay mapped) in, "done" and "ready" out."""
    contenders = Contenders(corpus)
    line.send("up")
    while True:
        name, batches, forget = line.recv()
        for batch in batches:
            contenders.reads[name](batch)
        line.send("done")
        if forget:
            contenders.forget()
        line.send("ready")


class GatherInto:
    """What the ring's workers do: one batch of the store into a slot."""

    def __init__(self, corpus: Corpus) -> None:
        self.store = open_receipt(corpus.receipt)

    def __call__(self, batch: list[int], slot: np.ndarray) -> int:
        out = slot.view(np.float16).reshape(BATCH, LAYERS, MAX_FRAMES, WIDTH)
        return int(self.store.read_into(batch, NAMES, out).sum()) * LAYERS * ROW
