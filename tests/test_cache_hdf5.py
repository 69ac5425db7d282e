"""A store goes through one HDF5 file and comes back bit for bit, or not at all."""

import json
import shutil
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest

from cache.errors import StoreError
from cache.hdf5 import export_store, import_store
from cache.publish import canonical_json, digest_json, read_json
from cache.receipts import make_receipt, open_receipt, store_key
from cache.verify import verify_store
from tests.cache_fixtures import LAYERS, build, damage, flip, with_receipt

pytestmark = pytest.mark.usefixtures("store_here")

GOLDEN = Path(__file__).parent / "golden" / "store-v1"


@pytest.fixture
def place(tmp_path):
    return with_receipt(tmp_path / "hubert.json")


@pytest.fixture
def exported(place, tmp_path):
    export_store(place, tmp_path / "store.h5")
    return tmp_path / "store.h5"


def files(place):
    return {
        p.relative_to(place): p.read_bytes() for p in place.rglob("*") if p.is_file() and p.name not in ("writer.lock",)
    }


def lines(content):
    journal = next(v for k, v in content.items() if k.name == "journal.jsonl")
    return sorted(journal.splitlines())


@pytest.mark.parametrize("codec", ["float16", "float32"])
def test_a_store_comes_back_bit_for_bit_with_the_same_receipt(tmp_path, monkeypatch, codec):
    place, _ = build(codec=codec)
    export_store(place, tmp_path / "store.h5")
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "elsewhere"))
    again = import_store(tmp_path / "store.h5")
    assert again == tmp_path / "elsewhere" / "features" / place.name
    assert make_receipt(again, LAYERS) == make_receipt(place, LAYERS)
    one, two = files(place), files(again)
    assert lines(one) == lines(two)
    journal = Path("journal.jsonl")
    assert {k: v for k, v in one.items() if k != journal} == {k: v for k, v in two.items() if k != journal}
    assert verify_store(again, full=True).findings == []
    assert not list((tmp_path / "elsewhere").rglob("*.partial"))


@pytest.mark.parametrize("name", ["features", "waves"])
def test_the_golden_stores_come_back_infinities_and_nan_included(tmp_path, monkeypatch, name):
    monkeypatch.setenv("DECANT_STORE", str(GOLDEN))
    receipt = GOLDEN / "receipts" / f"{name}.json"
    place = open_receipt(receipt).directory
    export_store(place, tmp_path / "store.h5")
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "elsewhere"))
    again = import_store(tmp_path / "store.h5")
    assert lines(files(again)) == lines(files(place))
    assert make_receipt(again, read_json(receipt)["arrays"]) == read_json(receipt)
    open_receipt(receipt)


def test_plain_h5py_reads_the_rows_of_an_utterance(place, exported, tmp_path):
    store = open_receipt(tmp_path / "hubert.json")
    with h5py.File(exported) as file:
        ends = file["id_end"][:]
        for u, name in enumerate(store.ids):
            assert file["ids"][ends[u - 1] if u else 0 : ends[u]].tobytes().decode() == name
            start, rows = int(file["start"][u]), int(file["rows"][u])
            np.testing.assert_array_equal(file["layer-04"][start : start + rows], store.read("layer-04", u))
        used = np.zeros(len(file["layer-04"]), dtype=bool)
        for start, rows in zip(file["start"][:], file["rows"][:], strict=True):
            used[start : start + rows] = True
        assert not used.all()
        assert np.isnan(file["layer-04"][:][~used]).all()  # what lies between shards is fill


def test_exporting_twice_gives_the_same_account(place, exported, tmp_path):
    export_store(place, tmp_path / "second.h5")
    with h5py.File(exported) as one, h5py.File(tmp_path / "second.h5") as two:
        assert one.attrs["decant"] == two.attrs["decant"]
        assert str(tmp_path) not in one.attrs["decant"]


def test_an_existing_store_is_not_written_over(place, exported):
    before = files(place)
    with pytest.raises(StoreError, match="is there already"):
        import_store(exported)
    assert files(place) == before


@pytest.mark.parametrize("kind", ["payload", "index", "truncated", "deleted", "swapped", "metadata", "rows"])
def test_a_damaged_store_is_not_exported_and_leaves_no_file(place, tmp_path, kind):
    damage(kind, place)
    with pytest.raises(StoreError):
        export_store(place, tmp_path / "x" / "store.h5")
    assert not [p for p in (tmp_path / "x").rglob("*") if p.is_file()]


def test_an_unfinished_store_is_not_exported(place, tmp_path):
    text = (place / "journal.jsonl").read_text().splitlines(keepends=True)
    (place / "journal.jsonl").write_text("".join(text[:-1]))
    with pytest.raises(StoreError, match="was never finished"):
        export_store(place, tmp_path / "store.h5")


def nothing_imported(tmp_path):
    assert not [p for p in (tmp_path / "store").rglob("*") if p.is_file() and p.name != "writer.lock"]


def test_any_flipped_bit_is_refused_or_changes_nothing(place, exported, tmp_path):
    """Seeded flips over the whole file. Where one is not refused, what it hit is slack, and the store is the same."""
    wanted, content = make_receipt(place, LAYERS), files(place)
    rng, size, messages = np.random.default_rng(5), exported.stat().st_size, []
    whole = exported.read_bytes()
    shutil.rmtree(place)
    for _ in range(40):
        flip(exported, int(rng.integers(size)), 1 << int(rng.integers(8)))
        try:
            import_store(exported)
        except StoreError as error:
            messages.append(str(error))
            nothing_imported(tmp_path)
        else:
            assert make_receipt(place, LAYERS) == wanted
            again = files(place)
            assert lines(again) == lines(content)
            shutil.rmtree(place)
        exported.write_bytes(whole)
    assert len(messages) >= 25
    assert all(str(exported) in m and "\n" not in m for m in messages)


