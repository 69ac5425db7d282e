"""A product takes its place in one step: whoever looks sees the old one whole, or the new one whole."""

import shutil

import pytest

from cache.publish import publish_dir


@pytest.fixture
def place(tmp_path):
    place = tmp_path / "product"
    with publish_dir(place) as partial:
        (partial / "which").write_text("old")
    return place


def publish_new(place):
    with publish_dir(place) as partial:
        (partial / "which").write_text("new")


def test_the_old_one_is_deleted_when_the_new_one_is_there(place, monkeypatch):
    seen = []
    rmtree = shutil.rmtree

    def looking(folder, *args, **kwargs):
        seen.append((place / "which").read_text())
        rmtree(folder, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", looking)
    publish_new(place)
    assert seen == ["new"]
    assert sorted(p.name for p in place.parent.iterdir()) == ["product"]


def test_a_failure_leaves_the_old_one(place):
    with pytest.raises(RuntimeError), publish_dir(place) as partial:
        (partial / "which").write_text("half")
        raise RuntimeError
    assert (place / "which").read_text() == "old"
    publish_new(place)
    assert (place / "which").read_text() == "new"


def test_a_link_is_replaced_and_what_it_points_to_stays(place):
    elsewhere = place.rename(place.with_name("elsewhere"))
    place.symlink_to(elsewhere)
    publish_new(place)
    assert (place / "which").read_text() == "new"
    assert not place.is_symlink()
    assert (elsewhere / "which").read_text() == "old"


def test_what_a_kill_left_behind_goes_with_the_next_one(place):
    place.rename(place.with_name(".product.before.partial"))
    publish_new(place)
    assert sorted(p.name for p in place.parent.iterdir()) == ["product"]
