"""Writer processes: the same store as from one process; killed ones, dead parents and full disks lose nothing committed."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import xxhash

from cache.errors import ResourceError
from cache.journal import Journal
from cache.publish import write_json
from cache.receipts import make_receipt, open_receipt, store_key, store_path
from cache.writer import open_writer
from cache.writers import ShardPool
from tests.test_cache_process import is_running

LAYERS = ("layer-00", "layer-04")
WIDTH = 512
ROWS = [300, 900, 1_000, 24, 700, 333, 640, 1_023, 5, 900, 120, 1_024]  # nine shards of at most 1 MiB
FINGERPRINT = {"model": "writers"}
HEADER = {
    "kind": "features",
    "key": store_key("features", FINGERPRINT),
    "fingerprint": FINGERPRINT,
    "codec": "float16",
    "width": WIDTH,
    "chunk_rows": 16,
    "shard_rows": 1_024,
}


def expected(name: str, utterance: int) -> np.ndarray:
    """(T, D) numbers that tell layer, utterance, frame and channel apart."""
    t, c = np.mgrid[: ROWS[utterance], :WIDTH]
    return ((int(name[-2:]) * 331 + utterance * 97 + t * 7 + c) % 2048).astype(np.float16)


DATA = {name: [expected(name, u) for u in range(len(ROWS))] for name in LAYERS}


def opened(place: Path):
    ids = [f"u{u}" for u in range(len(ROWS))]
    return open_writer(place, HEADER, ids, np.array(ROWS, dtype=np.int64), LAYERS)


def write_pooled(
    place: Path, workers: int = 2, shard_buffers: int = 2, begun=lambda pool: None, commits: int = 1
) -> list:
    """Write what is missing, as an extraction does: all arrays of a shard side by side; what was made, in order.

    `begun` is called when as many files as `commits` are in the journal.
    """
    made = []

    def note(*at) -> None:
        made.append(at)
        if len(made) == commits:
            begun(pool)

    with opened(place) as writer, ShardPool(writer, workers, shard_buffers, note) as pool:
        for shard, names in writer.missing().items():
            buffers = {name: pool.buffer(name, shard) for name in names}
            at = 0
            for u in writer.plan.utterances(shard):
                for name, rows in buffers.items():
                    rows[at : at + ROWS[u]] = DATA[name][u]
                pool.record()
                at += ROWS[u]
            for name in names:
                pool.commit(name, shard)
    return made


def committed(place: Path) -> dict[tuple[str, int], tuple[int, int, str]]:
    """Every committed shard that lies there as it was committed: its bytes, time of writing and hash."""
    found = {}
    for (name, shard), (size, digest) in Journal(place).rows.items():
        path = place / name / "c" / str(shard) / "0"
        data = path.read_bytes()
        assert (len(data), xxhash.xxh3_128_hexdigest(data)) == (size, digest), path
        found[name, shard] = (size, path.stat().st_mtime_ns, digest)
    return found


def check_whole(place: Path, receipt) -> None:
    assert make_receipt(place, LAYERS) == receipt
    store = open_receipt(receipt, verify=True)
    for name in LAYERS:
        for u in range(len(ROWS)):
            np.testing.assert_array_equal(store.read(name, u), DATA[name][u])
    assert not list(place.rglob("*.partial"))


@pytest.fixture
def stores():
    """A folder in memory where there is one: what a kill can lose is the same, and flushing takes no time."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture
def receipt(stores, monkeypatch):
    """Of a store that one process wrote through `StoreWriter.write`; DECANT_STORE then points to an empty place."""
    monkeypatch.setenv("DECANT_STORE", str(stores / "calm"))
    place = store_path("features", HEADER["key"])
    with opened(place) as writer:
        for shard, names in writer.missing().items():
            for name in names:
                writer.write(name, shard, np.concatenate([DATA[name][u] for u in writer.plan.utterances(shard)]))
    made = make_receipt(place, LAYERS)
    check_whole(place, made)
    monkeypatch.setenv("DECANT_STORE", str(stores / "store"))
    return made


@pytest.fixture
def place(receipt) -> Path:
    return store_path("features", HEADER["key"])


ALL = 18  # shards of arrays


