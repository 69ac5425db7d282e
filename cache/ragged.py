"""The ragged store: a folder of sharded Zarr arrays in, the rows of any utterances out.

A store is a Zarr v3 group. Each of its arrays ("layer-04", "wave") holds the rows of all utterances one after another,
cut into the same shards; the columns `start`, `rows`, `ids` and `id_end` say where each utterance lies. Reading one
utterance of one array is one `preadv` into the caller's buffer: each shard's index is read once, and the checksums
between the chunks are stepped over, or compared if `verify` is set.
"""

import os
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped, UInt64

from cache.errors import StoreError
from cache.frames import FrameSpan
from cache.plan import StorePlan, plan_rows
from cache.publish import canonical_json, read_json, write_json
from cache.scatter import Reads, read_checked, read_rows
from cache.zarrshard import (
    CRC_BYTES,
    ArraySpec,
    Grid,
    array_metadata,
    decode_index,
    read_column,
    shard_path,
    write_column,
)

MAX_OPEN_SHARDS = 512  # file handles a reader keeps from one call to the next
FORMAT = 1  # raised by one when a reader of the old format would read wrong numbers


def layer_name(layer: int) -> str:
    """Name of the array that holds one layer: layer 0 is the input of the first block."""
    return f"layer-{layer:02d}"


def layer_of(name: str) -> int:
    """The layer an array's name stands for."""
    return int(name.removeprefix("layer-"))


class Store:
    """A store on disk, read-only: what utterances it has and the rows of each.

    Safe to use after a fork and from several threads (reads carry their own offset); pickling sends the path alone.
    """

    def __init__(self, directory: Path, arrays: Sequence[str] = (), verify: bool = False) -> None:
        """Open without checking the shards: `cache.receipts` opens against a receipt.

        Args:
            directory: the folder of the store.
            arrays: names of the arrays that were asked for.
            verify: compare the checksum of every chunk that is read.
        """
        self.directory = Path(directory)
        self.verify = verify
        header = read_header(self.directory)
        self.kind: str = header["kind"]
        self.key: str = header["key"]
        self.fingerprint: dict[str, Any] = header["fingerprint"]
        self.codec: str = header["codec"]
        self.width: int | None = header["width"]
        self.grid = Grid(header["chunk_rows"], header["shard_rows"])
        self.arrays = {name: ArraySpec(name, self.width, self.codec) for name in arrays}
        self.rows: Int64[np.ndarray, " U"] = read_column(self.directory / "rows", "<i8").astype(np.int64)
        self._open: dict[tuple[str, int], tuple[int, int]] = {}

    @cached_property
    def plan(self) -> StorePlan:
        """Where every utterance lies."""
        return plan_rows(self.rows, self.grid.shard_rows)

    @cached_property
    def ids(self) -> list[str]:
        """Utterance ids, in order."""
        text = read_column(self.directory / "ids", "u1").tobytes()
        ends = read_column(self.directory / "id_end", "<i8").tolist()
        return [text[a:b].decode() for a, b in zip([0, *ends[:-1]], ends, strict=True)]

    @cached_property
    def index(self) -> dict[str, int]:
        """Number of each utterance id."""
        return {name: u for u, name in enumerate(self.ids)}

    def spec(self, array: str) -> ArraySpec:
        """What an array of this store is."""
        return ArraySpec(array, self.width, self.codec)

    def _number(self, utterance: int | str) -> int:
        if isinstance(utterance, str):
            try:
                return self.index[utterance]
            except KeyError:
                raise StoreError(
                    f"{self.directory} has no utterance {utterance!r}; it was made from another manifest"
                ) from None
        return utterance

    def read(self, array: str, utterance: int | str, span: FrameSpan | None = None) -> Shaped[np.ndarray, "T ..."]:
        """Rows of one utterance: (T, D), or (S,) of a wave; all of it, or the frames of `span`."""
        u = self._number(utterance)
        rows = slice(0, int(self.rows[u])) if span is None else (span.samples if self.width is None else span.rows)
        inner = () if self.width is None else (self.width,)
        out = np.empty((max(rows.stop - rows.start, 0), *inner), dtype=self.codec)
        begin, count = np.array([rows.start]), np.array([rows.stop - rows.start])
        self._gather(array, np.array([u]), begin, count, np.array([out.ctypes.data]))
        return out

    def read_batch(
        self,
        utterances: Sequence[int | str],
        arrays: Sequence[str],
        spans: Sequence[FrameSpan] | None = None,
        out: Shaped[np.ndarray, "B L T D"] | None = None,
    ) -> tuple[Shaped[np.ndarray, "B L T D"], Int64[np.ndarray, " B"]]:
        """Many utterances of many layers in one call.

        Returns:
            (B, L, T, D) with zeros after the end of each utterance, and the (B,) frame counts. `out` is used where
            it is given: a reused buffer saves its page faults. Its T may be larger than the longest utterance.
        """
        numbers = np.array([self._number(u) for u in utterances])
        begin = np.zeros_like(numbers) if spans is None else np.array([s.start for s in spans])
        counts = self.rows[numbers] if spans is None else np.array([s.count for s in spans])
        if out is None:
            out = np.empty((len(numbers), len(arrays), int(counts.max()), self.width or 1), dtype=self.codec)
        assert out[0, 0].flags.c_contiguous
        assert out.shape[:2] == (len(numbers), len(arrays))
        assert out.shape[2] >= counts.max()
        rows_of = out.ctypes.data + np.arange(len(numbers)) * out.strides[0]
        for a, array in enumerate(arrays):
            self._gather(array, numbers, begin, counts, rows_of + a * out.strides[1])
        for b, count in enumerate(counts.tolist()):
            out[b, :, count:] = 0
        return out, counts

    def _gather(
        self,
        array: str,
        utterances: Int64[np.ndarray, " B"],
        begin: Int64[np.ndarray, " B"],
        count: Int64[np.ndarray, " B"],
        target: Int64[np.ndarray, " B"],
    ) -> None:
        """Copy rows [begin, begin + count) of each utterance of one array to its address."""
        outside = (begin < 0) | (count < 1) | (begin + count > self.rows[utterances])
        if outside.any():
            b = int(outside.argmax())
            u = int(utterances[b])
            raise StoreError(
                f"{self.directory}: rows {begin[b]} to {begin[b] + count[b]} of {self.ids[u]} were asked for, "
                f"and it has {self.rows[u]}"
            )
        spec = self.spec(array)
        shard, row = np.divmod(self.plan.start[utterances] + begin, self.grid.shard_rows)
        opened = [self._shard(spec, s) for s in shard.tolist()]
        first_chunk = np.array([at for _, at in opened])
        reads = Reads([handle for handle, _ in opened], first_chunk, row, count, target)
        failed = read_rows(reads, self.grid.chunk_rows, spec.row_bytes)
        damaged = read_checked(reads, self.grid.chunk_rows, spec.row_bytes) if self.verify and not failed else {}
        for b in [*failed, *damaged]:
            where = shard_path(self.directory, spec, int(shard[b]))
            what = f"chunk {damaged[b]} is damaged (its checksum differs)" if b in damaged else "it is cut short"
            raise StoreError(f"{where}: {what}; extract again to replace the shard")
        while len(self._open) > MAX_OPEN_SHARDS:  # oldest first; never in the middle of a batch
            os.close(self._open.pop(next(iter(self._open)))[0])

    def _shard(self, spec: ArraySpec, shard: int) -> tuple[int, int]:
        """Handle of one shard and the offset of its first chunk, opened and its index checked once."""
        place = (spec.name, shard)
        if place in self._open:
            return self._open[place]
        path = shard_path(self.directory, spec, shard)
        size = 16 * self.grid.chunks + CRC_BYTES
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            raise StoreError(f"{path} is missing; extract again to replace the shard") from None
        end = os.fstat(handle).st_size
        data = os.pread(handle, size, max(0, end - size))
        try:
            entry = (
                handle,
                first_chunk(decode_index(data, self.grid, path), self.plan.used_rows(shard), spec, self.grid, path),
            )
        except StoreError:
            os.close(handle)
            raise
        self._open[place] = entry
        return entry

    def close(self) -> None:
        """Close the shards that are open."""
        while self._open:
            os.close(self._open.popitem()[1][0])

    def __del__(self) -> None:
        if hasattr(self, "_open"):
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.directory, tuple(self.arrays), self.verify)


