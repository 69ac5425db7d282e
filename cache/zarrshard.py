"""Rows in, the bytes and metadata of Zarr v3 out: whole shards with a checksum per chunk, laid in order.

Written by hand for one reason: through zarr-python whole shards are written at less than half of the disk's speed and
read at a thirtieth (docs/decisions/0003). What lies on disk is plain Zarr v3 (`sharding_indexed`, `bytes`, `crc32c`),
which the tests read back with zarr-python and tensorstore.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeVar

import google_crc32c
import numpy as np
from jaxtyping import Shaped, UInt64

from cache.codecs import CODECS, Codec
from cache.errors import StoreError
from cache.places import bytes_of
from cache.publish import publish_file, write_json

Place = TypeVar("Place", bound=PurePath)
CRC_BYTES = 4
MAX_COLUMN_BYTES = 2**40
NO_CHUNK = 2**64 - 1  # the mark of an absent chunk in a shard's index (Zarr v3, sharding codec)


@dataclass(frozen=True, slots=True)
class ArraySpec:
    """What one array of a store is: rows of `width` features in a codec, or samples where `width` is None."""

    name: str
    width: int | None
    """D: features of a frame, before encoding."""
    codec: str
    """One of `cache.codecs.CODECS`."""

    @property
    def coding(self) -> Codec:
        """The codec itself."""
        return CODECS[self.codec]

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of one stored number."""
        return self.coding.dtype

    @property
    def inner(self) -> tuple[int, ...]:
        """Shape of one row on disk: (W,), or () of a wave."""
        return () if self.width is None else (self.coding.row_width(self.width),)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * math.prod(self.inner)


@dataclass(frozen=True, slots=True)
class Grid:
    """How the rows of all arrays of a store are cut."""

    chunk_rows: int
    shard_rows: int

    @property
    def chunks(self) -> int:
        """Chunks in a shard."""
        return self.shard_rows // self.chunk_rows


def crc32c(data: Any) -> bytes:
    """CRC-32C of a buffer as Zarr stores it: four bytes, little-endian."""
    view = np.frombuffer(data, dtype=np.uint8)
    view.flags.writeable = False  # the C function takes nothing that could change under it
    return struct.pack("<I", google_crc32c.value(view))


def shard_bytes(num_rows: int, spec: ArraySpec, grid: Grid) -> int:
    """Bytes of the file that `encode_shard` makes of so many rows: whole chunks with their checksums, and the index."""
    chunks = -(-num_rows // grid.chunk_rows)
    return chunks * (grid.chunk_rows * spec.row_bytes + CRC_BYTES) + 16 * grid.chunks + CRC_BYTES


def encode_shard(rows: Shaped[np.ndarray, "R ..."], spec: ArraySpec, grid: Grid) -> Iterator[bytes | memoryview]:
    """One shard file, piece by piece: R <= shard_rows rows, cut into chunks, each with its checksum, then the index.

    The pieces are views of `rows` where they can be, so that nothing is copied before it is written.
    """
    assert rows.dtype == spec.dtype
    assert len(rows) <= grid.shard_rows
    chunk_bytes = grid.chunk_rows * spec.row_bytes
    used = -(-len(rows) // grid.chunk_rows)
    flat = np.ascontiguousarray(rows).reshape(-1).view(np.uint8)
    flat.flags.writeable = False
    for c in range(used):
        data = flat[c * chunk_bytes : (c + 1) * chunk_bytes]
        if len(data) < chunk_bytes:  # the end of the last chunk is fill
            fill = np.full(chunk_bytes // spec.dtype.itemsize, spec.coding.fill, dtype=spec.dtype).view(np.uint8)
            data = np.concatenate([data, fill[len(data) :]])
        yield data.data
        yield crc32c(data)
    index = np.full((grid.chunks, 2), NO_CHUNK, dtype="<u8")
    index[:used, 0] = np.arange(used) * (chunk_bytes + CRC_BYTES)
    index[:used, 1] = chunk_bytes + CRC_BYTES
    yield index.tobytes()
    yield crc32c(index)


def decode_index(data: bytes, grid: Grid, where: object) -> UInt64[np.ndarray, "N 2"]:
    """Offset and size of each chunk of a shard, from the last bytes of its file.

    Raises:
        StoreError: cut short, or its checksum differs.
    """
    body = data[:-CRC_BYTES]
    if len(body) != 16 * grid.chunks or crc32c(body) != data[-CRC_BYTES:]:
        raise StoreError(f"{where}: the shard's index is damaged; run the extraction again to replace the shard")
    return np.frombuffer(body, dtype="<u8").astype(np.uint64).reshape(-1, 2)


def array_metadata(spec: ArraySpec, grid: Grid, num_rows: int) -> dict[str, Any]:
    """The zarr.json of a sharded array."""
    inner = list(spec.inner)
    sharding = {
        "chunk_shape": [grid.chunk_rows, *inner],
        "codecs": _checked_bytes(spec.dtype),
        "index_codecs": _checked_bytes(np.dtype("uint64")),
        "index_location": "end",
    }
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [num_rows, *inner],
        "data_type": spec.coding.stored,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [grid.shard_rows, *inner]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": spec.coding.fill,
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        "dimension_names": ["row"] if spec.width is None else ["row", "channel"],
        "attributes": {},
    }


def shard_path(store: Place, spec: ArraySpec, shard: int) -> Place:
    """The file of one shard: Zarr's default chunk keys."""
    return store / spec.name / "c" / (str(shard) if spec.width is None else f"{shard}/0")


def _checked_bytes(dtype: np.dtype[Any]) -> list[dict[str, Any]]:
    if dtype.itemsize == 1:  # one byte has no order, and tensorstore refuses one
        return [{"name": "bytes"}, {"name": "crc32c"}]
    return [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def write_column(directory: Path, values: Shaped[np.ndarray, "..."]) -> None:
    """Write a small array as a Zarr array of one checked chunk."""
    body = values.astype(values.dtype.newbyteorder("<")).tobytes()
    place = column_path(directory, values.ndim)
    place.parent.mkdir(parents=True, exist_ok=True)
    with publish_file(place) as partial:
        partial.write_bytes(body + crc32c(body))
    write_json(directory / "zarr.json", column_metadata(values.shape, values.dtype.name))


def column_metadata(shape: tuple[int, ...], dtype: str) -> dict[str, Any]:
    """The zarr.json of a small array of one chunk."""
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": dtype,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": _checked_bytes(np.dtype(dtype)),
        "attributes": {},
    }


def column_path(directory: Place, ndim: int = 1) -> Place:
    """The one chunk of a small array."""
    return directory.joinpath("c", *["0"] * ndim)


def read_column(
    directory: PurePath, dtype: str, ndim: int = 1, most: int = MAX_COLUMN_BYTES
) -> Shaped[np.ndarray, " N"]:
    """Read what `write_column` wrote, flat; it cannot be written to.

    Raises:
        StoreError: missing, damaged, or more than `most` bytes.
    """
    data = bytes_of(column_path(directory, ndim), most + CRC_BYTES)
    if data is None:
        raise StoreError(f"{directory} is missing from the store; delete the store and extract again")
    body = memoryview(data)[:-CRC_BYTES]
    if crc32c(body) != data[-CRC_BYTES:] or len(body) % np.dtype(dtype).itemsize:
        raise StoreError(f"{directory} is damaged; delete the store and extract again")
    return np.frombuffer(body, dtype=dtype)
