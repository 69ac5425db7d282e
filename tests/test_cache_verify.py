"""Every kind of damage is found, named and repaired alone: what is made again is exactly what was damaged."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cache.collect import delete, find_garbage, referenced_keys
from cache.errors import ResourceError, SettingsError, StoreError
from cache.inventory import find_stores, is_complete, read_receipt, receipts_by_store
from cache.publish import read_json, write_json
from cache.receipts import make_receipt, open_receipt, store_key
from cache.repair import repair_store
from cache.verify import verify_store
from tests.cache_fixtures import FINGERPRINT, LAYERS, SHARD, build, damage, edit, with_receipt

pytestmark = pytest.mark.usefixtures("store_here")

REPO = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden" / "store-v1"


@pytest.fixture
def receipt(tmp_path):
    return tmp_path / "receipts" / "teachers" / "hubert.json"


@pytest.fixture
def place(receipt):
    return with_receipt(receipt)


def named(verdict):
    return {(f.kind, f.place) for f in verdict.damage}


# damage -> (found without reading the bytes, as what, where, what the next extraction makes without a receipt, with one)
SHARDS = [SHARD]
DAMAGES = {
    "payload": (False, "damaged", SHARD, SHARDS, SHARDS),
    "checksum": (False, "damaged", SHARD, SHARDS, SHARDS),
    "index": (False, "damaged", SHARD, SHARDS, SHARDS),
    "truncated": (True, "damaged", SHARD, SHARDS, SHARDS),
    "empty": (True, "damaged", SHARD, SHARDS, SHARDS),
    "deleted": (True, "missing", SHARD, SHARDS, SHARDS),
    "swapped": (False, "swapped", SHARD, SHARDS, SHARDS),
    "extra": (True, "extra", "layer-04/c/9", [], []),
    "metadata": (True, "metadata", "layer-04/zarr.json", [], []),
    "metadata-lost": (True, "metadata", "layer-04/zarr.json", [], []),
    "header": (True, "header", "zarr.json", [], []),
    "header-text": (True, "header", "zarr.json", [], []),
    "header-field": (True, "header", "zarr.json", [], []),
    "rows": (True, "column", "rows/c/0", [], []),
    "ids": (True, "column", "ids/c/0", [], []),
    "start": (True, "column", "start/c/0", [], []),
    "column-metadata": (True, "column", "rows/zarr.json", [], []),
    "column-lost": (True, "column", "id_end/c/0", [], []),
    "journal-line": (True, "journal", "journal.jsonl", SHARDS, []),
    "journal-hash": (False, "swapped", SHARD, SHARDS, []),
    "journal-size": (True, "damaged", SHARD, SHARDS, []),
    "journal-array": (True, "journal", "journal.jsonl", SHARDS, []),
    "journal-shard": (True, "journal", "journal.jsonl", SHARDS, []),
}


@pytest.mark.parametrize("known", [False, True], ids=["journal", "receipt"])
@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_named_and_repaired_alone(place, receipt, kind, known):
    fast, what, where, made, made_with_receipt = DAMAGES[kind]
    receipts = [receipt] if known else []
    wanted = read_json(receipt)
    before = {p: p.read_bytes() for p in place.rglob("*") if p.is_file() and p.name != "writer.lock"}
    damage(kind, place)
    if known and kind.startswith("journal-"):
        fast, what, where = (True, "journal", SHARD)
    if fast:
        assert (what, where) in named(verify_store(place, receipts))
    elif not known:
        assert not verify_store(place).damage
    verdict = verify_store(place, receipts, full=True)
    assert (what, where) in named(verdict)
    assert {f.place for f in verdict.damage} <= {where, "journal.jsonl", SHARD}
    _, done = repair_store(place, receipts)
    assert not done.left
    _, extracted = build()
    assert extracted == (made_with_receipt if known else made)
    assert make_receipt(place, LAYERS) == wanted
    assert verify_store(place, [receipt], full=True).findings == []
    after = {p: p.read_bytes() for p in place.rglob("*") if p.is_file() and p.name != "writer.lock"}
    journal = place / "journal.jsonl"
    assert sorted(before.pop(journal).splitlines()) == sorted(set(after.pop(journal).splitlines()))
    assert after == before


def test_a_sound_store_is_left_exactly_as_it_is(place, receipt):
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in place.rglob("*") if p.name != "writer.lock"}
    verdict, done = repair_store(place, [receipt])
    assert verdict.findings == []
    assert (verdict.shards, verdict.bytes) == (2 * 5, read_json(receipt)["bytes"])
    assert [done.dropped, done.rewritten, done.removed, done.left] == [[], [], [], []]
    assert before == {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in before}


def test_the_golden_stores_are_sound(monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(GOLDEN))
    by_store, bad = receipts_by_store(sorted((GOLDEN / "receipts").glob("*.json")))
    assert not bad
    assert len(by_store) == 2
    for place, receipts in by_store.items():
        assert verify_store(place, receipts, full=True).findings == []


def test_a_swapped_shard_says_whose_bytes_it_holds(place):
    damage("swapped", place)
    (finding,) = verify_store(place, full=True).damage
    assert finding.detail == "holds the bytes of shard 1 of layer-00"


def test_what_a_killed_run_leaves_is_named_and_is_no_damage(place):
    (place / "layer-04" / "c" / "1" / ".0.partial").write_bytes(b"half")
    with open(place / "journal.jsonl", "ab") as file:
        file.write(b'{"array": "layer')
    verdict = verify_store(place, full=True)
    assert {(f.kind, f.place) for f in verdict.findings} == {
        ("leftover", "layer-04/c/1/.0.partial"),
        ("leftover", "journal.jsonl"),
    }
    assert not verdict.damage
    repair_store(place)
    assert verify_store(place, full=True).findings == []


def test_an_unfinished_store_is_unfinished_and_damaged_only_if_a_receipt_says_it_was_finished(place, receipt):
    lines = (place / "journal.jsonl").read_text().splitlines(keepends=True)
    (place / "journal.jsonl").write_text("".join(lines[:-1]))
    last = json.loads(lines[-1])
    name = f"{last['array']}/c/{last['shard']}/0"
    verdict = verify_store(place, full=True)
    assert [(f.kind, f.place, f.damage) for f in verdict.findings] == [("unfinished", name, False)]
    assert not is_complete_store(place)
    assert named(verify_store(place, [receipt])) == {("journal", name)}
    repair_store(place, [receipt])
    assert verify_store(place, [receipt], full=True).findings == []


def is_complete_store(place):
    from cache.ragged import Store

    return is_complete(Store(place))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("ab" * 32, "ab" * 31 + "ac", "its key is not the digest of its fingerprint"),
        ('"xxh3', '"xxh4', None),
        ('"digest": "', '"digest": "0', "digest is not"),
        ('"format": 1', '"format": 3', "receipt format 3"),
        ('"rows": ', '"rows": 1', "rows is 1"),
        ('"utterances": ', '"utterances": 1', "utterances is 1"),
        ('"bytes": ', '"bytes": 1', "bytes is 1"),
        ('"width": 24', '"width": 25', "layer-00 is 25 wide"),
        ("{", "[", "not valid JSON"),
    ],
)
def test_a_changed_receipt_is_named_and_the_store_is_left_alone(place, receipt, old, new, message):
    if message is None:
        data = read_json(receipt)  # a shard's hash
        data["arrays"]["layer-04"]["shards"][1][1] = "0" * 32
        write_json(receipt, data)
        message = "layer-04.digest is not that of its shards"
    else:
        edit(receipt, old, new)
    by_store, bad = receipts_by_store([receipt])
    findings = bad or verify_store(place, by_store[place], full=True).findings
    assert [f.kind for f in findings] == ["receipt"]
    assert message in findings[0].detail
    assert str(receipt) in f"{findings[0].place}"
    _, done = repair_store(place, [receipt])
    assert [done.dropped, done.rewritten, done.removed] == [[], [], []]
    assert [f.kind for f in done.left] == ["receipt"]
    assert build()[1] == []
    write_json(receipt, make_receipt(place, LAYERS))  # the stage writes it again and makes no shard
    assert verify_store(place, [receipt], full=True).findings == []


def test_a_receipt_of_other_bytes_is_the_reference(place, receipt):
    """A store of the same key made from something else: every shard that differs is named and none is trusted."""
    from cache.publish import digest_json

    data = read_json(receipt)
    shards = data["arrays"]["layer-00"]["shards"]
    shards[2][1] = "0" * 32
    data["arrays"]["layer-00"]["digest"] = digest_json(shards)
    write_json(receipt, data)
    assert named(verify_store(place, [receipt])) == {("journal", "layer-00/c/2/0")}
    assert named(verify_store(place, [receipt], full=True)) == {("swapped", "layer-00/c/2/0")}
    repair_store(place, [receipt])
    assert build()[1] == ["layer-00/c/2/0"]


def test_any_flipped_bit_of_a_store_is_found(place, receipt):
    """Two hundred drawn bits of all files; the lock alone may hold anything, and spaces in JSON may change."""
    files = sorted(p for p in place.rglob("*") if p.is_file() and p.name != "writer.lock")
    rng = np.random.default_rng(11)
    for _ in range(200):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        changed = bytearray(whole)
        changed[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            same = path.suffix in (".json", ".jsonl") and [json.loads(line) for line in changed.split(b"\n") if line]
            same = same and same == [json.loads(line) for line in whole.split(b"\n") if line]
        except ValueError:
            same = False
        if not same:
            assert verify_store(place, [receipt], full=True).findings, path
        path.write_bytes(whole)
    assert verify_store(place, [receipt], full=True).findings == []


def test_repair_and_gc_leave_a_store_that_is_being_written(place):
    script = (
        "import sys, time; from cache.process import exclusive; from pathlib import Path\n"
        "with exclusive(Path(sys.argv[1]) / 'writer.lock'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(place)], stdout=subprocess.PIPE, text=True, cwd=REPO)
    try:
        assert holder.stdout.readline() == "held\n"
        damage("payload", place)
        with pytest.raises(ResourceError, match=f"is being written by process {holder.pid}"):
            repair_store(place)
        (garbage,) = find_garbage(place.parent.parent, set())
        assert not delete(garbage)
        assert place.exists()
    finally:
        holder.kill()
        holder.wait()
    repair_store(place)
    assert build()[1] == SHARDS


def test_a_repair_that_was_killed_between_its_steps_loses_nothing(place):
    """The journal without the line, the file still there: the file does not exist, and the shard is made again."""
    damage("payload", place)
    lines = (place / "journal.jsonl").read_text().splitlines(keepends=True)
    (place / "journal.jsonl").write_text("".join(x for x in lines if '"layer-04", "shard": 1,' not in x))
    assert build()[1] == SHARDS
    assert verify_store(place, full=True).findings == []


def test_there_is_nothing_to_repair_where_there_is_no_store(tmp_path):
    with pytest.raises(StoreError, match="there is no store at"):
        repair_store(tmp_path / "store" / "features" / "nothing")


def test_gc_keeps_what_is_referred_to_and_takes_the_rest(place, receipt, tmp_path):
    other, _ = build({"model": "other"})
    third, _ = build({"model": "third"})
    targets = tmp_path / "data" / "targets" / "s.json"
    write_json(targets, {"format": 1, "kind": "targets", "key": other.name, "arrays": {}})
    left = third.parent / f".{'0' * 20}.partial"
    left.mkdir()
    (left / "x").write_bytes(b"12345")
    places = [receipt.parent.parent, targets.parent]
    garbage = find_garbage(tmp_path / "store", referenced_keys(places))
    assert [(g.place, g.note) for g in garbage] == [(third, ""), (left, "leftover")]
    assert garbage[0].bytes == sum(p.stat().st_size for p in third.rglob("*") if p.is_file())
    assert all(delete(g) for g in garbage)
    assert find_stores(tmp_path / "store") == sorted([place, other])
    assert not list((tmp_path / "store").rglob("*partial"))
    open_receipt(receipt)


def test_gc_refuses_rather_than_lose_a_store_to_a_damaged_receipt(place, receipt, tmp_path):
    with pytest.raises(SettingsError, match="names a store, so all would go"):
        (tmp_path / "empty").mkdir()
        referenced_keys([tmp_path / "empty"])
    with pytest.raises(SettingsError, match="nowhere does not exist"):
        referenced_keys([tmp_path / "nowhere"])
    key = store_key("features", FINGERPRINT)
    edit(receipt, f'"{key}"', f'"{"0" * 20}"')
    with pytest.raises(StoreError, match="its key is not the digest of its fingerprint"):
        referenced_keys([receipt])
    receipt.write_text("{")
    with pytest.raises(StoreError, match="is not valid JSON"):
        referenced_keys([receipt])


def test_a_receipt_of_a_store_that_is_gone_is_damage(place, receipt):
    shutil.rmtree(place)
    by_store, _ = receipts_by_store([receipt])
    assert read_receipt(receipt)["key"] == place.name
    assert named(verify_store(place, by_store[place])) == {("header", "zarr.json")}
