"""cache: stores and their receipts in; a listing, a check, a repair, a clean-up or one HDF5 file out."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stages import cacheplan

if TYPE_CHECKING:
    from cache.repair import Repair

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Look after the stores under $DECANT_STORE (default: store/): list, check, repair, clean, move.",
)
NAMES = ("plan", "ls", "info", "verify", "repair", "gc", "export", "import")
Json = Annotated[bool, typer.Option("--json", help="One JSON value instead of lines.")]
Receipts = Annotated[list[Path] | None, typer.Option(help="Receipts, or folders of them; may be given several times.")]
Which = Annotated[str, typer.Argument(metavar="STORE", help="Key of a store, its first letters, or a receipt.")]


app.command("plan", short_help="what an extraction will take, before it runs")(cacheplan.main)


@app.command("ls", short_help="the stores there are")
def list_stores(as_json: Json = False) -> None:
    """One line a store: kind, key, model, utterances, rows, arrays, bytes, complete or not."""
    from cache.inventory import find_stores
    from cache.receipts import store_root

    found = [_describe(place) for place in find_stores(store_root())]
    if as_json:
        _print_json([{k: v for k, v in store.items() if k != "fingerprint"} for store in found])
        return
    print(f"{'kind':9} {'key':20} {'model':22} {'utterances':>10} {'rows':>13} {'arrays':>6} {'MB':>12}")
    for s in found:
        if "error" in s:
            print(f"{s['kind']:9} {s['key']:20} unreadable: {s['error']}")
            continue
        row = f"{s['kind']:9} {s['key']:20} {s['model']:22} {s['utterances']:>10,} {s['rows']:>13,}"
        print(f"{row} {len(s['arrays']):>6} {s['bytes'] / 1e6:>12,.1f}{'' if s['complete'] else '  unfinished'}")


@app.command("info", short_help="one store: what it was made from, and its arrays")
def info(which: Which, as_json: Json = False) -> None:
    """What one store holds and everything that decided its bytes."""
    from cache.errors import StoreError

    about = _describe(_find(which))
    if "error" in about:
        raise StoreError(about["error"])
    if as_json:
        _print_json(about)
        return
    for name, value in about.items():
        for key, inner in value.items() if isinstance(value, dict) else [("", value)]:
            shown = ", ".join(inner) if isinstance(inner, list) else f"{inner:,}" if type(inner) is int else inner
            print(f"{f'{name}.{key}'.rstrip('.'):28} {shown}")


@app.command("verify", short_help="name everything that is damaged")
def verify(
    stores: Annotated[list[str] | None, typer.Argument(help="Keys of stores or receipts; all stores if none.")] = None,
    receipts: Receipts = None,
    full: Annotated[bool, typer.Option("--full", help="Read every byte: hashes and checksums too.")] = False,
    as_json: Json = False,
) -> None:
    """Compare stores with their journals and receipts; exit code 4 if anything is damaged."""
    from cache.collect import json_files
    from cache.errors import StoreError
    from cache.inventory import find_stores, receipts_by_store
    from cache.receipts import store_root
    from cache.verify import verify_store

    places = [_find(s) for s in stores or []]
    by_store, bad = receipts_by_store(json_files([*(receipts or []), *_receipts_among(stores or [])]))
    places = places or sorted({*find_stores(store_root()), *by_store})
    verdicts = []
    for place in places:
        with _ticking(f"verify {place.name}", place, show=full and not as_json) as tick:
            verdicts.append(verify_store(place, by_store.get(place, []), full, tick))
    findings = [(f"{v.directory.parent.name}/{v.directory.name}", f) for v in verdicts for f in v.findings]
    if as_json:
        rows = [
            {"store": s, "kind": f.kind, "place": f.place, "detail": f.detail, "damage": f.damage} for s, f in findings
        ]
        rows += [{"store": None, "kind": f.kind, "place": f.place, "detail": f.detail, "damage": True} for f in bad]
        _print_json(
            {"stores": len(verdicts), "shards": sum(v.shards for v in verdicts), "full": full, "findings": rows}
        )
    else:
        for store, f in findings:
            print(f"{store}: {f.kind}: {f.place}: {f.detail.removeprefix(f.place + ': ')}")
        for f in bad:
            print(f"{f.kind}: {f.detail}")
    damaged = [v for v in verdicts if v.damage]
    if damaged or bad:
        where = ", ".join(v.directory.name for v in damaged)
        parts = [f"{len(damaged)} of {len(verdicts)} stores damaged ({where})"] * bool(damaged)
        parts += [f"{len(bad)} receipts damaged"] * bool(bad)
        mend = f"; `decant cache repair {damaged[0].directory.name}` drops what is" if damaged else ""
        raise StoreError(" and ".join(parts) + mend)
    if not as_json:
        how = "hashes and checksums" if full else "names and sizes; --full reads every byte"
        print(f"{len(verdicts)} stores, {sum(v.shards for v in verdicts):,} shards sound ({how})")


@app.command("repair", short_help="drop what is damaged, so that it is made again alone")
def repair(which: Which, receipts: Receipts = None, as_json: Json = False) -> None:
    """Drop exactly the damaged shards of a store (it is read in full); prints the command that makes them again."""
    from cache.collect import json_files
    from cache.errors import StoreError
    from cache.inventory import receipts_by_store
    from cache.repair import repair_store

    place = _find(which)
    by_store, _ = receipts_by_store(json_files([*(receipts or []), *_receipts_among([which])]))
    _, done = repair_store(place, by_store.get(place, []))
    command = _command(done, by_store.get(place, []))
    if as_json:
        left = [f"{f.place}: {f.detail}" for f in done.left]
        _print_json({k: getattr(done, k) for k in ("dropped", "rewritten", "removed")} | {"left": left, "run": command})
    else:
        for verb in ("dropped", "rewritten", "removed"):
            for name in getattr(done, verb):
                print(f"{verb} {name}")
        print(f"now run: {command}" if command else "nothing has to be made again")
    if done.left:
        raise StoreError(
            f"{done.left[0].place}: {done.left[0].detail}; take it from git, or run the stage that writes it"
        )


@app.command("gc", short_help="delete stores that no receipt names")
def gc(
    places: Annotated[list[Path], typer.Argument(help="Folders and files with receipts and targets, searched whole.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it only say what would go.")] = False,
    as_json: Json = False,
) -> None:
    """Find stores that no JSON file in PLACES refers to; other checkouts that share the stores have receipts, too."""
    from cache.collect import delete, find_garbage, referenced_keys
    from cache.receipts import store_root

    garbage = find_garbage(store_root(), referenced_keys(places))
    rows: list[dict[str, Any]] = [
        {
            "store": f"{g.place.parent.name}/{g.place.name}",
            "bytes": g.bytes,
            "leftover": bool(g.note),
            "link_to": g.elsewhere or None,
            "deleted": yes and delete(g),
        }
        for g in garbage
    ]
    if as_json:
        _print_json(rows)
        return
    for row in rows:
        verb = ("deleted" if row["deleted"] else "in use, kept") if yes else "would delete"
        link = f"; a link: what is at {row['link_to']} stays" if row["link_to"] else ""
        print(f"{verb} {row['store']} ({row['bytes'] / 1e6:,.1f} MB){link}")
    total = sum(g.bytes for g in garbage) / 1e6
    print(f"{len(garbage)} that nothing refers to, {total:,.1f} MB" + ("" if yes or not garbage else "; --yes deletes"))


@app.command("export", short_help="one store -> one HDF5 file")
def export(
    which: Which, out: Annotated[Path, typer.Option(help="The HDF5 file to write.")], as_json: Json = False
) -> None:
    """Write a complete store to one HDF5 file, checking every shard."""
    from cache.hdf5 import export_store

    place = _find(which)
    with _ticking(f"export {place.name}", place, show=not as_json) as tick:
        export_store(place, out, tick)
    size = out.stat().st_size
    _print_json({"file": str(out), "bytes": size}) if as_json else print(f"{out}: {size / 1e6:,.1f} MB")


@app.command("import", short_help="an exported HDF5 file -> the same store")
def import_file(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="What `decant cache export` wrote.")],
    as_json: Json = False,
) -> None:
    """Make the store that FILE was exported from, bit for bit, or nothing."""
    from cache.hdf5 import import_store

    place = import_store(source)
    name = f"{place.parent.name}/{place.name}"
    _print_json({"store": name}) if as_json else print(f"imported {name}")


def _command(done: "Repair", receipts: list[Path]) -> str | None:
    """What makes again what was dropped."""
    if not done.dropped:
        return None
    if done.directory.parent.name == "waves":
        return "dvc repro -f -s prepare   (makes the whole wave store)"
    for path in receipts:
        stage = {"teachers": "extract", "features": "features"}.get(path.resolve().parent.name)
        if stage:
            return f"dvc repro -f -s {stage}@{path.stem}"
    return "dvc repro -f -s extract features   (or the `decant extract` that made it; the rest is found done)"


def _receipts_among(stores: list[str]) -> list[Path]:
    """Stores that were named by their receipt, which says what is in them as those of `--receipts` do."""
    return [Path(name) for name in stores if name.endswith(".json")]


def _find(which: str) -> Path:
    """The folder of a store, by key, by the first letters of one, or by a receipt."""
    from cache.errors import SettingsError
    from cache.inventory import find_stores, read_receipt
    from cache.receipts import store_path, store_root

    if which.endswith(".json"):
        receipt = read_receipt(Path(which))
        return store_path(receipt["kind"], receipt["key"])
    stores = find_stores(store_root())
    found = [p for p in stores if p.name.startswith(which.removeprefix(f"{p.parent.name}/"))]
    if len(found) == 1:
        return found[0]
    there = ", ".join(p.name for p in (found or stores)[:8]) or "none"
    wrong = f"fits {len(found)} stores" if found else "is no store"
    raise SettingsError(f"{which!r} {wrong} under {store_root()}; there are {there}")


def _describe(place: Path) -> dict[str, Any]:
    """A row of the listing."""
    from cache.errors import DecantError
    from cache.inventory import arrays_of, is_complete
    from cache.journal import read_journal
    from cache.ragged import Store

    row: dict[str, Any] = {"kind": place.parent.name, "key": place.name}
    try:
        store = Store(place)
        model = store.fingerprint.get("model")
        name = f"{model['kind']} {model['digest'][:8]}" if isinstance(model, dict) else str(model or "-")
        size = sum(b for b, _ in read_journal(place).rows.values())
        row |= {"model": name, "utterances": len(store.rows), "rows": int(store.rows.sum()), "codec": store.codec}
        row |= {"width": store.width, "arrays": arrays_of(store), "bytes": size, "complete": is_complete(store)}
        return row | {"fingerprint": store.fingerprint}
    except (DecantError, KeyError, TypeError, ValueError, AttributeError) as error:
        return row | {"error": f"{error}", "complete": False}


def _ticking(title: str, place: Path, show: bool) -> Any:
    """Progress over the bytes of a store's shards, or silence."""
    from contextlib import nullcontext

    from cache.journal import read_journal
    from stages._progress import progress

    if not show:
        silent: Callable[[int], None] = lambda _: None  # noqa: E731
        return nullcontext(silent)
    return progress(title, total=float(sum(b for b, _ in read_journal(place).rows.values())), unit="bytes")


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value, indent=1, ensure_ascii=False))
