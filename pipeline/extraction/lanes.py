"""Shards of a job in, their encoded rows in place out, on a CPU: batches side by side, one core for each.

A small model does not fill two cores with one batch: its operations are short, and after each of them the faster core
waits. Two batches on a core each run a Base model 1.4 times as fast (docs/log.md). A lane reads and pads its batch, runs
the model, encodes and places the rows, and takes the next batch, of the next shard if need be.

One torch thread computes a batch, however many lanes there are: their number changes no bit.
"""

import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from types import TracebackType

import torch

from cache.codecs import CODECS, Tables
from cache.ragged import Store
from pipeline.extraction.encoded import Rows, encode_on_host, place
from pipeline.extraction.job import Job
from pipeline.extraction.windows import Piece, piece_batches
from pipeline.forward import forward, mean_of, read_batch
from pipeline.upstream import Upstream


class Lanes:
    """As many batches at a time as torch has threads. A context manager: leaving it gives up what has not begun."""

    shards_at_once = 2
    """While one is written, the lanes are busy with the next."""

    def __init__(self, upstream: Upstream, job: Job, waves: Store) -> None:
        self._upstream, self._job, self._waves = upstream, job, waves
        self._reading = threading.Lock()  # a store's reader opens and closes files for one caller at a time
        self._threads = torch.get_num_threads()
        self._pool = ThreadPoolExecutor(self._threads, "lane", initializer=torch.set_num_threads, initargs=(1,))

    def fill(self, shard: int, tables: Mapping[str, Tables], out: Mapping[str, Rows]) -> list[Future[None]]:
        """Begin to fill `out`, per array, with the rows of one shard; it is full when all batches are done."""
        job = self._job
        batches = piece_batches(job.manifest, job.plan.utterances(shard), job.params.long, job.params.batch_seconds)
        return [self._pool.submit(self._run, shard, pieces, tables, out) for pieces in batches]

    def _run(self, shard: int, pieces: list[Piece], tables: Mapping[str, Tables], out: Mapping[str, Rows]) -> None:
        job, codec = self._job, CODECS[self._job.params.codec]
        with self._reading:
            batch = read_batch(job.manifest, self._waves, pieces, job.device)
        _, outputs = forward(self._upstream, job.manifest, batch, job.device)
        encoded = {name: partial(encode_on_host, mean_of(outputs, name), codec, tables[name]) for name in out}
        place(job, shard, pieces, encoded, out)

    def __enter__(self) -> "Lanes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)  # threads begun later take the number that was set last, in any thread
