"""A store and its receipts in, the name of everything in it that is not as it was committed out.

Fast: names and sizes against the journal and the receipts. Full: also the hash of every shard file, the checksum of
every chunk and the shard's index, a few megabytes at a time. Nothing is changed here; `cache.repair` acts on the findings.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from cache.errors import DecantError, StoreError
from cache.findings import Finding, Kind, Remark, Verdict
from cache.header import JOURNAL, check_array
from cache.inventory import arrays_of, is_array_name, read_receipt
from cache.journal import JournalText, read_journal
from cache.local import first_chunk
from cache.ragged import Store
from cache.receipts import store_key
from cache.tables import check_table, describe_tables, table_names, table_path
from cache.writer import awaits_header
from cache.zarrshard import CRC_BYTES, ArraySpec, crc32c, decode_index, shard_bytes, shard_path, write_column

BLOCK_BYTES = 2**23  # read at a time
COLUMNS = ("ids", "id_end", "rows", "start")
HEADER = "zarr.json"


def verify_store(
    directory: Path,
    receipts: Sequence[Path] = (),
    full: bool = False,
    tick: Callable[[int], None] = lambda _: None,
) -> Verdict:
    """Compare a store with its journal and with the receipts that describe it.

    Args:
        directory: the store.
        receipts: receipt files of this store (`receipts_by_store` finds them).
        full: read every byte.
        tick: told the bytes of each shard file that was read.
    """
    verdict = Verdict(Path(directory), full)
    say = verdict.findings.append
    try:
        store = Store(directory)
        plan, ids = store.plan, store.ids
    except DecantError as error:
        if awaits_header(directory, directory.name):
            say(Finding("header", HEADER, "was damaged and a repair took it away; the store's stage writes it again"))
            return verdict
        column = next((c for c in COLUMNS if f"{directory / c} " in f"{error} "), None)
        say(Finding("column" if column else "header", f"{column}/c/0" if column else HEADER, str(error)))
        return verdict
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        say(Finding("header", HEADER, f"the store's header or columns are damaged ({type(error).__name__}: {error})"))
        return verdict
    for finding in _check_header(store, ids):
        say(finding)
    if verdict.findings:
        return verdict
    journal = read_journal(directory)
    for number in journal.damaged:
        say(Finding("journal", JOURNAL, f"line {number} is damaged"))
    if journal.torn:
        say(Finding("leftover", JOURNAL, "the last line was torn by a killed run and does not count"))
    known = {HEADER, JOURNAL, "writer.lock", *(f"{c}/{f}" for c in COLUMNS for f in ("zarr.json", "c/0"))}
    promised: dict[tuple[str, int], tuple[int, str]] = {}
    for path in receipts:
        for finding in _check_receipt(path, store, promised):
            say(finding)
    arrays = sorted({*arrays_of(store), *(a for a, _ in promised if is_array_name(a))})
    for array in arrays:
        spec = store.spec(array)
        known.add(f"{array}/zarr.json")
        try:
            check_array(directory, spec, store.grid, plan.num_rows)
        except StoreError as error:
            say(Finding("metadata", f"{array}/zarr.json", str(error), array))
        except AttributeError:  # JSON, and no object
            say(Finding("metadata", f"{array}/zarr.json", "it is no Zarr array's", array))
        for finding in _check_tables(store, spec, journal, promised):
            say(finding)
        for table, name in table_names(spec).items():
            known |= {f"{name}/zarr.json", table_path(directory, spec, table).relative_to(directory).as_posix()}
        for shard in range(plan.num_shards):
            place = shard_path(directory, spec, shard)
            known.add(place.relative_to(directory).as_posix())
            row, want = journal.rows.get((array, shard)), promised.get((array, shard))
            wrong = _check_shard(store, spec, shard, row, want, journal, full)
            if wrong is not None:
                say(wrong)
            if row is not None and place.exists():
                verdict.shards += 1
                verdict.bytes += row[0] if full else 0
                tick(row[0])
    tables = {(name, 0) for array in arrays for name in table_names(store.spec(array)).values()}
    for array, shard in journal.rows:
        if (array, shard) not in tables and (array not in arrays or not 0 <= shard < plan.num_shards):
            say(Finding("journal", JOURNAL, f"a line names shard {shard} of {array}, which this store does not have"))
    for file in sorted(p for p in directory.rglob("*") if not p.is_dir()):
        name = file.relative_to(directory).as_posix()
        if file.name.startswith(".") and file.name.endswith(".partial"):
            say(Finding("leftover", name, "of a run that was killed (or is running); the next one clears it"))
        elif name not in known:
            say(Finding("extra", name, "belongs to no array of this store"))
    return verdict


def _check_header(store: Store, ids: list[str]) -> Iterator[Finding]:
    """The header against its key and the folder's name, the columns against each other."""
    key = store_key(store.kind, store.fingerprint)
    if not store.key == key == store.directory.name or store.directory.parent.name != store.kind:
        detail = f"says {store.kind}/{store.key}, its fingerprint gives {key}: damaged, or copied over another store"
        yield Finding("header", HEADER, detail)
        return
    if len(ids) != len(store.rows) or len(set(ids)) != len(ids):
        yield Finding("column", "ids/c/0", f"{len(ids)} ids for {len(store.rows)} utterances, or one twice")
        return
    text = [i.encode() for i in ids]
    values: dict[str, np.ndarray] = {
        "ids": np.frombuffer(b"".join(text), dtype=np.uint8),
        "id_end": np.cumsum([len(t) for t in text], dtype=np.int64),
        "rows": store.rows,
        "start": store.plan.start,
    }
    with tempfile.TemporaryDirectory() as beside:  # the writer says what the files of a column are
        for name, column in values.items():
            write_column(Path(beside) / name, column)
            for file in ("zarr.json", "c/0"):
                there = store.directory / name / file
                if not there.exists() or there.read_bytes() != (Path(beside) / name / file).read_bytes():
                    yield Finding("column", f"{name}/{file}", f"{there} is missing or damaged")