@pytest.mark.parametrize(("workers", "shard_buffers"), [(0, 1), (1, 1), (2, 2), (3, 9)])
def test_any_number_of_processes_makes_the_store_that_one_makes(workers, shard_buffers, receipt, place):
    made = write_pooled(place, workers, shard_buffers)
    assert len(made) == len(set(made)) == ALL == len(committed(place))
    check_whole(place, receipt)
    assert write_pooled(place, workers) == []  # all is there
    shutil.rmtree(place / "layer-04" / "c" / "3")
    assert write_pooled(place, workers) == [("layer-04", 3)]
    check_whole(place, receipt)


def test_the_files_are_written_by_the_processes_while_rows_are_made(receipt, place, monkeypatch):
    monkeypatch.setattr("cache.writers.write_shard", lambda *_: pytest.fail("written in the calling process"))
    with opened(place) as writer, ShardPool(writer, 1, 1) as pool:
        pool.buffer("layer-00", 0)[:] = np.concatenate([DATA["layer-00"][u] for u in writer.plan.utterances(0)])
        pool.commit("layer-00", 0)
        deadline = time.monotonic() + 60
        while not (place / "layer-00/c/0/0").exists():
            assert time.monotonic() < deadline
        assert committed(place) == {}  # only this process writes the journal
        while not committed(place):
            pool.record()
            assert time.monotonic() < deadline


def test_a_buffer_waits_for_a_slot_and_memory_is_what_was_asked_for(receipt, place):
    with opened(place) as writer, ShardPool(writer, 1, 1) as pool:
        addresses = set()
        for shard in range(9):
            for name in LAYERS:
                rows = pool.buffer(name, shard)
                assert rows.shape == (writer.plan.used_rows(shard), WIDTH)
                rows[:] = np.concatenate([DATA[name][u] for u in writer.plan.utterances(shard)])
                addresses.add(rows.ctypes.data)
                pool.commit(name, shard)
                assert len(committed(place)) >= 2 * shard + LAYERS.index(name) - 1  # two slots: at most two unwritten
        assert len(addresses) <= 2
        with pytest.raises(AssertionError, match="every buffer is with the caller"):
            for shard in range(3):
                pool.buffer("layer-00", shard)
    check_whole(place, receipt)


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
def test_of_20_writer_processes_killed_none_costs_a_committed_shard(receipt, place):
    kills, before = 0, {}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        delay, victim = float(rng.uniform(0, 0.02)), int(rng.integers(2))
        pids, timers = [], []

        def begun(pool, seed=seed, delay=delay, victim=victim, pids=pids, timers=timers):
            pids.extend(pool.pids)
            if seed % 2:  # it cannot be through before it is killed, on a machine of any speed
                os.kill(pids[victim], signal.SIGSTOP)
            timers.append(threading.Timer(delay, kill, (pids[victim],)))
            timers[0].start()

        told = ""
        try:
            write_pooled(place, 2, 1, begun)
        except ResourceError as error:
            told, kills = str(error), kills + 1
        for timer in timers:
            timer.cancel()
            timer.join()
        assert not told or told.startswith(f"a writer process (process {pids[victim]}) was killed by SIGKILL")
        after = committed(place)
        assert {k: after.get(k) for k in before} == before  # neither lost nor made again
        assert not any(map(is_running, pids))
        before = after
        if len(after) >= ALL - 2:
            write_pooled(place, 0)
            check_whole(place, receipt)
            shutil.rmtree(place)
            before = {}
        if kills == 20:
            break
    assert kills == 20
    left = {(name, shard) for name in LAYERS for shard in range(9)} - set(before)
    assert set(write_pooled(place)) == left  # exactly the missing ones
    check_whole(place, receipt)


def children_of(pid: int) -> list[int]:
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except FileNotFoundError:
        return []