def first_chunk(index: UInt64[np.ndarray, "N 2"], rows: int, spec: ArraySpec, grid: Grid, where: Path) -> int:
    """Offset of the first chunk of a shard whose chunks lie in order without gaps, which format 1 demands.

    Raises:
        StoreError: a chunk is absent or lies elsewhere.
    """
    used = index[: -(-rows // grid.chunk_rows)].astype(np.int64)
    stride = grid.chunk_rows * spec.row_bytes + CRC_BYTES
    if (used[:, 1] != stride).any() or (np.diff(used[:, 0]) != stride).any():
        raise StoreError(f"{where}: its chunks are not laid in order (written by another program?); extract again")
    return int(used[0, 0])


def read_header(directory: Path) -> dict[str, Any]:
    """The store's own account of itself, out of its group's attributes.

    Raises:
        StoreError: no store, or one of another format.
    """
    if not (directory / "zarr.json").exists():
        raise StoreError(f"there is no store at {directory}; run the stage that writes it (`dvc repro extract`)")
    header: dict[str, Any] | None = read_json(directory / "zarr.json").get("attributes", {}).get("decant")
    if header is None:
        raise StoreError(f"{directory} is a Zarr group but no Decant store (its attributes lack 'decant')")
    if header["format"] != FORMAT:
        raise StoreError(
            f"{directory} has store format {header['format']} and this version reads {FORMAT}; install the matching version"
        )
    return header


def write_header(directory: Path, header: dict[str, Any], ids: Sequence[str], rows: Int64[np.ndarray, " U"]) -> None:
    """Make the folder of a store: columns first, the group last, so that a folder with a zarr.json is a store."""
    encoded = [i.encode() for i in ids]
    plan = plan_rows(rows, header["shard_rows"])
    directory.mkdir(parents=True, exist_ok=True)
    write_column(directory / "ids", np.frombuffer(b"".join(encoded), dtype=np.uint8))
    write_column(directory / "id_end", np.cumsum([len(e) for e in encoded], dtype=np.int64))
    write_column(directory / "rows", rows)
    write_column(directory / "start", plan.start)
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"decant": {"format": FORMAT, **header}}}
    write_json(directory / "zarr.json", group)


def check_array(directory: Path, spec: ArraySpec, grid: Grid, num_rows: int) -> None:
    """Refuse an array whose zarr.json is not exactly what this store's arrays have, so no forged shape is ever read.

    Raises:
        StoreError: missing or different, naming the first field that differs.
    """
    want = array_metadata(spec, grid, num_rows)
    got = read_json(directory / spec.name / "zarr.json")
    for key in sorted(set(want) | set(got)):
        if canonical_json(want.get(key)) != canonical_json(got.get(key)):
            raise StoreError(
                f"{directory / spec.name}/zarr.json: {key} is {got.get(key)!r}, expected {want.get(key)!r}"
            )
