"""One shard of a job in, the encoded rows of its utterances out.

With a CUDA device three things happen at a time: a thread reads and pads the next waveforms, the device runs the model and
encodes, and rows of the last batch are copied to the host and put in their place. On a CPU one thing follows the other:
threads of Python beside a forward there cost it more (a fifth of its speed, of a tiny model) than what they would hide.
A shard is a pure function of its job: restarts, other processes and other machines of the same kind give the same rows.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from cache import codecs
from cache.codecs import CODECS, Codec, Tables
from cache.errors import DataError
from cache.ragged import Store
from pipeline.codecs import DeviceTables, can_hold, encode, to_device
from pipeline.extraction.job import Job
from pipeline.extraction.windows import Piece
from pipeline.forward import forward_batches, mean_of
from pipeline.upstream import Upstream

BATCHES_BEHIND = 2  # encoded, and not yet in their place

Rows = Shaped[np.ndarray, "R ..."]


class Encoded(NamedTuple):
    """One array of one batch, on the host."""

    rows: Shaped[np.ndarray, "B T W"]
    finite: Bool[np.ndarray, "B T"]
    """Which of them decode to finite numbers."""


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
        meanwhile: called after every batch.

    Raises:
        DataError: features that are not finite in the codec; the utterance and the array are named.
    """
    params, codec = job.params, CODECS[job.params.codec]
    on_host = job.device == "cpu"
    on_device = {} if on_host else {name: to_device(tables[name], job.device) for name in out}
    first_row = shard * job.plan.shard_rows
    waiting: deque[Future[None]] = deque()
    with ThreadPoolExecutor(1, "place") as behind:
        for pieces, layers in forward_batches(
            *(upstream, job.manifest, waves, job.plan.utterances(shard)),
            *(params.long, params.batch_seconds, job.device),
        ):
            encoded = {}
            for name in out:
                frames = mean_of(layers, name)
                encoded[name] = (
                    partial(_encode_on_host, frames, codec, tables[name])
                    if on_host
                    else _encode_on_device(frames, codec, on_device[name])
                )
            if on_host:
                _place(job, first_row, pieces, encoded, out)
            else:
                waiting.append(behind.submit(_place, job, first_row, pieces, encoded, out))
                if len(waiting) > BATCHES_BEHIND:
                    waiting.popleft().result()
            meanwhile()
        for future in waiting:
            future.result()


def _encode_on_host(frames: Float[Tensor, "B T D"], codec: Codec, tables: Tables) -> Encoded:
    """By what is faster there, for the same bits: torch for plain floats, numpy (three to five times) for int8."""
    if codec.name in ("float32", "float16"):
        rows = encode(frames, codec, {})
        return Encoded(rows.numpy(), can_hold(frames, rows, codec).numpy())
    given = frames.numpy()
    encoded = codecs.encode(given, codec, tables)
    return Encoded(encoded, codecs.can_hold(given, encoded, codec))


def _encode_on_device(frames: Float[Tensor, "B T D"], codec: Codec, tables: DeviceTables) -> Callable[[], Encoded]:
    """Encodes at once; what it gives waits until the rows have come to the host, beside the next forward."""
    rows = encode(frames, codec, tables)
    made = [rows, can_hold(frames, rows, codec)]
    side = torch.cuda.Stream(frames.device)
    side.wait_stream(torch.cuda.current_stream(frames.device))
    with torch.cuda.stream(side):
        on_host = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t, non_blocking=True) for t in made]
        for tensor in made:
            tensor.record_stream(side)  # its memory is not given to others before the copy is done
        arrived = side.record_event()

    def fetch() -> Encoded:
        arrived.synchronize()
        return Encoded(*(tensor.numpy() for tensor in on_host))

    return fetch


def _place(
    job: Job,
    first_row: int,
    pieces: Sequence[Piece],
    encoded: Mapping[str, Callable[[], Encoded]],
    out: Mapping[str, Rows],
) -> None:
    for array, fetch in encoded.items():
        rows, finite = fetch()
        for b, piece in enumerate(pieces):
            if not finite[b, piece.kept].all():
                raise DataError(
                    f"{job.manifest[piece.utterance].id}: {array} has values that are not finite in {job.params.codec}; "
                    "look at the recording, or set extract.codec: float32"
                )
            at = int(job.plan.start[piece.utterance]) + piece.first - first_row
            out[array][at : at + piece.num_kept] = rows[b, piece.kept]
