"""Extraction: a model and a wave store in, what is kept of the model in a feature store and its receipt out.

The unit of work is a shard, planned before the first forward: its utterances are sorted by length, run in padded batches,
encoded and written as whole files, one per array. A shard is committed or it is not; a run that was killed makes only what
is missing, and layers asked for later are added to the same store.
"""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from cache.codecs import CODECS
from cache.manifest import Manifest
from cache.ragged import Store
from cache.receipts import make_receipt
from cache.writer import StoreWriter, open_writer
from cache.writers import ShardPool
from pipeline.calibrate import fit_tables, sample_arrays
from pipeline.extraction.job import Job, check_waves, plan_job
from pipeline.extraction.settings import ExtractParams, Keep
from pipeline.extraction.shard import open_filler
from pipeline.forward import draw_utterances
from pipeline.upstream import Upstream

Tick = Callable[..., None]


def extract(
    upstream: Upstream,
    manifest: Manifest,
    waves: Store,
    params: ExtractParams,
    keep: Keep,
    device: str,
    tick: Tick,
    writers: int | None = None,
) -> dict[str, Any]:
    """Bring a store up to date with a model, in this process, and give its receipt.

    Args:
        upstream: the model, on `device`.
        manifest: the utterances, in the order of the store.
        waves: their waveforms.
        params: how features are stored.
        keep: what of the model is kept, of which utterances.
        device: where the model is.
        tick: told the audio-seconds of each shard as it is committed, and with found=True of those found committed.
        writers: processes that write whole shards beside the computing; 0 writes in this one. None is one for a GPU,
            which this process has to keep busy, and 0 for a CPU, where it waits for its lanes anyway.

    Raises:
        SettingsError: a layer the model does not have, or an utterance larger than a shard.
        DataError: an utterance that is too long, or features that are not finite in the codec; it is named.
        ResourceError: another writer, or not enough space.
    """
    job = plan_job(upstream, manifest, params, keep, device)
    check_waves(job.manifest, waves)
    with open_job(job, tick) as (writer, committed):
        fit_arrays(upstream, job, waves, writer)
        if writers is None:
            writers = 0 if job.device == "cpu" else 1
        # one shard is written while the next is computed; waiting for a buffer bounds memory to two
        with (
            ShardPool(writer, writers, shard_buffers=2, committed=committed) as pool,
            open_filler(upstream, job, waves) as filler,
        ):
            begun: deque[tuple[int, list[str], list[Future[None]]]] = deque()

            def finish() -> None:
                shard, arrays, batches = begun.popleft()
                for batch in batches:
                    batch.result()
                    pool.record()
                for array in arrays:
                    pool.commit(array, shard)

            for shard, arrays in writer.missing().items():
                if len(begun) == filler.shards_at_once:
                    finish()
                buffers = {array: pool.buffer(array, shard) for array in arrays}
                begun.append((shard, arrays, filler.fill(shard, tables_of(writer, arrays), buffers)))
            while begun:
                finish()
    return make_receipt(job.directory, job.arrays)


@contextmanager
def open_job(job: Job, tick: Tick) -> Iterator[tuple[StoreWriter, Callable[[str, int], None]]]:
    """The writer of a job's store, and what to call when the journal has a shard of an array.

    Raises:
        ResourceError: another writer, or not enough space.
    """
    with open_writer(job.directory, job.header, [u.id for u in job.manifest], job.rows, job.arrays) as writer:
        writer.check_space()
        left = {shard: len(arrays) for shard, arrays in writer.missing().items()}
        tick(sum(job.seconds(s) for s in range(job.plan.num_shards) if s not in left), found=True)

        def committed(_: str, shard: int) -> None:
            left[shard] -= 1
            if not left[shard]:
                tick(job.seconds(shard))

        yield writer, committed


def fit_arrays(upstream: Upstream, job: Job, waves: Store, writer: StoreWriter) -> None:
    """Fit the codec to those arrays of the store that it is not fitted to yet, on drawn utterances."""
    names = [name for name in writer.specs if writer.tables(name) is None]
    if not names:
        return
    params = job.params
    drawn = draw_utterances(job.manifest, params.calibration.seconds, params.calibration.seed)
    for name, frames in sample_arrays(
        upstream, job.manifest, waves, drawn, names, params.long, params.batch_seconds, job.device
    ):
        writer.write_tables(name, fit_tables(frames, CODECS[params.codec], params.calibration.seed))


def tables_of(writer: StoreWriter, arrays: list[str]) -> dict[str, Any]:
    """What the codec of each array was fitted with; all are by now."""
    return {array: writer.tables(array) or {} for array in arrays}
