"""The ragged store: a folder of sharded Zarr arrays in, the rows of any utterances out.

A store is a Zarr v3 group. Each of its arrays ("layer-04", "wave") holds the rows of all utterances one after another,
cut into the same shards; the columns `start`, `rows`, `ids` and `id_end` say where each utterance lies. Reading one
utterance of one array is one `preadv` into the caller's buffer: the shard's index is read once and the checksums
between the chunks are stepped over.
"""

import os
from collections import OrderedDict
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
from cache.zarrshard import (
    CRC_BYTES,
    ArraySpec,
    Grid,
    array_metadata,
    crc32c,
    decode_index,
    read_column,
    shard_path,
    write_column,
)

FORMAT = 1  # raised by one when a reader of the old format would read wrong numbers
MAX_OPEN_SHARDS = 256  # file handles one reader keeps
MAX_VECTORS = 512  # buffers per preadv; Linux allows 1024


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
        self._open: OrderedDict[tuple[str, int], tuple[int, UInt64[np.ndarray, "N 2"]]] = OrderedDict()

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
        out = np.empty((rows.stop - rows.start, *inner), dtype=self.codec)
        self._read_rows(array, u, rows, out)
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
        numbers = [self._number(u) for u in utterances]
        places = [slice(0, int(self.rows[u])) for u in numbers] if spans is None else [s.rows for s in spans]
        counts = np.array([p.stop - p.start for p in places], dtype=np.int64)
        if out is None:
            out = np.empty((len(numbers), len(arrays), int(counts.max()), self.width or 1), dtype=self.codec)
        for b, (u, place) in enumerate(zip(numbers, places, strict=True)):
            for a, array in enumerate(arrays):
                self._read_rows(array, u, place, out[b, a, : counts[b]])
                out[b, a, counts[b] :] = 0
        return out, counts

    def _read_rows(self, array: str, u: int, rows: slice, out: Shaped[np.ndarray, "T ..."]) -> None:
        if not 0 <= rows.start < rows.stop <= self.rows[u]:
            raise StoreError(
                f"{self.directory}: rows {rows.start} to {rows.stop} of {self.ids[u]} were asked for, and it has {self.rows[u]}"
            )
        shard, start = divmod(int(self.plan.start[u]) + rows.start, self.grid.shard_rows)
        stop = start + rows.stop - rows.start
        spec = self.spec(array)
        handle, index = self._shard(spec, shard)
        chunk_rows, row_bytes = self.grid.chunk_rows, spec.row_bytes
        chunks = index[start // chunk_rows : (stop - 1) // chunk_rows + 1]
        stride = chunk_rows * row_bytes + CRC_BYTES
        if (chunks[:, 1] != stride).any():
            raise StoreError(f"{shard_path(self.directory, spec, shard)} lacks rows of {self.ids[u]}; extract again")
        target = out.reshape(-1).view(np.uint8).data
        if self.verify:
            self._read_verified(spec, shard, chunks, start, stop, target)
            return
        # Runs of chunks that lie one after another on the disk are one preadv; our writer always makes one run.
        breaks = np.flatnonzero(np.diff(chunks[:, 0]) != stride) + 1
        first, at = start // chunk_rows, 0
        for run in np.split(np.arange(len(chunks)), breaks):
            lo = max(start, (first + int(run[0])) * chunk_rows)
            hi = min(stop, (first + int(run[-1]) + 1) * chunk_rows)
            offset = int(chunks[run[0], 0]) + (lo % chunk_rows) * row_bytes
            size = (hi - lo) * row_bytes
            head = min(size, (chunk_rows - lo % chunk_rows) * row_bytes)
            _read_stepping(
                handle,
                offset,
                target[at : at + size],
                head,
                stride - CRC_BYTES,
                shard_path(self.directory, spec, shard),
            )
            at += size

    def _read_verified(
        self, spec: ArraySpec, shard: int, chunks: UInt64[np.ndarray, "N 2"], start: int, stop: int, target: memoryview
    ) -> None:
        handle, _ = self._shard(spec, shard)
        chunk_rows, row_bytes = self.grid.chunk_rows, spec.row_bytes
        first, at = start // chunk_rows, 0
        for c, (offset, size) in enumerate(chunks.tolist()):
            data = os.pread(handle, size, offset)
            if crc32c(data[:-CRC_BYTES]) != data[-CRC_BYTES:]:
                where = shard_path(self.directory, spec, shard)
                raise StoreError(
                    f"{where}: chunk {first + c} is damaged (its checksum differs); extract again to replace the shard"
                )
            lo = max(start, (first + c) * chunk_rows) % chunk_rows
            hi = min(stop - (first + c) * chunk_rows, chunk_rows)
            piece = data[lo * row_bytes : hi * row_bytes]
            target[at : at + len(piece)] = piece
            at += len(piece)

    def _shard(self, spec: ArraySpec, shard: int) -> tuple[int, UInt64[np.ndarray, "N 2"]]:
        """Handle and index of one shard, opened once."""
        place = (spec.name, shard)
        if place in self._open:
            self._open.move_to_end(place)
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
            entry = handle, decode_index(data, self.grid, path)
        except StoreError:
            os.close(handle)
            raise
        self._open[place] = entry
        if len(self._open) > MAX_OPEN_SHARDS:
            os.close(self._open.popitem(last=False)[1][0])
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


def _read_stepping(handle: int, offset: int, target: memoryview, head: int, step: int, where: Path) -> None:
    """Fill `target` from `offset` on, stepping over the checksums: after the first `head` bytes, then after each `step`."""
    skip = memoryview(bytearray(CRC_BYTES))
    vectors, at, end = [target[:head]], head, len(target)
    while at < end:
        vectors += [skip, target[at : at + step]]
        at += step
    for i in range(0, len(vectors), MAX_VECTORS):
        part = vectors[i : i + MAX_VECTORS]
        want = sum(map(len, part))
        got = os.preadv(handle, part, offset)
        if got != want:
            got += _read_rest(handle, part, offset, got)
        if got != want:
            raise StoreError(f"{where} is cut short; extract again to replace the shard")
        offset += want


def _read_rest(handle: int, vectors: list[memoryview], offset: int, done: int) -> int:
    """Go on after a short read (a signal, or more than 2 GiB at once); gives the bytes it added."""
    added, skip = 0, done
    for vector in vectors:
        if skip >= len(vector):
            skip -= len(vector)
            continue
        rest = vector[skip:]
        skip = 0
        while rest:
            got = os.preadv(handle, [rest], offset + done + added)
            if got == 0:
                return added
            added += got
            rest = rest[got:]
    return added


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
