"""However few files a process may open, stores of any number of shards give their rows, and room is left for others."""

import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import cache.local
from cache.errors import ResourceError
from cache.ragged import Store
from cache.receipts import store_key, store_path
from cache.writer import open_writer

LAYERS = ("layer-00", "layer-04")
SHARDS = 70


def build(root, name):
    """A store of which every utterance is a shard of each layer, and what it holds."""
    rng = np.random.default_rng(len(name))
    data = {layer: rng.normal(size=(SHARDS, 16, 4)).astype(np.float16) for layer in LAYERS}
    fingerprint = {"model": name}
    header = {"kind": "features", "key": store_key("features", fingerprint), "fingerprint": fingerprint}
    header |= {"codec": "float16", "width": 4, "chunk_rows": 8, "shard_rows": 16}
    place = store_path("features", header["key"])
    rows = np.full(SHARDS, 16, dtype=np.int64)
    with open_writer(place, header, [f"u{u}" for u in range(SHARDS)], rows, LAYERS) as writer:
        for shard, names in writer.missing().items():
            for layer in names:
                writer.write(layer, shard, data[layer][shard])
    return place, np.stack([data[layer] for layer in LAYERS], axis=1)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    root = tmp_path_factory.mktemp("handles")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECANT_STORE", str(root))
        return [build(root, name) for name in ("hubert", "wavlm-base")]


def num_open():
    return len(os.listdir("/dev/fd")) - 1  # without the folder itself


@contextmanager
def at_most(files):
    """Let this process have so many files open."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def room_for(files):
    """Let this process open so many files more; the others that it may are taken."""
    taken = []
    with at_most(num_open() + 200):
        try:
            with pytest.raises(OSError, match="Too many open files"):
                while True:
                    taken.append(os.open(os.devnull, os.O_RDONLY))
            for _ in range(files):
                os.close(taken.pop())
            yield
        finally:
            for handle in taken:
                os.close(handle)


def check(store, values, utterances):
    got, _ = store.read_batch(utterances, LAYERS)
    np.testing.assert_array_equal(got.reshape(values[utterances].shape), values[utterances])
    again = np.zeros_like(got)
    store.read_into(utterances, LAYERS, again)  # as a trainer reads
    np.testing.assert_array_equal(again, got)


@pytest.mark.parametrize("verify", [False, True])
def test_stores_of_more_shards_than_a_process_may_open_leave_room_for_others(stores, verify):
    draw = np.random.default_rng(5)
    readers = [(Store(place, verify=verify), values) for place, values in stores]
    files = num_open() + 120
    with at_most(files):
        for _ in range(30):
            for store, values in readers:
                check(store, values, draw.choice(SHARDS, 16, replace=False).tolist())
            assert num_open() <= files * 7 // 8
    before = num_open()
    for store, _ in readers:
        store.close()
    assert before - num_open() > 40  # it did keep many


@pytest.mark.parametrize("files", [60, 3, 1])
@pytest.mark.parametrize("verify", [False, True])
def test_a_batch_of_more_shards_than_can_be_open_at_once_is_read_in_parts(stores, files, verify):
    place, values = stores[0]
    store = Store(place, verify=verify)
    check(store, values, [0])
    store.close()
    with room_for(files):
        check(store, values, list(range(SHARDS)))
        assert len(store._shards._open) <= files


def test_shards_of_another_store_stay_open_where_files_run_out(stores):
    """Another thread may be reading them."""
    (place, values), (other_place, other_values) = stores
    other, store = Store(other_place), Store(place)
    check(other, other_values, list(range(20)))
    held = dict(other._shards._open)
    check(store, values, [0])
    with room_for(5):
        check(store, values, list(range(SHARDS)))
    assert other._shards._open == held
    check(other, other_values, list(range(SHARDS)))


def test_a_store_that_nobody_has_any_more_has_no_files_open(stores):
    place, values = stores[0]
    before = num_open()
    store = Store(place)
    check(store, values, [1, 2, 3])
    assert num_open() == before + 6
    del store
    assert num_open() == before


def test_where_not_one_file_more_can_be_opened_the_way_out_is_named(stores):
    place, values = stores[0]
    store = Store(place)
    check(store, values, [0])
    store.close()
    out = np.zeros((2, 2, 16, 4), dtype=np.float16)
    with room_for(0):
        for read in (lambda: store.read_into([3, 4], LAYERS, out), lambda: store.read(LAYERS[0], 3)):
            with pytest.raises(ResourceError, match=r"c/\d/0 cannot be opened: .* \(\d+\), .* `ulimit -n \d+`"):
                read()
    check(store, values, [3, 4])


def test_a_batch_whose_shards_are_open_asks_for_no_limit(stores, monkeypatch):
    place, values = stores[0]
    store = Store(place)
    check(store, values, [1, 2, 3])
    monkeypatch.setattr(cache.local.resource, "getrlimit", lambda _: pytest.fail("work without need"))
    check(store, values, [3, 1])


def test_every_command_may_open_more_files_than_a_shell_grants_it():
    code = (
        "import resource, sys\n"
        "from stages.__main__ import OPEN_FILES, main\n"
        "_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
        "for ours in (hard, 300):\n"
        "    resource.setrlimit(resource.RLIMIT_NOFILE, (200, ours))\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        "    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (min(ours, OPEN_FILES), ours)\n"
    )
    subprocess.run([sys.executable, "-c", code, "--help"], check=True, cwd=Path(__file__).parents[1])
