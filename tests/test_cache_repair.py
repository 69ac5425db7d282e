"""A repair trusts no journal that may be another store's, and keeps every shard that is shown to be this store's."""

import shutil

import numpy as np
import pytest

from cache.errors import StoreError
from cache.publish import read_json
from cache.receipts import make_receipt, open_receipt
from cache.repair import repair_store
from cache.verify import verify_store
from cache.writer import await_header, awaits_header, open_writer
from tests.cache_fixtures import FINGERPRINT, LAYERS, ROWS, build, edit, flip, with_receipt

pytestmark = pytest.mark.usefixtures("store_here")

OTHER = {**FINGERPRINT, "model": {"kind": "hubert", "digest": "ef" * 32}}
SHARDS = [f"{layer}/c/{shard}/0" for shard in range(5) for layer in LAYERS]


@pytest.fixture
def receipt(tmp_path):
    return tmp_path / "receipts" / "teachers" / "hubert.json"


@pytest.fixture
def place(receipt):
    return with_receipt(receipt)


def other_store(scale=2.0):
    """A store of another teacher: the same utterances, layers and sizes, other numbers."""
    place, _ = build(OTHER)
    shutil.rmtree(place)
    header = {"kind": "features", "key": place.name, "fingerprint": OTHER, "codec": "float16", "width": 24}
    ids = [f"utt-é{u}" for u in range(len(ROWS))]
    header |= {"chunk_rows": 16, "shard_rows": 256}
    with open_writer(place, header, ids, np.array(ROWS, dtype=np.int64), LAYERS) as writer:
        for shard, names in writer.missing().items():
            for name in names:
                writer.write(name, shard, np.full((writer.plan.used_rows(shard), 24), scale, dtype=np.float16))
    return place


def copied_over(place):
    shutil.copytree(other_store(), place, dirs_exist_ok=True)


def test_a_store_copied_over_another_is_made_again_whole(place, receipt):
    wanted = open_receipt(receipt).read("layer-04", 3).copy()
    copied_over(place)
    (finding,) = verify_store(place).damage
    assert "copied over another store" in finding.detail
    _, done = repair_store(place)
    assert {"zarr.json", "journal.jsonl", *LAYERS} <= set(done.dropped)
    assert [p.name for p in place.iterdir()] == ["writer.lock"]
    assert build()[1] == SHARDS
    np.testing.assert_array_equal(open_receipt(receipt).read("layer-04", 3), wanted)
    assert verify_store(place, [receipt], full=True).findings == []


def test_a_receipt_does_not_make_another_stores_shards_these(place, receipt):
    copied_over(place)
    repair_store(place, [receipt])
    assert build()[1] == SHARDS
    assert make_receipt(place, LAYERS) == read_json(receipt)


def test_a_foreign_store_with_a_damaged_column_is_foreign(place):
    copied_over(place)
    flip(place / "rows" / "c" / "0", 8)
    repair_store(place)
    assert build()[1] == SHARDS


@pytest.mark.parametrize("with_header", [False, True], ids=["lost", "empty"])
def test_of_a_lost_header_what_the_receipt_has_stays_and_without_it_nothing(place, receipt, with_header):
    for receipts, made in (([receipt], []), ([], SHARDS)):
        (place / "zarr.json").unlink()
        if with_header:
            (place / "zarr.json").write_bytes(b"")
        _, done = repair_store(place, receipts)
        assert "zarr.json" in done.dropped
        assert build()[1] == made
        assert make_receipt(place, LAYERS) == read_json(receipt)
        assert verify_store(place, [receipt], full=True).findings == []


def test_of_a_lost_header_and_a_journal_with_a_line_of_its_own_that_line_goes(place, receipt):
    (place / "zarr.json").unlink()
    text = (place / "journal.jsonl").read_text().splitlines(keepends=True)
    text[3] = text[3].replace('"xxh3": "', '"xxh3": "0')[:-4] + '"}\n'
    (place / "journal.jsonl").write_text("".join(text))
    repair_store(place, [receipt])
    assert len(build()[1]) == 1
    assert verify_store(place, [receipt], full=True).findings == []


def test_a_damaged_receipt_keeps_nothing_and_is_named(place, receipt):
    edit(receipt, '"digest": "', '"digest": "0')
    (place / "zarr.json").unlink()
    _, done = repair_store(place, [receipt])
    assert [f.place for f in done.left] == [str(receipt)]
    assert build()[1] == SHARDS


def test_a_journal_without_a_header_is_not_trusted(place, receipt):
    """As a copy that was broken off, or a header deleted by hand, leaves it: the sizes fit, the numbers need not."""
    shutil.copytree(other_store(), place, dirs_exist_ok=True)
    (place / "zarr.json").unlink()
    assert build()[1] == SHARDS
    assert make_receipt(place, LAYERS) == read_json(receipt)


def test_any_flipped_bit_of_a_header_costs_no_shard(place):
    whole = (place / "zarr.json").read_bytes()
    rng = np.random.default_rng(5)
    key = whole.index(place.name.encode())
    for at in [*range(key - 12, key + 24), *rng.integers(len(whole), size=60).tolist()]:
        flip(place / "zarr.json", at, 1 << int(rng.integers(8)))
        if verify_store(place).damage:
            repair_store(place)
        assert build()[1] == [], at
        (place / "zarr.json").write_bytes(whole)


def test_what_a_repair_leaves_of_a_header_is_named_and_repaired_to_the_same(place, receipt):
    flip(place / "ids" / "c" / "0", 2)
    repair_store(place)
    (finding,) = verify_store(place, [receipt]).damage
    assert (finding.kind, "a repair took it away" in finding.detail) == ("header", True)
    with pytest.raises(StoreError, match="its header lacks"):
        open_receipt(receipt)
    before = (place / "zarr.json").read_bytes()
    repair_store(place)
    assert (place / "zarr.json").read_bytes() == before
    assert build()[1] == []
    open_receipt(receipt)


def test_what_is_left_of_another_stores_header_is_no_way_in(place):
    await_header(place, "0" * 20)
    assert not awaits_header(place, place.name)
    with pytest.raises(StoreError, match="its header lacks"):
        build()
    with pytest.raises(StoreError, match=f"holds the store {'0' * 20}, which is not beside it"):
        repair_store(place)


def test_the_only_copy_of_another_store_is_left_alone(place):
    other = other_store()
    shutil.rmtree(place)
    other.rename(place)
    with pytest.raises(StoreError, match=f"holds the store {other.name}, which is not beside it: rename it to that"):
        repair_store(place)
    place.rename(other)
    assert verify_store(other, full=True).findings == []


def test_a_store_under_a_name_of_its_owners_is_left_alone(place):
    kept = place.rename(place.with_name("keep-this"))
    with pytest.raises(StoreError, match=f"holds the store {place.name}, which is not beside it: rename it to that"):
        repair_store(kept)
    kept.rename(place)
    assert verify_store(place, full=True).findings == []
