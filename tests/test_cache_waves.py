"""Preparing waves again: a sound store stays where it is, anything else gives way only to a whole one."""

import os
import shutil

import numpy as np
import pytest

from cache.collect import delete, find_garbage
from cache.errors import ResourceError
from cache.publish import read_json, write_json
from cache.receipts import make_receipt, open_receipt, store_key
from cache.verify import verify_store
from cache.waves import WaveWriter
from tests.cache_fixtures import build, edit, flip

pytestmark = pytest.mark.usefixtures("store_here")

FACTS = {"audio": "x"}


@pytest.fixture
def stores(tmp_path):
    return tmp_path / "store" / "waves"


def prepare(stores):
    rng = np.random.default_rng(0)
    with WaveWriter(stores) as writer:
        for u in range(5):
            writer.add(f"w{u}", rng.integers(-(2**15), 2**15, 400 + 10_000 * u).astype(np.int16))
        return writer.finish(store_key("waves", FACTS), FACTS)


def names(stores):
    return sorted(p.name for p in stores.iterdir())


def inodes(place):
    return {p: p.stat().st_ino for p in place.rglob("*")}


def test_a_sound_store_of_the_same_waves_stays(stores):
    place = prepare(stores)
    (place / "notes.txt").write_text("somebody's")
    before = inodes(place)
    assert prepare(stores) == place
    assert inodes(place) == before
    assert names(stores) == sorted([place.name, "writer.lock"])


def wreck(how, place):
    match how:
        case "payload":
            flip(place / "wave" / "c" / "0", 100)
        case "column":
            flip(place / "ids" / "c" / "0", 0)
        case "header":
            edit(place / "zarr.json", '"x"', '"y"')
        case "journal":
            (place / "journal.jsonl").unlink()
        case "shard":
            (place / "wave" / "c" / "0").unlink()
        case "folder":
            shutil.rmtree(place / "wave")


@pytest.mark.parametrize("how", ["payload", "column", "header", "journal", "shard", "folder"])
def test_a_damaged_store_is_deleted_when_the_whole_one_is_in_its_place(stores, tmp_path, monkeypatch, how):
    place = prepare(stores)
    write_json(tmp_path / "waves.json", make_receipt(place, ["wave"]))
    wreck(how, place)
    (stores / f".{place.name}.partial").mkdir()  # what a killed run left
    real, deleted = shutil.rmtree, []

    def rmtree(folder, **options):
        if os.path.exists(os.path.join(folder, "zarr.json")):
            deleted.append(verify_store(place, [tmp_path / "waves.json"], full=True).findings)
        real(folder, **options)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    prepare(stores)
    assert deleted == [[]]  # one old store, and at that moment the new one was whole and had its name
    assert names(stores) == sorted([place.name, "writer.lock"])
    assert make_receipt(place, ["wave"]) == read_json(tmp_path / "waves.json")


def test_a_sound_store_behind_a_link_stays_there(stores, tmp_path):
    place = prepare(stores)
    big = place.rename(tmp_path / "big-disk")
    place.symlink_to(big)
    assert prepare(stores) == place
    assert place.is_symlink()
    assert names(stores) == sorted([place.name, "writer.lock"])


@pytest.mark.parametrize("how", ["payload", "gone"])
def test_a_link_to_no_sound_store_gives_way_and_what_it_leads_to_stays(stores, tmp_path, capsys, how):
    place = prepare(stores)
    receipt = make_receipt(place, ["wave"])
    big = place.rename(tmp_path / "big-disk")
    place.symlink_to(big)
    wreck("payload", big) if how == "payload" else shutil.rmtree(big)
    assert prepare(stores) == place
    assert not place.is_symlink()
    assert big.exists() == (how == "payload")
    assert f"what is at {big} stays" in capsys.readouterr().err
    assert names(stores) == sorted([place.name, "writer.lock"])
    open_receipt(receipt, verify=True)


def test_a_file_in_the_place_of_a_store_gives_way(stores):
    place = prepare(stores)
    shutil.rmtree(place)
    place.write_text("")
    assert prepare(stores).is_dir()
    assert verify_store(place, full=True).findings == []


def test_what_cannot_be_moved_aside_is_named(stores, monkeypatch):
    place = prepare(stores)
    wreck("payload", place)
    real = os.replace

    def replace(a, b):
        if a == place:  # a disk that is mounted there
            raise OSError(16, "Device or resource busy", str(place))
        real(a, b)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(ResourceError, match="in the way and cannot be moved aside"):
        prepare(stores)
    assert place.is_dir()


def test_gc_takes_a_link_and_leaves_what_it_leads_to(tmp_path):
    place, _ = build()
    big = place.rename(tmp_path / "big-disk")
    place.symlink_to(big)
    left = place.with_name(f".{'0' * 20}.partial")  # what an earlier version left of such a store
    left.symlink_to(big)
    garbage = find_garbage(tmp_path / "store", set())
    assert [(g.place, g.bytes, g.note, g.elsewhere) for g in garbage] == [
        (place, 0, "", str(big)),
        (left, 0, "leftover", str(big)),
    ]
    assert all(delete(g) for g in garbage)
    assert names(place.parent) == ["writer.lock"]
    assert (big / "journal.jsonl").exists()