def forge(path, **changes):
    """Change the file's account of itself and make its digest fit."""
    with h5py.File(path, "r+") as file:
        about = json.loads(file.attrs["decant"])
        about.pop("digest")
        header = about["header"]
        for name, value in changes.items():
            (header if name in header else about)[name] = value
        if "fingerprint" in changes and "key" not in changes:
            header["key"] = store_key(header["kind"], header["fingerprint"])
        file.attrs["decant"] = canonical_json({**about, "digest": digest_json(about)})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hdf5_format": 2}, "export format 2 and this version reads 1"),
        ({"format": 2}, "store format 2 and this version reads 1"),
        ({"key": "../../x"}, "key is '../../x', and must be 20 digits of a digest"),
        ({"key": "0" * 20}, "its key is not that of its fingerprint"),
        ({"kind": ".."}, "kind is '..', and must be waves or features"),
        ({"arrays": {"../../evil": []}}, "which no store has"),
        ({"arrays": {}}, "which no store has"),
        ({"chunk_rows": 1, "shard_rows": 10**12}, "are no store's"),
        ({"chunk_rows": 0}, "are no store's"),
        ({"width": 10**9}, "width is 1000000000, and must be 1 to 65536"),
        ({"width": 23}, "its header says"),
        ({"codec": "float32"}, "its header says"),
        ({"shard_rows": 512}, "is not the plan|its header says"),
        ({"header": {}}, "its header is {}"),
    ],
)
def test_a_forged_account_is_refused(place, exported, tmp_path, changes, message):
    shutil.rmtree(place)
    forge(exported, **changes)
    with pytest.raises(StoreError, match=message):
        import_store(exported)
    nothing_imported(tmp_path)


def replace(path, name, **kwargs):
    with h5py.File(path, "r+") as file:
        del file[name]
        if kwargs:
            file.create_dataset(name, **kwargs)


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("rows", {"shape": (10**12,), "dtype": "<i8", "chunks": (1024,)}),  # a terabyte of nothing
        ("rows", {"shape": (10**8,), "dtype": "<i8", "chunks": (10**6,), "compression": "gzip"}),
        ("ids", {"data": np.zeros(3)}),
        ("start", {"data": np.zeros(10, dtype=np.int64)}),
        ("layer-04", {"shape": (1280, 24), "dtype": "f2", "chunks": (16, 24)}),
        ("layer-04", {"shape": (1280, 10**9), "dtype": "f2", "chunks": (16, 24)}),
        ("layer-04", {"data": np.zeros((1255, 24), dtype="f2"), "chunks": (16, 24), "compression": "gzip"}),
        ("layer-04", {}),
    ],
)
def test_a_forged_shape_a_bomb_or_a_missing_array_is_refused_in_little_memory(place, exported, tmp_path, name, kwargs):
    shutil.rmtree(place)
    replace(exported, name, **kwargs)
    tracemalloc.start()
    with pytest.raises(StoreError, match=str(exported)):
        import_store(exported)
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
    nothing_imported(tmp_path)


def test_other_numbers_under_the_same_account_are_refused_by_the_hash_of_the_shard(place, exported, tmp_path):
    shutil.rmtree(place)
    with h5py.File(exported, "r+") as file:
        file["layer-04"][300, 3] = 1.5
    with pytest.raises(StoreError, match="shard 1 of layer-04 is damaged"):
        import_store(exported)
    nothing_imported(tmp_path)


def test_a_file_that_is_no_export_is_named(tmp_path):
    with pytest.raises(StoreError, match="none.h5 does not exist"):
        import_store(tmp_path / "none.h5")
    (tmp_path / "text.h5").write_text("hello")
    with pytest.raises(StoreError, match="text.h5 is no HDF5 file"):
        import_store(tmp_path / "text.h5")
    with h5py.File(tmp_path / "foreign.h5", "w") as file:
        file["x"] = 3
    with pytest.raises(StoreError, match="foreign.h5 is HDF5 but no export of a store"):
        import_store(tmp_path / "foreign.h5")


def test_memory_is_a_few_shards_however_large_the_store(tmp_path, monkeypatch):
    from cache.receipts import store_path
    from cache.writer import open_writer

    fingerprint = {"model": "large"}
    key = store_key("features", fingerprint)
    header = {"kind": "features", "key": key, "fingerprint": fingerprint, "codec": "float16", "width": 128}
    header |= {"chunk_rows": 64, "shard_rows": 4096}
    rows = np.full(24, 4096)  # 24 shards of a megabyte
    with open_writer(store_path("features", key), header, [f"{u}" for u in range(24)], rows, ["layer-00"]) as writer:
        for shard in writer.missing():
            writer.write("layer-00", shard, np.full((4096, 128), shard, dtype=np.float16))
    tracemalloc.start()
    export_store(store_path("features", key), tmp_path / "large.h5")
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "elsewhere"))
    import_store(tmp_path / "large.h5")
    assert tracemalloc.get_traced_memory()[1] < 8e6
    tracemalloc.stop()
