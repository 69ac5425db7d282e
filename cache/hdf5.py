"""A finished store in, one HDF5 file for people and tools without Zarr out; and that file in, the same store out.

The file holds the columns `ids`, `id_end`, `rows` and `start` and one dataset a layer, as in a store (and what its
codec was fitted with, as "layer-04.mean"): utterance u of
"layer-04" is `file["layer-04"][start[u] : start[u] + rows[u]]`. Its attribute `decant` is the header and the journal.
Both ways go shard by shard. A shard enters a store again only if its bytes have the hash they were committed with, so
import gives the same journal and the same receipt, or an error.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash
from jaxtyping import Shaped

from cache.errors import DecantError, StoreError
from cache.header import (
    COLUMNS,
    MAX_ID_BYTES,
    MAX_UTTERANCES,
    brief,
    check_header,
    check_rows,
    read_header,
    split_ids,
    write_header,
)
from cache.inventory import arrays_of, is_array_name
from cache.journal import Journal
from cache.process import exclusive
from cache.publish import canonical_json, digest_json, fsync, named_io_errors, partial_of, publish_file, write_json
from cache.ragged import Store
from cache.receipts import make_receipt, store_key, store_path
from cache.tables import table_names, table_shape, write_tables
from cache.writer import write_shard
from cache.zarrshard import CRC_BYTES, ArraySpec, Grid, array_metadata, encode_shard, read_column, shard_path

HDF5_FORMAT = 1
MAX_ACCOUNT_BYTES = 2**32  # of the attribute: a line a shard
Tick = Callable[[int], None]


def export_store(directory: Path, out: Path, tick: Tick = lambda _: None) -> None:
    """Write a complete store to one HDF5 file, checking every shard on the way.

    Raises:
        StoreError: the store is unfinished or damaged; nothing is written.
    """
    store = Store(directory)
    arrays = arrays_of(store)
    receipt = make_receipt(directory, arrays)  # names and sizes
    shards = {name: described["shards"] for name, described in receipt["arrays"].items()}
    about: dict[str, Any] = {
        "hdf5_format": HDF5_FORMAT,
        "header": read_header(directory),
        "arrays": shards,
    }
    if fitted := {name: described["tables"] for name, described in receipt["arrays"].items() if "tables" in described}:
        about["tables"] = fitted
    try:  # the latest layout has checksums on HDF5's own metadata
        with publish_file(out) as partial, h5py.File(partial, "w", libver="latest") as file:
            for name, dtype in COLUMNS.items():
                column = read_column(directory / name, dtype)
                file.create_dataset(name, data=column)
                about[name] = xxhash.xxh3_128_hexdigest(column.tobytes())
            for name in arrays:
                spec = store.spec(name)
                for table, values in store.tables(name).items():
                    file.create_dataset(table_names(spec)[table], data=values)
                dataset = file.create_dataset(
                    name,
                    shape=_shape(store, spec),
                    dtype=spec.dtype,
                    chunks=_chunks(store, spec),
                    fillvalue=np.nan if spec.dtype.kind == "f" else 0,
                    fletcher32=True,
                )
                for shard in range(store.plan.num_shards):
                    rows = shard_rows(store, spec, shard, shards[name][shard][1])
                    at = shard * store.grid.shard_rows
                    dataset[at : at + len(rows)] = rows
                    tick(shards[name][shard][0])
            file.attrs["decant"] = canonical_json({**about, "digest": digest_json(about)})
            file.close()  # before it is flushed to the disk and takes its name
    finally:
        partial_of(out).unlink(missing_ok=True)


def _shape(store: Store, spec: ArraySpec) -> tuple[int, ...]:
    return (store.plan.num_rows, *spec.inner)


def _chunks(store: Store, spec: ArraySpec) -> tuple[int, ...]:
    rows = min(store.grid.chunk_rows, store.plan.num_rows)
    return (rows, *spec.inner)


def shard_rows(store: Store, spec: ArraySpec, shard: int, digest: str) -> Shaped[np.ndarray, "R ..."]:
    """The rows of one shard whose file has the hash it was committed with.

    Raises:
        StoreError: it has another.
    """
    path = shard_path(store.directory, spec, shard)
    try:
        data = path.read_bytes()
    except MemoryError:
        raise StoreError(
            f"{path} has {path.stat().st_size:,} bytes, more than there is memory; make smaller shards"
        ) from None
    if xxhash.xxh3_128_hexdigest(data) != digest:
        raise StoreError(f"{path} is damaged; run `decant cache repair {store.key}` and extract again, then export")
    rows, stride = store.plan.used_rows(shard), store.grid.chunk_rows * spec.row_bytes + CRC_BYTES
    chunks = -(-rows // store.grid.chunk_rows)
    body = np.frombuffer(data, dtype=np.uint8, count=chunks * stride).reshape(chunks, stride)
    flat = np.ascontiguousarray(body[:, :-CRC_BYTES]).reshape(-1).view(spec.dtype)
    return flat.reshape(-1, *spec.inner)[:rows]


def import_store(source: Path, tick: Tick = lambda _: None) -> Path:
    """Make the store that an HDF5 file was exported from, under the store root; whole or not at all.

    Raises:
        StoreError: no export of ours, damaged, or a store of this key is there already.
    """
    with refused(source), h5py.File(source, "r") as file:
        about = _read_about(file, source)
        header = about["header"]
        place = store_path(header["kind"], header["key"])
        if place.exists():
            raise StoreError(
                f"{place} is there already; `decant cache verify {header['key']}` checks it, or move it away"
            )
        columns = {name: _read_column(file, name, dtype, about, source) for name, dtype in COLUMNS.items()}
        check_rows(columns["rows"].astype(np.int64), header, source / "rows")
        ids = split_ids(columns["ids"], columns["id_end"], len(columns["rows"]), source)
        partial = partial_of(place)
        with named_io_errors(place), exclusive(place.parent / "writer.lock"):
            if partial.exists():
                shutil.rmtree(partial)
            try:
                _fill(file, source, partial, about, ids, columns["rows"], tick)
                if (partial / "start" / "c" / "0").read_bytes()[:-CRC_BYTES] != columns["start"].tobytes():
                    raise StoreError(f"{source}: the column start is not the plan of its rows; export it again")
                for path in sorted(partial.rglob("*"), reverse=True):
                    fsync(path)
                if place.exists():
                    raise StoreError(f"{place} was made meanwhile; nothing was imported")
                os.replace(partial, place)
                fsync(place.parent)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    return place


@contextmanager
def refused(source: Path) -> Iterator[None]:
    """Whatever h5py says of a file it cannot read becomes one line that names the file."""
    if not Path(source).is_file():
        raise StoreError(f"{source} does not exist; `decant cache export` writes one")
    try:
        yield
    except DecantError:
        raise
    except OSError as error:
        if error.errno is not None and "h5" not in str(error).lower():
            raise
        raise StoreError(f"{source} is no HDF5 file or is damaged ({_line(error)}); export it again") from error
    except MemoryError:
        raise StoreError(f"{source} wants more memory than there is: damaged, or no export of a store") from None
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        raise StoreError(f"{source} is damaged or no export of a store ({_line(error)}); export it again") from error


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def _read_about(file: h5py.File, source: Path) -> dict[str, Any]:
    """Header and shards, after checking what can be checked before a row is read."""
    if "decant" not in file.attrs:
        raise StoreError(f"{source} is HDF5 but no export of a store (it lacks the attribute 'decant')")
    text = file.attrs["decant"]
    about = json.loads(text) if isinstance(text, str) and len(text) <= MAX_ACCOUNT_BYTES else None
    if not isinstance(about, dict):
        raise StoreError(f"{source} is HDF5 but no export of a store (its attribute 'decant' is no object)")
    if about.get("hdf5_format") != HDF5_FORMAT:
        raise StoreError(
            f"{source} has export format {about.get('hdf5_format')!r} and this version reads {HDF5_FORMAT}"
        )
    if about.pop("digest", None) != digest_json(about):
        raise StoreError(f"{source}: its account of itself is damaged; export it again")
    header = check_header(about["header"], source)
    if header["key"] != store_key(header["kind"], header["fingerprint"]):
        raise StoreError(f"{source}: its key is not that of its fingerprint; export it again")
    if not about["arrays"] or not all(is_array_name(name) for name in about["arrays"]):
        raise StoreError(f"{source} has arrays {brief(sorted(about['arrays']))}, which no store has")
    return about


def _plain(file: h5py.File, name: str, source: Path) -> h5py.Dataset:
    """Refuse what could point elsewhere or grow on reading: links, virtual and external data, compression."""
    if not isinstance(file.get(name, getlink=True), h5py.HardLink) or file.get(name, getclass=True) is not h5py.Dataset:
        raise StoreError(f"{source}: {name} is no dataset of this file; export it again")
    dataset = file[name]
    plist = dataset.id.get_create_plist()
    filters = {plist.get_filter(n)[0] for n in range(plist.get_nfilters())}
    if dataset.is_virtual or dataset.external or filters - {h5py.h5z.FILTER_FLETCHER32}:
        raise StoreError(f"{source}: {name} is compressed or lies outside the file, which no export of ours does")
    return dataset


def _read_column(
    file: h5py.File, name: str, dtype: str, about: dict[str, Any], source: Path
) -> Shaped[np.ndarray, " N"]:
    dataset = _plain(file, name, source)
    most = MAX_UTTERANCES * (MAX_ID_BYTES if name == "ids" else 8)
    plain = dataset.dtype == np.dtype(dtype) and dataset.ndim == 1 and dataset.id.get_storage_size() == dataset.nbytes
    if not plain or not 0 < dataset.nbytes <= min(most, source.stat().st_size):
        raise StoreError(f"{source}: {name} has {dataset.shape} {dataset.dtype}, which is no column of a store")
    values: Shaped[np.ndarray, " N"] = dataset[:]
    if xxhash.xxh3_128_hexdigest(values.tobytes()) != about[name]:
        raise StoreError(f"{source}: {name} is damaged (its hash differs); export it again")
    return values


def _read_table(file: h5py.File, name: str, spec: ArraySpec, table: str, source: Path) -> np.ndarray:
    dataset = _plain(file, name, source)
    shape = table_shape(spec, table)
    if dataset.shape != shape or dataset.dtype != np.dtype("<f4") or dataset.id.get_storage_size() != dataset.nbytes:
        raise StoreError(f"{source}: {name} has {dataset.shape} {dataset.dtype}, its header says {shape} float32")
    values: np.ndarray = dataset[:]
    return values


def _fill(
    file: h5py.File,
    source: Path,
    partial: Path,
    about: dict[str, Any],
    ids: Sequence[str],
    rows: Shaped[np.ndarray, " U"],
    tick: Tick,
) -> None:
    """Write the folder of the store, shard by shard, each compared with the hash it was committed with."""
    header, arrays = about["header"], about["arrays"]
    rows = rows.astype(np.int64)
    write_header(partial, {k: v for k, v in header.items() if k != "format"}, ids, rows)
    store, grid = Store(partial), Grid(header["chunk_rows"], header["shard_rows"])
    journal = Journal(partial)
    specs = {name: store.spec(name) for name in arrays}
    for name, spec in specs.items():
        dataset = _plain(file, name, source)
        shape = _shape(store, spec)
        used = sum(store.plan.used_rows(s) for s in range(store.plan.num_shards)) * spec.row_bytes
        fits = (
            (dataset.shape, dataset.chunks) == (shape, _chunks(store, spec))
            and dataset.dtype == spec.dtype
            and used <= dataset.id.get_storage_size() <= source.stat().st_size
        )
        if not fits or len(arrays[name]) != store.plan.num_shards:
            raise StoreError(
                f"{source}: {name} has {dataset.shape} {dataset.dtype}, its header says {shape} {spec.codec}"
            )
        tables = {t: _read_table(file, array, spec, t, source) for t, array in table_names(spec).items()}
        for array, made in write_tables(partial, spec, tables).items():
            if list(made) != about["tables"][name][array.removeprefix(f"{name}.")]:
                raise StoreError(f"{source}: {array} is damaged (its hash differs); export it again")
            journal.append(array, 0, *made)
        (partial / name).mkdir()
        write_json(partial / name / "zarr.json", array_metadata(spec, grid, store.plan.num_rows))
    for shard in range(store.plan.num_shards):
        for name, spec in specs.items():
            at, (size, digest) = shard * grid.shard_rows, arrays[name][shard]
            rows_here = file[name][at : at + store.plan.used_rows(shard)]
            made = write_shard(shard_path(partial, spec, shard), encode_shard(rows_here, spec, grid))
            if made != (size, digest):
                raise StoreError(f"{source}: shard {shard} of {name} is damaged (its hash differs); export it again")
            journal.append(name, shard, size, digest)
            tick(size)