def _check_receipt(path: Path, store: Store, promised: dict[tuple[str, int], tuple[int, str]]) -> Iterator[Finding]:
    """A receipt against the store it names; its shards go to `promised`."""
    try:
        receipt = read_receipt(path)
    except StoreError as error:
        yield Finding("receipt", str(path), str(error))
        return
    for name, want in (("utterances", len(store.rows)), ("rows", int(store.rows.sum()))):
        if receipt.get(name) != want:
            yield Finding("receipt", str(path), f"{name} is {receipt.get(name)} and the store has {want}")
    for name, array in receipt["arrays"].items():
        if (array.get("width"), array.get("codec")) != (store.width, store.codec) or not is_array_name(name):
            yield Finding("receipt", str(path), f"{name} is {array.get('width')} wide in {array.get('codec')}", name)
        elif len(array["shards"]) != store.plan.num_shards:
            detail = f"{name} has {len(array['shards'])} shards and the store has {store.plan.num_shards}"
            yield Finding("receipt", str(path), detail, name)
        else:
            promised |= {(name, shard): (size, digest) for shard, (size, digest) in enumerate(array["shards"])}
            promised |= {(f"{name}.{t}", 0): (size, digest) for t, (size, digest) in array.get("tables", {}).items()}


def _check_tables(
    store: Store, spec: ArraySpec, journal: JournalText, promised: dict[tuple[str, int], tuple[int, str]]
) -> Iterator[Finding]:
    """What the codec of a layer was fitted with, byte by byte: they are few."""
    there = describe_tables(store.directory, spec)
    begun = any(array == spec.name for array, _ in [*journal.rows, *promised])
    for table, name in table_names(spec).items():
        place = table_path(store.directory, spec, table).relative_to(store.directory).as_posix()
        wanted = {row for row in (journal.rows.get((name, 0)), promised.get((name, 0))) if row is not None}
        if not wanted and not begun:  # killed before the first shard
            yield Finding("unfinished", place, "was never committed; the next run makes it", spec.name)
        elif name not in there or wanted != {there[name]}:
            detail = "is missing, or not as it was committed: the layer cannot be decoded"
            yield Finding("table", place, detail, spec.name)
        else:
            try:
                check_table(store.directory, spec, table)
            except StoreError as error:
                yield Finding("table", f"{name}/zarr.json", str(error), spec.name)


def _check_shard(
    store: Store,
    spec: ArraySpec,
    shard: int,
    row: tuple[int, str] | None,
    want: tuple[int, str] | None,
    journal: JournalText,
    full: bool,
) -> Finding | None:
    """One shard file against its journal line and what a receipt promises."""
    path = shard_path(store.directory, spec, shard)
    place = path.relative_to(store.directory).as_posix()

    def found(kind: Kind | Remark, detail: str, committed: tuple[int, str] | None = None) -> Finding:
        return Finding(kind, place, detail, spec.name, shard, committed)

    if row is None and want is None:
        return found("unfinished", "was never committed; the next run makes it")
    truth = want or row
    assert truth is not None
    if not path.exists():
        return found("missing", "is missing")
    if (size := path.stat().st_size) != truth[0]:
        return found("damaged", f"has {size} bytes and was committed with {truth[0]}")
    if size != (needs := shard_bytes(store.plan.used_rows(shard), spec, store.grid)):
        return found("damaged", f"has {size} bytes and its utterances take {needs}")
    if full:
        digest, wrong = read_shard(store, spec, shard)
        if digest != truth[1]:
            other = next((a for a, r in journal.rows.items() if r[1] == digest and a != (spec.name, shard)), None)
            if other is not None:
                return found("swapped", f"holds the bytes of shard {other[1]} of {other[0]}")
            sound = "every chunk is sound: other data was put here, or its journal line is damaged"
            return found("damaged" if wrong else "swapped", wrong or sound)
        if wrong:  # committed so: not what format 1 is
            return found("damaged", wrong)
    if row != truth:
        told = "has no line for it" if row is None else "says other bytes or another hash"
        return found("journal", f"the receipt names this shard and the journal {told}", truth if full else None)
    return None


def read_shard(store: Store, spec: ArraySpec, shard: int) -> tuple[str, str]:
    """Hash of a shard file, and what is wrong inside it ("" for nothing)."""
    path = shard_path(store.directory, spec, shard)
    rows = store.plan.used_rows(shard)
    stride = store.grid.chunk_rows * spec.row_bytes + CRC_BYTES
    body = -(-rows // store.grid.chunk_rows) * stride
    digest, wrong = xxhash.xxh3_128(), ""
    with open(path, "rb") as file:
        at = 0
        while at < body and (block := file.read(min(max(BLOCK_BYTES // stride, 1) * stride, body - at))):
            digest.update(block)
            for start in range(0, len(block), stride):
                chunk = block[start : start + stride]
                if not wrong and crc32c(chunk[:-CRC_BYTES]) != chunk[-CRC_BYTES:]:
                    wrong = f"chunk {(at + start) // stride} is damaged (its checksum differs)"
            at += len(block)
        index = file.read()
    digest.update(index)
    try:
        if first_chunk(decode_index(index, store.grid, path), rows, spec, store.grid, path) != 0:
            wrong = wrong or "its first chunk is not at its beginning"
    except StoreError as error:
        wrong = wrong or str(error).removeprefix(f"{path}: ")
    return digest.hexdigest(), wrong
