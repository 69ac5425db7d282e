"""The layers of one batch in, their encoded rows in the place where the shard has them out."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from cache import codecs
from cache.codecs import Codec, Tables
from cache.errors import DataError
from pipeline.codecs import DeviceTables, can_hold, encode
from pipeline.extraction.job import Job
from pipeline.extraction.windows import Piece

Rows = Shaped[np.ndarray, "R ..."]


class Encoded(NamedTuple):
    """One array of one batch, on the host."""

    rows: Shaped[np.ndarray, "B T W"]
    finite: Bool[np.ndarray, "B T"]
    """Which of them decode to finite numbers."""


def encode_on_host(frames: Float[Tensor, "B T D"], codec: Codec, tables: Tables) -> Encoded:
    """By what is faster there, for the same bits: torch for plain floats, numpy (three to five times) for int8."""
    if codec.name in ("float32", "float16"):
        rows = encode(frames, codec, {})
        return Encoded(rows.numpy(), can_hold(frames, rows, codec).numpy())
    given = frames.numpy()
    encoded = codecs.encode(given, codec, tables)
    return Encoded(encoded, codecs.can_hold(given, encoded, codec))


def encode_on_device(frames: Float[Tensor, "B T D"], codec: Codec, tables: DeviceTables) -> Callable[[], Encoded]:
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


def place(
    job: Job,
    shard: int,
    pieces: Sequence[Piece],
    encoded: Mapping[str, Callable[[], Encoded]],
    out: Mapping[str, Rows],
) -> None:
    """Put the rows of one batch where the shard has them; no two batches share a row.

    Raises:
        DataError: features that are not finite in the codec; the utterance and the array are named.
    """
    first_row = shard * job.plan.shard_rows
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
