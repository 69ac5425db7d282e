"""Codecs on the device: a layer's frames in, the rows that are stored out; rows of several layers in, frames out.

The meaning of every row is `cache.codecs`, in numpy; here is the same in torch, where the model is, so that encoded
rows and not float32 frames cross to the host while extracting, and back while training.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped, UInt8
from torch import Tensor

from cache.codecs import CODEWORDS, INT8_PEAK, MAX_SWEEPS, SCALE_BYTES, Codec, Tables
from cache.ragged import Store

DeviceTables = dict[str, Tensor]


def to_device(tables: Tables, device: torch.device | str) -> DeviceTables:
    """The tables of one layer as tensors."""
    return {name: torch.from_numpy(table).to(device) for name, table in tables.items()}


def encode(frames: Float[Tensor, "*B D"], codec: Codec, tables: DeviceTables) -> Shaped[Tensor, "*B W"]:
    """The rows of some frames of one layer; bfloat16 is given as its bits."""
    frames = frames.float()
    if codec.name == "bfloat16":
        return frames.bfloat16().view(torch.uint16)
    if not codec.tables:
        return frames.to(getattr(torch, codec.stored))
    standard = (frames - tables["mean"]) / tables["std"]
    return choose_codewords(standard, tables["codebooks"]) if codec.codebooks else _to_int8(standard)


def can_hold(frames: Float[Tensor, "*B D"], rows: Shaped[Tensor, "*B W"], codec: Codec) -> Bool[Tensor, "*B"]:
    """Which frames became rows that decode to finite numbers."""
    if codec.codebooks:
        return frames.isfinite().all(-1)
    if codec.name == "int8":
        return rows[..., -SCALE_BYTES:].contiguous().view(torch.float16).isfinite().all(-1)
    if codec.name == "float16":  # a sum in float32 cannot overflow, and takes a tenth of the time of looking at each
        return rows.sum(-1, dtype=torch.float32).isfinite()
    return (rows.view(torch.bfloat16) if codec.name == "bfloat16" else rows).isfinite().all(-1)


def _to_int8(standard: Float[Tensor, "*B D"]) -> UInt8[Tensor, "*B W"]:
    peak = standard.abs().amax(-1, keepdim=True)
    scale = (peak / INT8_PEAK).half()
    low = scale.float() * INT8_PEAK < peak  # rounded down: the next float16 up, so that nothing is clipped
    scale = (scale.view(torch.int16) + low).view(torch.float16)
    step = torch.where(scale == 0, 1.0, scale.float())
    codes = (standard / step).round().to(torch.int8)
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], dim=-1)


def choose_codewords(
    standard: Float[Tensor, "*B D"], codebooks: Float[Tensor, "M 256 D"], sweeps: int = MAX_SWEEPS
) -> UInt8[Tensor, "*B M"]:
    """One entry of each codebook, greedily and then in turn given all others (`cache.codecs.encode`)."""
    left = standard.reshape(-1, standard.shape[-1]).clone()  # what the chosen entries leave over
    halves = codebooks.square().sum(-1) / 2  # (M, 256)
    codes = torch.zeros(len(left), len(codebooks), dtype=torch.int64, device=left.device)
    for sweep in range(sweeps):
        before = codes.clone()
        for m, book in enumerate(codebooks):
            if sweep:
                left += book[codes[:, m]]
            codes[:, m] = torch.addmm(-halves[m], left, book.T).argmax(-1)
            left -= book[codes[:, m]]
        if sweep and bool((codes == before).all()):
            break
    return codes.to(torch.uint8).reshape(*standard.shape[:-1], len(codebooks))


class Decoder:
    """Rows of N layers of one store to frames, on a device."""

    def __init__(self, store: Store, arrays: Sequence[str], device: torch.device | str) -> None:
        """Bring the tables of the layers to the device.

        Raises:
            StoreError: a table is missing or damaged.
        """
        self.codec = store.spec("").coding
        tables = [to_device(store.tables(array), device) for array in arrays]
        self.tables = {name: torch.stack([t[name] for t in tables]) for name in self.codec.tables}

    def __call__(self, rows: Shaped[Tensor, "B N T W"]) -> Float[Tensor, "B N T D"]:
        """The frames, as float32. Rows of zeros after an utterance's end become frames that mean nothing."""
        if self.codec.name == "bfloat16":
            return rows.view(torch.bfloat16).float()
        if not self.codec.tables:
            return rows.float()
        standard = self._sum_codewords(rows) if self.codec.codebooks else _from_int8(rows)
        return standard * self.tables["std"][:, None] + self.tables["mean"][:, None]

    def _sum_codewords(self, rows: UInt8[Tensor, "B N T M"]) -> Float[Tensor, "B N T D"]:
        """Sum the entries, as one lookup in the codebooks of all layers laid one after another."""
        num, books = rows.shape[1], self.codec.codebooks
        table = self.tables["codebooks"].reshape(num * books * CODEWORDS, -1)
        first = torch.arange(num * books, device=rows.device).reshape(num, 1, books) * CODEWORDS
        entries = (rows.long() + first).reshape(-1, books)
        return torch.nn.functional.embedding_bag(entries, table, mode="sum").reshape(*rows.shape[:-1], -1)


def _from_int8(rows: UInt8[Tensor, "*B W"]) -> Float[Tensor, "*B D"]:
    scale = rows[..., -SCALE_BYTES:].contiguous().view(torch.float16)
    return rows[..., :-SCALE_BYTES].view(torch.int8) * scale.float()
