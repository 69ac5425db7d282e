"""What a store says of itself in, refused unless it can be true; and what a new store has to say, out.

A store may come from anywhere. Its header, its columns, its journal and the metadata of its arrays are compared with
each other and with the sizes of the files before anything is allocated after their word: a forged shape, an array that
declares a compression, or a file of a terabyte costs one line on the terminal and no memory. The limits below are far
above any real store's (a million hours: 2^29 utterances at the most, journals of a few hundred megabytes).
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from jaxtyping import Int64, Shaped

from cache.codecs import CODECS
from cache.errors import StoreError
from cache.places import bytes_of
from cache.plan import plan_rows
from cache.publish import canonical_json, parse_json, write_json
from cache.zarrshard import CRC_BYTES, ArraySpec, Grid, array_metadata, column_path, read_column, write_column

JOURNAL = "journal.jsonl"
FORMAT = 1  # raised by one when a reader of the old format would read wrong numbers
COLUMNS = {"ids": "u1", "id_end": "<i8", "rows": "<i8", "start": "<i8"}
FIELDS = ("kind", "key", "fingerprint", "codec", "width", "chunk_rows", "shard_rows")
MAX_JSON_BYTES = 2**22  # of a zarr.json
MAX_DEPTH = 64  # of its nesting
MAX_UTTERANCES = 2**29
MAX_ID_BYTES = 2**10  # on average
MAX_WIDTH = 2**16
MAX_CHUNKS = 2**22  # of a shard: its index is 64 MiB
MAX_SHARD_BYTES = 2**36
MAX_ROWS = 2**53  # of a store: their sum is exact, and their places fit into int64
MAX_ARRAYS = 2**10  # layers and what their codecs were fitted with
LINE_BYTES = 2**8  # of the journal, and it has a line for each time a shard was made
REMEDY = (
    "it is damaged or was made by something else; take it from where it was made again, or delete it and extract again"
)


def read_header(directory: PurePath) -> dict[str, Any]:
    """The store's own account of itself, out of its group's attributes: `format` and the `FIELDS`.

    Raises:
        StoreError: no store, one of another format, or one that cannot be.
    """
    path = directory / "zarr.json"
    group = _read_flat(path, f"there is no store at {directory}; run the stage that writes it (`dvc repro extract`)")
    attributes = group.get("attributes") if isinstance(group, dict) else None
    header = attributes.get("decant") if isinstance(attributes, dict) else None
    if header is None:
        raise StoreError(f"{directory} is a Zarr group but no Decant store (its attributes lack 'decant')")
    return check_header(header, path)


def _read_flat(path: PurePath, missing: str) -> Any:
    """A small JSON file that is not nested so deep that looking at it would exhaust the stack.

    Raises:
        StoreError: see `parse_json`; also one that is, and `missing` where there is no file.
    """
    data = bytes_of(path, MAX_JSON_BYTES)
    if data is None:
        raise StoreError(missing)
    value = parse_json(data, path)
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child for v in level for child in (v.values() if isinstance(v, dict) else v if isinstance(v, list) else ())
        ]
        if not level:
            return value
    raise StoreError(f"{path} is nested deeper than {MAX_DEPTH} levels; {REMEDY}")


def check_header(header: Any, where: PurePath) -> dict[str, Any]:
    """The header, if a store can have it.

    Raises:
        StoreError: the field, its value and what it must be.
    """
    if not isinstance(header, dict) or "format" not in header:
        raise StoreError(f"{where}: its header is {brief(header)}; {REMEDY}")
    if header["format"] != FORMAT or type(header["format"]) is not int:
        raise StoreError(
            f"{where} has store format {brief(header['format'])} and this version reads {FORMAT}; install the matching version"
        )
    if lacking := [field for field in FIELDS if field not in header]:
        raise StoreError(f"{where}: its header lacks {', '.join(lacking)}; {REMEDY}")
    kind, key, codec, width = (header[field] for field in ("kind", "key", "codec", "width"))
    waves = kind == "waves"
    codecs = [name for name in CODECS if (name == "int16") is waves]
    wanted = {
        "kind": (kind in ("waves", "features"), "waves or features"),
        "key": (isinstance(key, str) and re.fullmatch("[0-9a-f]{20}", key), "20 digits of a digest"),
        "fingerprint": (_is_digestible(header["fingerprint"]), "an object"),
        "codec": (isinstance(codec, str) and codec in codecs, f"one of {', '.join(codecs)}"),
        "width": (width is None if waves else _is_count(width, MAX_WIDTH), "null" if waves else f"1 to {MAX_WIDTH}"),
    }
    for field, (fits, want) in wanted.items():
        if not fits:
            raise StoreError(f"{where}: {field} is {brief(header[field])}, and must be {want}; {REMEDY}")
    chunk, shard = header["chunk_rows"], header["shard_rows"]
    sizes = _is_count(chunk, MAX_SHARD_BYTES) and _is_count(shard, MAX_SHARD_BYTES)
    row_bytes = ArraySpec("", width, codec).row_bytes
    if not sizes or shard % chunk or shard // chunk > MAX_CHUNKS or shard * row_bytes > MAX_SHARD_BYTES:
        raise StoreError(
            f"{where}: shards of {brief(shard)} rows in chunks of {brief(chunk)} are no store's (whole chunks, at most "
            f"{MAX_CHUNKS:,}, and {MAX_SHARD_BYTES / 1e9:.0f} GB); {REMEDY}"
        )
    return header


def _is_count(value: Any, most: int) -> bool:
    return type(value) is int and 1 <= value <= most


def _is_digestible(value: Any) -> bool:
    """An object of which a digest can be made: no NaN, no half of a surrogate pair."""
    try:
        return isinstance(value, dict) and bool(canonical_json(value).encode())
    except ValueError:
        return False


def brief(value: Any) -> str:
    """A value from elsewhere, for a message: at most one line."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def load_rows(directory: PurePath, header: dict[str, Any]) -> Int64[np.ndarray, " U"]:
    """Rows of every utterance, after comparing the columns and the journal with each other and with the header.

    Behind a URL sizes are not asked for: there each file is limited to what the ones before allow.

    Raises:
        StoreError: a column is missing, damaged, of a size that does not fit the others', or has impossible rows.
    """
    if isinstance(directory, Path):
        _check_columns(directory)
    rows = read_column(directory / "rows", "<i8", most=8 * MAX_UTTERANCES).astype(np.int64)
    check_rows(rows, header, directory / "rows")
    journal = directory / JOURNAL
    if isinstance(journal, Path) and journal.exists():
        most = journal_limit(rows, header["shard_rows"])
        if not (journal.is_file() and journal.stat().st_size <= most):
            raise StoreError(f"{journal} has {journal.stat().st_size:,} bytes, and needs less than {most:,}; {REMEDY}")
    return rows


