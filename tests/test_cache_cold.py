"""Rows that are not in memory come from the disk as they were written, whoever has to be told of them first."""

import os

import numpy as np
import pytest

from cache import scatter
from cache.errors import StoreError
from cache.ragged import Store
from tests.cache_fixtures import LAYERS, ROWS, SHARD, build


def forget(place):
    """Drop the files of a store from the page cache; how many pages of them are still there is the kernel's affair."""
    for path in place.rglob("c/*/0"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    return build()[0]


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("refusal", [None, "EAGAIN", "EOPNOTSUPP", "no such call"])
def test_cold_rows_are_the_warm_ones(place, monkeypatch, verify, refusal):
    everyone = list(range(len(ROWS)))
    want, counts = Store(place, verify=verify).read_batch(everyone, LAYERS)
    told = []
    advise = os.posix_fadvise
    monkeypatch.setattr(scatter.os, "posix_fadvise", lambda *stretch: (told.append(stretch), advise(*stretch)))
    if refusal == "no such call":
        monkeypatch.setattr(scatter, "_preadv2", None)
    elif refusal is not None:

        def refuse(*_):
            scatter.ctypes.set_errno(getattr(scatter.errno, refusal))
            return -1

        monkeypatch.setattr(scatter, "_preadv2", refuse)
    forget(place)
    told.clear()
    got, again = Store(place, verify=verify).read_batch(everyone, LAYERS)
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
    np.testing.assert_array_equal(again, counts)
    if refusal == "EAGAIN":
        assert len(told) == len(ROWS) * len(LAYERS)  # once, of everything that is still to come
    if refusal in ("EOPNOTSUPP", "no such call"):  # a file system that says so of what is in memory, too
        assert told == []


@pytest.mark.parametrize("verify", [False, True])
def test_nothing_read_without_waiting_is_not_yet_the_end(place, monkeypatch, verify):
    """Linux 5.9 and 5.10 may answer 0 where other versions say EAGAIN (preadv2(2), bugs)."""
    everyone = list(range(len(ROWS)))
    want, _ = Store(place, verify=verify).read_batch(everyone, LAYERS)
    calls = []
    monkeypatch.setattr(scatter, "_preadv2", lambda *call: calls.append(call) or 0)
    store = Store(place, verify=verify)
    got, _ = store.read_batch(everyone, LAYERS)
    np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
    assert calls
    os.truncate(place / SHARD, 1_000)
    with pytest.raises(StoreError, match=r"layer-04/c/1/0: it is cut short"):
        store.read_batch(everyone, LAYERS)


def test_what_is_in_memory_is_not_asked_for_again(place, monkeypatch):
    store = Store(place)
    store.read_batch(list(range(len(ROWS))), LAYERS)  # brings it there
    monkeypatch.setattr(scatter.os, "posix_fadvise", lambda *_: pytest.fail("told of bytes that it has"))
    for verify in (False, True):
        Store(place, verify=verify).read_batch([3, 1], LAYERS)


@pytest.mark.parametrize("verify", [False, True])
def test_a_cold_shard_that_was_cut_short_is_still_named(place, verify):
    store = Store(place, verify=verify)
    store.read_batch([0, 3, 4], LAYERS)  # opens the shards
    os.truncate(place / SHARD, 1_000)
    forget(place)
    with pytest.raises(StoreError, match=r"layer-04/c/1/0: it is cut short"):
        store.read_batch([0, 3, 4], LAYERS)
