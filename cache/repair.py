"""A damaged store in, the same store without its damaged parts out, so that the next extraction makes exactly those.

A shard is dropped by taking its line out of the journal (in one rename) and then its file away: killed in between, it is
a file without a line, which does not exist. What follows from the rest of the store (an array's zarr.json, a journal
line that a receipt knows) is written anew on the spot. A store whose header or columns are damaged keeps only its key in
its zarr.json: the next extraction writes both again and keeps the shards. It keeps none whose store nobody can tell,
such as those of a store that was copied over this one: the sizes of two stores may agree, and their numbers do not. What
may be the only copy of another store is left alone.
"""

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cache.errors import StoreError
from cache.findings import Finding, Verdict
from cache.header import JOURNAL, MAX_JSON_BYTES
from cache.inventory import read_receipt
from cache.journal import journal_line, read_journal
from cache.places import bytes_of
from cache.process import exclusive
from cache.publish import fsync, named_io_errors, parse_json, publish_file, write_json
from cache.ragged import Store
from cache.receipts import store_key
from cache.tables import table_names, table_path
from cache.verify import HEADER, verify_store
from cache.writer import await_header
from cache.zarrshard import array_metadata, shard_path


@dataclass
class Repair:
    """What was done to a store."""

    directory: Path
    dropped: list[str] = field(default_factory=list)
    """Shard files and store headers that the next run of the stage makes again."""
    rewritten: list[str] = field(default_factory=list)
    """Files that are whole again."""
    removed: list[str] = field(default_factory=list)
    """Files that belonged to nothing."""
    left: list[Finding] = field(default_factory=list)
    """Damage outside the store: its receipts."""


def repair_store(directory: Path, receipts: Sequence[Path] = ()) -> tuple[Verdict, Repair]:
    """Read every byte of a store and take away what is damaged.

    Raises:
        StoreError: there is no store.
        ResourceError: another process writes it, or the disk refuses.
    """
    if not (directory / HEADER).exists() and not (directory / JOURNAL).exists():
        raise StoreError(f"there is no store at {directory}; `decant cache ls` shows those there are")
    with named_io_errors(directory), exclusive(directory / "writer.lock"):
        verdict = verify_store(directory, receipts, full=True)
        done = Repair(directory, left=[f for f in verdict.damage if f.kind == "receipt"])
        if lost := [f for f in verdict.findings if f.kind in ("header", "column")]:
            done.dropped = sorted({f.place for f in lost})
            named = _named(directory)
            if named == directory.name or (named is None and _keep_promised(directory, receipts, done)):
                await_header(directory, directory.name)
            elif named is not None and not (directory.parent / named / HEADER).exists():
                raise StoreError(
                    f"{directory} holds the store {named}, which is not beside it: rename it to that, or delete it; then "
                    "extract again what should be here"
                )
            elif re.fullmatch("[0-9a-f]{20}", directory.name):
                _drop_all(directory, done)
            else:
                raise StoreError(
                    f"{directory} has no store's name: {lost[0].detail}; rename it to its key, or delete it"
                )
            return verdict, done
        store = Store(directory)
        for finding in verdict.findings:
            if finding.kind == "metadata":
                assert finding.array is not None
                metadata = array_metadata(store.spec(finding.array), store.grid, store.plan.num_rows)
                write_json(directory / finding.place, metadata)
                done.rewritten.append(finding.place)
        _drop_shards(store, verdict, done)
        for finding in verdict.findings:
            if finding.kind in ("extra", "leftover") and finding.place != JOURNAL:
                (directory / finding.place).unlink(missing_ok=True)
                done.removed.append(finding.place)
    return verdict, done