def _check_columns(directory: Path) -> None:
    sizes = {}
    for name in COLUMNS:
        path = column_path(directory / name)
        if not path.is_file():
            raise StoreError(f"{directory / name} is missing from the store; {REMEDY}")
        sizes[name] = path.stat().st_size - CRC_BYTES
    num = sizes["rows"] // 8
    for name, dtype in COLUMNS.items():
        fits = sizes[name] == 8 * num if dtype == "<i8" else 0 <= sizes[name] <= MAX_ID_BYTES * num
        if not fits or not 1 <= num <= MAX_UTTERANCES:
            raise StoreError(
                f"{directory / name} has {sizes[name]:,} bytes and {directory.name}/rows {sizes['rows']:,}, "
                f"which no 1 to {MAX_UTTERANCES:,} utterances have; {REMEDY}"
            )


def journal_limit(rows: Int64[np.ndarray, " U"], shard_rows: int) -> int:
    """Bytes that the journal of a store surely does not reach."""
    shards = min(len(rows), 2 * int(rows.sum()) // shard_rows + 1)  # two neighbours hold more than one may
    return LINE_BYTES * MAX_ARRAYS * (shards + 1)


def check_rows(rows: Int64[np.ndarray, " U"], header: dict[str, Any], where: PurePath) -> None:
    """Refuse rows that no plan can be made of.

    Raises:
        StoreError: naming the first utterance that is impossible.
    """
    if not len(rows):
        raise StoreError(f"{where} is empty; {REMEDY}")
    wrong = (rows < 1) | (rows > header["shard_rows"])
    if wrong.any():
        u = int(wrong.argmax())
        raise StoreError(
            f"{where} says utterance number {u} has {rows[u]} rows, and it must have 1 to the {header['shard_rows']} "
            f"of a shard; {REMEDY}"
        )
    if (total := float(rows.sum(dtype=np.float64))) > MAX_ROWS:
        raise StoreError(f"{where} sums to {total:.3g} rows, more than the {MAX_ROWS:.3g} a store may have; {REMEDY}")


def load_ids(directory: PurePath, num: int) -> list[str]:
    """Ids of the `num` utterances, in order.

    Raises:
        StoreError: see `split_ids`; also a damaged column.
    """
    ends = read_column(directory / "id_end", "<i8", most=8 * num)
    return split_ids(read_column(directory / "ids", "u1", most=MAX_ID_BYTES * num), ends, num, directory)


def split_ids(
    text: Shaped[np.ndarray, " N"], ends: Shaped[np.ndarray, " V"], num: int, directory: PurePath
) -> list[str]:
    """The ids that lie one after another in `text`.

    Raises:
        StoreError: the ends are not those of `num` ids, or an id is no UTF-8.
    """
    if len(ends) != num or int(ends[-1]) != len(text) or int(ends[0]) < 0 or (np.diff(ends) < 0).any():
        raise StoreError(f"{directory / 'id_end'} does not cut {len(text):,} bytes into {num:,} ids; {REMEDY}")
    data, found = text.tobytes(), []
    for a, b in zip([0, *ends[:-1].tolist()], ends.tolist(), strict=True):
        try:
            found.append(data[a:b].decode())
        except UnicodeDecodeError:
            raise StoreError(
                f"{directory / 'ids'} has {brief(data[a:b])} for utterance number {len(found)}, which is no UTF-8; {REMEDY}"
            ) from None
    return found


def write_header(directory: Path, header: dict[str, Any], ids: Sequence[str], rows: Int64[np.ndarray, " U"]) -> None:
    """Make the folder of a store: columns first, the group last, so that a folder with a zarr.json is a store."""
    check_header({"format": FORMAT, **header}, directory)  # what is refused on reading is not written
    encoded = [i.encode() for i in ids]
    plan = plan_rows(rows, header["shard_rows"])
    directory.mkdir(parents=True, exist_ok=True)
    write_column(directory / "ids", np.frombuffer(b"".join(encoded), dtype=np.uint8))
    write_column(directory / "id_end", np.cumsum([len(e) for e in encoded], dtype=np.int64))
    write_column(directory / "rows", rows)
    write_column(directory / "start", plan.start)
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"decant": {"format": FORMAT, **header}}}
    write_json(directory / "zarr.json", group)


def check_array(directory: PurePath, spec: ArraySpec, grid: Grid, num_rows: int) -> None:
    """Refuse an array whose zarr.json is not exactly what this store's arrays have: no forged shape, no compression.

    Raises:
        StoreError: missing or different, naming the first field that differs.
    """
    want = array_metadata(spec, grid, num_rows)
    path = directory / spec.name / "zarr.json"
    got = _read_flat(path, f"{path} does not exist; {REMEDY}")
    if not isinstance(got, dict):
        raise StoreError(f"{path} is {brief(got)}, which is no Zarr array's; {REMEDY}")
    for key in sorted(set(want) | set(got)):
        if _text(want.get(key)) != _text(got.get(key)):
            name = key if key in want else brief(key)
            raise StoreError(f"{path}: {name} is {brief(got.get(key))}, expected {brief(want.get(key))}")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
