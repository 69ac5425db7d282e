"""What a codec was fitted to a layer with in, small arrays beside the layer out; and back.

The tables of "layer-04" lie in "layer-04.mean", "layer-04.std" and "layer-04.codebooks": float32 arrays of one checked
chunk, readable by any Zarr reader. They are committed before the first frame is encoded with them, each by a line in the
journal, and a receipt names them. A layer whose table is damaged is lost with it: fitted anew on another machine it
may differ in the last bit, and frames must be decoded with what they were encoded with.
"""

import math
from pathlib import Path, PurePath

import numpy as np
import xxhash

from cache.codecs import Tables
from cache.errors import StoreError
from cache.places import bytes_of
from cache.publish import read_json
from cache.zarrshard import CRC_BYTES, ArraySpec, Place, column_metadata, column_path, read_column, write_column

MAX_JSON_BYTES = 2**16
TABLE_TYPE = "float32"


def table_names(spec: ArraySpec) -> dict[str, str]:
    """Table -> name of its array, for each table of the layer's codec."""
    return {table: f"{spec.name}.{table}" for table in spec.coding.tables}


def table_path(store: Place, spec: ArraySpec, table: str) -> Place:
    """The file that holds a table."""
    return column_path(store / table_names(spec)[table], len(table_shape(spec, table)))


def table_shape(spec: ArraySpec, table: str) -> tuple[int, ...]:
    """Shape of a table of a layer."""
    assert spec.width is not None
    return spec.coding.table_shape(table, spec.width)


def tables_bytes(spec: ArraySpec) -> int:
    """Bytes of the files of all tables of a layer."""
    return sum(_table_bytes(spec, table) for table in table_names(spec))


def _table_bytes(spec: ArraySpec, table: str) -> int:
    return np.dtype(TABLE_TYPE).itemsize * math.prod(table_shape(spec, table)) + CRC_BYTES


def write_tables(store: Path, spec: ArraySpec, tables: Tables) -> dict[str, tuple[int, str]]:
    """Write the tables of a layer; gives (bytes, xxh3-128) of each file by the name of its array."""
    for table, name in table_names(spec).items():
        assert tables[table].shape == table_shape(spec, table)
        assert tables[table].dtype == TABLE_TYPE
        write_column(store / name, tables[table])
    return describe_tables(store, spec)


def describe_tables(store: PurePath, spec: ArraySpec) -> dict[str, tuple[int, str]]:
    """(bytes, xxh3-128) of the file of each table that is there, by the name of its array."""
    described = {}
    for table, name in table_names(spec).items():
        path, size = table_path(store, spec, table), _table_bytes(spec, table)
        if _may_be_read(path, size) and (data := bytes_of(path, size)) is not None:
            described[name] = len(data), xxhash.xxh3_128_hexdigest(data)
    return described


def _may_be_read(path: PurePath, size: int) -> bool:
    """Whether a local file has its size; one of another is as good as missing. What a server sends is limited instead."""
    return not isinstance(path, Path) or (path.is_file() and path.stat().st_size == size)


def read_tables(store: PurePath, spec: ArraySpec) -> Tables:
    """The tables of a layer.

    Raises:
        StoreError: missing, damaged, or of another shape.
    """
    tables = {}
    for table, name in table_names(spec).items():
        shape = table_shape(spec, table)
        check_table(store, spec, table)
        values = read_column(store / name, "<f4", len(shape), most=_table_bytes(spec, table))
        if values.size != math.prod(shape):
            raise StoreError(f"{store / name} has {values.size} numbers and not {math.prod(shape)}; extract again")
        tables[table] = values.astype(np.float32).reshape(shape)
    return tables


def check_table(store: PurePath, spec: ArraySpec, table: str) -> None:
    """Refuse a table whose zarr.json or size is not what this layer's must be, before it is read.

    Raises:
        StoreError: missing or different.
    """
    shape, place = table_shape(spec, table), store / table_names(spec)[table]
    if read_json(place / "zarr.json", MAX_JSON_BYTES) != column_metadata(shape, TABLE_TYPE):
        raise StoreError(f"{place}/zarr.json is not that of a {shape} table of {TABLE_TYPE}; extract again")
    file, want = table_path(store, spec, table), _table_bytes(spec, table)
    if not _may_be_read(file, want):
        raise StoreError(f"{file} is missing or has not {want} bytes; extract again")