def _named(directory: Path) -> str | None:
    """The key of the store that a header, damaged or not, names: of its folder, if it does in any way; None if of none."""
    try:
        text = bytes_of(directory / HEADER, MAX_JSON_BYTES) or b""
    except StoreError:
        return None
    # by its key or by its fingerprint: one damaged bit leaves one of them
    keys = [key.decode() for key in re.findall(rb"key....([0-9a-f]{20})", text, re.DOTALL)]
    if directory.name in keys:
        return directory.name
    try:
        header = parse_json(text, directory / HEADER)["attributes"]["decant"]
        named = store_key(header["kind"], header["fingerprint"])
    except (StoreError, KeyError, TypeError, ValueError, RecursionError):
        return keys[0] if keys else None
    return named if named == directory.name or not keys else keys[0]


def _keep_promised(directory: Path, receipts: Sequence[Path], done: Repair) -> bool:
    """Keep those lines of the journal that a receipt of this store has, too; False if there are none."""
    promised: dict[tuple[str, int], tuple[int, str]] = {}
    for path in receipts:
        try:
            receipt = read_receipt(path)
        except StoreError as error:
            done.left.append(Finding("receipt", str(path), str(error)))
            continue
        for name, array in receipt["arrays"].items() if receipt["key"] == directory.name else ():
            promised |= {(name, shard): (size, digest) for shard, (size, digest) in enumerate(array["shards"])}
            promised |= {(f"{name}.{t}", 0): (size, digest) for t, (size, digest) in array.get("tables", {}).items()}
    kept = {place: row for place, row in read_journal(directory).rows.items() if promised.get(place) == row}
    if kept:
        _write_journal(directory, kept)
        done.rewritten.append(JOURNAL)
    return bool(kept)


def _drop_all(directory: Path, done: Repair) -> None:
    """Take away all but the lock: first the journal, without which the rest counts for nothing."""
    (directory / JOURNAL).unlink(missing_ok=True)
    (directory / HEADER).unlink(missing_ok=True)
    fsync(directory)
    rest = {p for p in directory.iterdir() if p.name != "writer.lock"}
    for place in rest:
        shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()
    done.dropped = sorted({HEADER, JOURNAL, *(p.name for p in rest)})


def _write_journal(directory: Path, rows: dict[tuple[str, int], tuple[int, str]]) -> None:
    with publish_file(directory / JOURNAL) as partial:
        partial.write_bytes(b"".join(journal_line(*place, *row) for place, row in rows.items()))


def _drop_shards(store: Store, verdict: Verdict, done: Repair) -> None:
    """Bring the journal in step with the sound shards, and delete the files of the others."""
    journal = read_journal(store.directory)
    rows, changed = dict(journal.rows), bool(journal.damaged) or journal.torn
    for finding in verdict.damage:
        if finding.kind == "table":  # what its shards were encoded with is gone, so they are
            assert finding.array is not None
            spec = store.spec(finding.array)
            tables = table_names(spec)
            for name, shard in [place for place in rows if place[0] in (spec.name, *tables.values())]:
                rows.pop((name, shard))
                changed = True
            files = [table_path(store.directory, spec, table) for table in tables]
            files += [shard_path(store.directory, spec, shard) for shard in range(store.plan.num_shards)]
            done.dropped += [file.relative_to(store.directory).as_posix() for file in files if file.exists()]
        if finding.array is None or finding.shard is None:
            continue
        place = (finding.array, finding.shard)
        if finding.kind == "journal" and finding.committed is not None:
            rows[place] = finding.committed
        else:
            rows.pop(place, None)
            done.dropped.append(finding.place)
        changed = True
    for name, shard in list(rows):
        array = name.partition(".")[0]
        known = (store.directory / array).is_dir() and 0 <= shard < store.plan.num_shards
        if not known:
            rows.pop((name, shard))
            changed = True
    if changed:
        _write_journal(store.directory, rows)
        done.rewritten.append(JOURNAL)
    if journal.damaged:  # whose line it was nobody knows: every file without a line goes
        done.dropped += [f.place for f in verdict.findings if f.kind == "unfinished"]
    for name in done.dropped:
        (store.directory / name).unlink(missing_ok=True)
