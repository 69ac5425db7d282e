"""Shards of a job in, the encoded rows of their utterances out: in lanes on a CPU, batch after batch on a GPU.

With a CUDA device three things happen at a time: a thread reads and pads the next waveforms, the device runs the model and
encodes, and rows of the last batch are copied to the host and put in their place. On a CPU the batches run side by side
(`pipeline.extraction.lanes`). A shard is a pure function of its job: restarts, other processes and other machines of the
same kind give the same rows.
"""

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from cache.codecs import CODECS, Tables
from cache.ragged import Store
from pipeline.codecs import to_device
from pipeline.extraction.encoded import Rows, encode_on_device, place
from pipeline.extraction.job import Job
from pipeline.extraction.lanes import Lanes
from pipeline.forward import forward_batches, mean_of
from pipeline.upstream import Upstream

BATCHES_BEHIND = 2  # encoded, and not yet in their place


class OneByOne:
    """Fills shards with a CUDA device; what `Lanes` is on a CPU."""

    shards_at_once = 1

    def __init__(self, upstream: Upstream, job: Job, waves: Store) -> None:
        self._upstream, self._job, self._waves = upstream, job, waves
        self._behind = ThreadPoolExecutor(1, "place")

    def fill(self, shard: int, tables: Mapping[str, Tables], out: Mapping[str, Rows]) -> list[Future[None]]:
        """Fill `out`, per array, with the rows of one shard; the last batches are on their way to the host.

        Raises:
            DataError: features that are not finite in the codec, or too few frames; the utterance is named.
        """
        job, codec = self._job, CODECS[self._job.params.codec]
        on_device = {name: to_device(tables[name], job.device) for name in out}
        waiting: deque[Future[None]] = deque()
        for pieces, outputs in forward_batches(
            *(self._upstream, job.manifest, self._waves, job.plan.utterances(shard)),
            *(job.params.long, job.params.batch_seconds, job.device),
        ):
            encoded = {name: encode_on_device(mean_of(outputs, name), codec, on_device[name]) for name in out}
            waiting.append(self._behind.submit(place, job, shard, pieces, encoded, out))
            if len(waiting) > BATCHES_BEHIND:
                waiting.popleft().result()
        return list(waiting)

    def __enter__(self) -> "OneByOne":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._behind.shutdown(cancel_futures=True)


def open_filler(upstream: Upstream, job: Job, waves: Store) -> Lanes | OneByOne:
    """What fills shards on the job's device: begin some with `fill`, wait for what it gives."""
    return (Lanes if job.device == "cpu" else OneByOne)(upstream, job, waves)


def fill_shard(
    upstream: Upstream,
    job: Job,
    waves: Store,
    shard: int,
    tables: Mapping[str, Tables],
    out: Mapping[str, Rows],
    meanwhile: Callable[[], None],
) -> None:
    """Fill `out`, per array, with the encoded rows of one shard.

    Args:
        upstream: the model, on the job's device.
        job: the extraction.
        waves: the waveforms.
        shard: its number in the plan.
        tables: per array of `out`, what its codec was fitted with.
        out: room for all rows of the shard, per array.
        meanwhile: called after every batch that was waited for.

    Raises:
        DataError: features that are not finite in the codec; the utterance and the array are named.
    """
    with open_filler(upstream, job, waves) as filler:
        for batch in filler.fill(shard, tables, out):
            batch.result()
            meanwhile()