@pytest.mark.slow
def test_of_20_parents_killed_none_leaves_a_writer_behind_or_costs_a_committed_shard(receipt, place):
    before = {}
    for seed in range(20):
        rng = np.random.default_rng(seed)
        commits, waits = 1 + seed // 2 % 2, seed % 2 == 0  # half of them go on until they are killed
        out, told = os.pipe()
        pid = os.fork()
        if pid == 0:

            def begun(pool, told=told, waits=waits):
                os.write(told, b"begun")
                if waits:
                    signal.alarm(300)  # not for ever, should the test itself be killed
                    signal.pause()

            try:
                write_pooled(place, 2, 1, begun, commits)
            finally:
                os._exit(0)
        os.close(told)
        os.read(out, 5)  # or its end
        os.close(out)
        time.sleep(float(rng.uniform(0, 0.03)))
        writers = children_of(pid)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with opened(place):  # waits until the orphans have let go of the lock
            assert not any(map(is_running, writers))
            after = committed(place)
        assert {k: after.get(k) for k in before} == before
        assert len(after) == len(before) + commits if waits else len(after) >= len(before) + commits
        before = after
        if len(after) >= ALL - 2:
            write_pooled(place, 0)
            check_whole(place, receipt)
            shutil.rmtree(place)
            before = {}
    left = {(name, shard) for name in LAYERS for shard in range(9)} - set(before)
    assert set(write_pooled(place)) == left
    check_whole(place, receipt)


def test_an_orphan_keeps_the_store_locked_until_it_is_gone(receipt, place):
    out, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            with opened(place) as writer, ShardPool(writer, 1, 1) as pool:
                pool.buffer("layer-00", 0)[:] = 0
                pool.commit("layer-00", 0)
                while not (place / "layer-00/c/0/0").exists():
                    pass
                os.kill(pool.pids[0], signal.SIGSTOP)
                os.write(told, b"%d" % pool.pids[0])
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    os.close(told)
    orphan = int(os.read(out, 20))
    os.close(out)
    os.waitpid(pid, 0)
    os.kill(orphan, 0)  # it stands still
    start = time.monotonic()
    threading.Timer(0.5, os.kill, (orphan, signal.SIGCONT)).start()
    with opened(place) as writer:
        assert time.monotonic() - start > 0.4
        assert not is_running(orphan)
        assert ("layer-00", 0) not in writer.journal.rows  # its parent did not live to record it
    write_pooled(place)
    check_whole(place, receipt)


FILL_DISK = """
import os, sys
from pathlib import Path
from cache.errors import ResourceError
from cache.publish import read_json
from tests import test_cache_writers as writers

root, receipt = Path(sys.argv[1]), read_json(Path(sys.argv[2]))
os.environ["DECANT_STORE"] = str(root)
place = writers.store_path("features", writers.HEADER["key"])

def fill(pool):
    with open(root / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError as error:
            assert error.errno == 28, error

try:
    writers.write_pooled(place, 2, 1, fill)
    sys.exit("the disk was not full")
except ResourceError as error:
    print(error)
(root / "filler").unlink()
before = writers.committed(place)
assert 0 < len(before) < writers.ALL, before
writers.write_pooled(place, 2)
after = writers.committed(place)
assert {k: after[k] for k in before} == before
writers.check_whole(place, receipt)
"""


def test_a_full_disk_in_a_writer_process_is_the_named_error_of_one_process(receipt, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    own = ["unshare", "-rm"]
    if not shutil.which("unshare") or subprocess.run([*own, "mount", "-t", "tmpfs", "none", str(disk)]).returncode:
        pytest.skip("no small file system may be mounted here")
    write_json(tmp_path / "receipt.json", receipt)
    shell = 'mount -t tmpfs -o size=24m none "$1" && exec "$2" -c "$3" "$1" "$4"'
    command = [*own, "sh", "-ec", shell, "sh", str(disk), sys.executable, FILL_DISK, str(tmp_path / "receipt.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(
        r"\S+layer-0\d/c/\d/\S+: the disk is full \(0 MB free\); free some space and run the same command again\n",
        done.stdout,
    )


def test_an_error_of_the_caller_ends_the_processes_and_keeps_what_is_done(receipt, place):
    with pytest.raises(KeyError), opened(place) as writer, ShardPool(writer, 2, 2) as pool:
        pool.buffer("layer-00", 0)[:] = np.concatenate([DATA["layer-00"][u] for u in writer.plan.utterances(0)])
        pool.commit("layer-00", 0)
        pids = pool.pids
        while not any(worker.has_answer() for worker in pool._workers):
            pass
        raise KeyError
    assert not any(map(is_running, pids))
    assert set(committed(place)) == {("layer-00", 0)}
    assert ("layer-00", 0) not in write_pooled(place)
    check_whole(place, receipt)
