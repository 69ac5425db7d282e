"""Feature frames in, the rows that lie on disk out, and back: what each codec of the format means, in numpy.

This is the reference, for readers that have nothing else; extraction and training do the same in torch on their device
(`pipeline.codecs`). A codec has a type on disk and a row width of its own. Those that adapt to their layer also have
tables (per-channel statistics, codebooks), fitted once on a sample, stored beside the layer and named in the receipt.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Shaped, UInt8, UInt16

CODEWORDS = 256  # entries of a codebook: one byte
INT8_PEAK = 127
SCALE_BYTES = 2  # of int8: a float16 after the values of each frame

BFLOAT16_EXPONENT = np.uint16(0x7F80)  # all ones: infinite, or no number
MAX_SWEEPS = 4  # of choosing codewords; a fifth changes no digit of the error that is printed

Tables = dict[str, Float32[np.ndarray, "..."]]
"""What was fitted to a layer: "mean" and "std" (D,), and of mvq "codebooks" (M, 256, D) over standardised channels."""


@dataclass(frozen=True, slots=True)
class Codec:
    """How a frame of D numbers lies on disk."""

    name: str
    stored: str
    """Zarr's name of the type on disk."""
    tables: tuple[str, ...] = ()
    """What is fitted to each layer before its first frame is written."""
    codebooks: int = 0
    """M: bytes a frame of mvq."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of one stored number."""
        return np.dtype(self.stored)

    @property
    def fill(self) -> Any:
        """What lies where there is no frame."""
        return "NaN" if self.dtype.kind == "f" else 0

    def row_width(self, width: int) -> int:
        """Stored numbers a frame of `width` features takes."""
        if self.codebooks:
            return self.codebooks
        return width + SCALE_BYTES if self.name == "int8" else width

    def table_shape(self, table: str, width: int) -> tuple[int, ...]:
        """Shape of one of its tables."""
        return (self.codebooks, CODEWORDS, width) if table == "codebooks" else (width,)


MVQ = tuple(Codec(f"mvq{m}", "uint8", ("mean", "std", "codebooks"), m) for m in (8, 16, 32))
CODECS = {
    codec.name: codec
    for codec in (
        Codec("float32", "float32"),
        Codec("float16", "float16"),
        Codec("bfloat16", "uint16"),  # its bits: Zarr v3 has no bfloat16 that every reader knows
        Codec("int8", "uint8", ("mean", "std")),
        *MVQ,
        Codec("int16", "int16"),  # waveforms
    )
}
FEATURE_CODECS = tuple(name for name in CODECS if name != "int16")


def encode(frames: Float32[np.ndarray, "*B D"], codec: Codec, tables: Tables) -> Shaped[np.ndarray, "*B W"]:
    """The rows of some frames.

    Greedy for mvq: each codebook in turn takes the entry nearest to what the ones before left over, and then each is
    chosen anew given all others until none changes, at most `MAX_SWEEPS` times (iterated conditional modes; Babenko
    and Lempitsky, Additive Quantization, CVPR 2014).
    """
    if codec.name == "bfloat16":
        return _to_bfloat16(frames)
    if not codec.tables:
        with np.errstate(over="ignore"):  # infinite in float16: extraction refuses such frames
            return frames.astype(codec.dtype)
    with np.errstate(invalid="ignore"):
        standard = (frames - tables["mean"]) / tables["std"]
    return _choose_codewords(standard, tables["codebooks"]) if codec.codebooks else _to_int8(standard)


def can_hold(
    frames: Float32[np.ndarray, "*B D"], rows: Shaped[np.ndarray, "*B W"], codec: Codec
) -> Bool[np.ndarray, "*B"]:
    """Which frames became rows that decode to finite numbers; codewords always do, whatever they stand for."""
    if codec.codebooks:
        return np.isfinite(frames).all(-1)
    if codec.name == "int8":
        return np.isfinite(np.ascontiguousarray(rows[..., -SCALE_BYTES:]).view("<f2")[..., 0])
    if codec.name == "bfloat16":
        return ((rows & BFLOAT16_EXPONENT) != BFLOAT16_EXPONENT).all(-1)
    return np.isfinite(rows).all(-1)


def decode(rows: Shaped[np.ndarray, "*B W"], codec: Codec, tables: Tables) -> Float32[np.ndarray, "*B D"]:
    """The frames of some rows, as float32."""
    if codec.name == "bfloat16":
        return (rows.astype(np.uint32) << 16).view(np.float32)
    if not codec.tables:
        return rows.astype(np.float32)
    if codec.codebooks:
        standard = np.zeros((*rows.shape[:-1], len(tables["mean"])), dtype=np.float32)
        for m in range(codec.codebooks):
            standard += tables["codebooks"][m][rows[..., m]]
    else:
        scale = np.ascontiguousarray(rows[..., -SCALE_BYTES:]).view("<f2").astype(np.float32)
        standard = np.ascontiguousarray(rows[..., :-SCALE_BYTES]).view(np.int8).astype(np.float32) * scale
    return standard * tables["std"] + tables["mean"]


def _to_bfloat16(frames: Float32[np.ndarray, "*B D"]) -> UInt16[np.ndarray, "*B D"]:
    """The upper halves, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(frames).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    kept = (rounded >> np.uint32(16)).astype(np.uint16)
    quiet = (bits >> np.uint32(16)).astype(np.uint16) | np.uint16(0x40)
    return np.where(np.isnan(frames), quiet, kept)


def _to_int8(standard: Float32[np.ndarray, "*B D"]) -> UInt8[np.ndarray, "*B W"]:
    """Symmetric, one scale a frame: the largest magnitude over 127, rounded up to a float16 so that nothing is clipped."""
    peak = np.abs(standard).max(-1, keepdims=True)
    with np.errstate(over="ignore", invalid="ignore"):  # a scale that is not finite is what extraction looks for
        scale = (peak / np.float32(INT8_PEAK)).astype(np.float16)
        low = scale.astype(np.float32) * np.float32(INT8_PEAK) < peak
        scale = (scale.view(np.int16) + low).astype(np.int16).view(np.float16)
        step = np.where(scale == 0, np.float32(1), scale.astype(np.float32))
        codes = np.rint(standard / step).astype(np.int8).view(np.uint8)
    return np.concatenate([codes, scale.astype("<f2").view(np.uint8)], axis=-1)


def _choose_codewords(
    standard: Float32[np.ndarray, "*B D"], codebooks: Float32[np.ndarray, "M 256 D"]
) -> UInt8[np.ndarray, "*B M"]:
    with np.errstate(over="ignore", invalid="ignore"):  # `can_hold` tells frames that are not finite
        return _nearest_sum(standard, codebooks)


def _nearest_sum(
    standard: Float32[np.ndarray, "*B D"], codebooks: Float32[np.ndarray, "M 256 D"]
) -> UInt8[np.ndarray, "*B M"]:
    left = standard.reshape(-1, standard.shape[-1]).copy()  # what the chosen entries leave over
    halves = np.square(codebooks).sum(-1) / 2  # (M, 256)
    codes = np.zeros((len(left), len(codebooks)), dtype=np.uint8)
    for sweep in range(MAX_SWEEPS):
        before = codes.copy()
        for m, book in enumerate(codebooks):
            if sweep:
                left += book[codes[:, m]]
            codes[:, m] = (left @ book.T - halves[m]).argmax(-1)  # argmin of |left - entry|^2
            left -= book[codes[:, m]]
        if sweep and (codes == before).all():
            break
    return codes.reshape(*standard.shape[:-1], len(codebooks))
