"""What a machine does to a writer: killed a hundred times, the disk full, no permission. Nothing committed is ever lost.

Writers are forked from this warm process, so that a run costs milliseconds.
"""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import xxhash

from cache.errors import ResourceError
from cache.journal import Journal
from cache.publish import write_json
from cache.receipts import make_receipt, open_receipt, store_key, store_path
from cache.writer import open_writer

LAYERS = ("layer-00", "layer-04")
ROWS = [3, 60, 128, 31, 90, 57, 64, 1, 127, 100, 5, 120]
WIDTH = 6
FINGERPRINT = {"model": "faults"}
HEADER = {
    "kind": "features",
    "key": store_key("features", FINGERPRINT),
    "fingerprint": FINGERPRINT,
    "codec": "float16",
    "width": WIDTH,
    "chunk_rows": 16,
    "shard_rows": 128,
}


def expected(name: str, utterance: int) -> np.ndarray:
    """(T, 6) whole numbers that tell layer, utterance, frame and channel apart."""
    t, c = np.mgrid[: ROWS[utterance], :WIDTH]
    return ((int(name[-2:]) * 331 + utterance * 97 + t * 7 + c) % 2048).astype(np.float16)


def write_store(place: Path, ready=lambda: None) -> None:
    ids = [f"u{u}" for u in range(len(ROWS))]
    with open_writer(place, HEADER, ids, np.array(ROWS, dtype=np.int64), LAYERS) as writer:
        ready()
        for shard, names in writer.missing().items():
            for name in names:
                writer.write(name, shard, np.concatenate([expected(name, u) for u in writer.plan.utterances(shard)]))


def forked(work) -> int:
    """Run `work` in a forked child, which always ends by `os._exit`: 0, 1, or 5 for a ResourceError, told on stderr."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        work()
        code = 0
    except ResourceError as error:
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # a test may have lowered it, and stderr is a file
        os.write(2, f"{error}\n".encode())
        code = 5
    finally:
        os._exit(code)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def committed(place: Path) -> dict[str, tuple[int, int, str]]:
    """Every committed shard that lies there as it was committed: its bytes, time of writing and hash."""
    found = {}
    for (name, shard), (size, digest) in Journal(place).rows.items():
        path = place / name / "c" / str(shard) / "0"
        data = path.read_bytes()
        assert (len(data), xxhash.xxh3_128_hexdigest(data)) == (size, digest), path
        found[f"{name}/{shard}"] = (size, path.stat().st_mtime_ns, digest)
    return found


def check_whole(place: Path, receipt) -> None:
    """The store is the one that was never disturbed, down to every number."""
    assert make_receipt(place, LAYERS) == receipt
    store = open_receipt(receipt, verify=True)
    for name in LAYERS:
        for u in range(len(ROWS)):
            np.testing.assert_array_equal(store.read(name, u), expected(name, u))
    assert not list(place.rglob("*.partial"))


@pytest.fixture
def stores():
    """A folder in memory where there is one: what a kill can lose is the same, and flushing takes no time."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="faults-", dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def receipt(stores, monkeypatch):
    """Of a store written without trouble; DECANT_STORE then points to an empty place for the disturbed ones."""
    monkeypatch.setenv("DECANT_STORE", str(stores / "calm"))
    place = store_path("features", HEADER["key"])
    write_store(place)
    made = make_receipt(place, LAYERS)
    check_whole(place, made)
    monkeypatch.setenv("DECANT_STORE", str(stores / "store"))
    return made


@pytest.fixture
def place(receipt) -> Path:
    return store_path("features", HEADER["key"])


def die_at(event: int, before: bool) -> None:
    """Kill this process by SIGKILL at its n-th call that changes what is on the disk."""
    left = [event]

    def deadly(real):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0 and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = real(*args, **kwargs)
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in ("fsync", "replace", "writev", "mkdir", "unlink", "truncate"):
        setattr(os, name, deadly(getattr(os, name)))


def die_after(commits: int, beat: float, fraction: float) -> tuple[int, float]:
    """Kill a writer by SIGKILL at a moment after its n-th commit, wherever it then is; gives its exit code and its beat.

    The writer tells of each commit, so that where it dies is spread over its work on a machine of any speed; one with
    fewer commits left is killed at its end. Its beat is the seconds that it takes for a commit.
    """
    told, telling = os.pipe()

    def work() -> None:
        real = Journal.append

        def append(self, *args):
            real(self, *args)
            os.write(telling, b".")

        Journal.append = append
        write_store(store_path("features", HEADER["key"]))
        os.write(telling, b"E")
        signal.alarm(300)  # not for ever, should the test itself be killed
        signal.pause()

    pid = forked(work)
    os.close(telling)
    start, heard = time.perf_counter(), b""
    while len(heard) < commits and (news := os.read(told, 1)) != b"":  # b"": it died of something else
        if news == b"E":
            break
        heard += news
    if commits:
        beat = (time.perf_counter() - start) / commits
    time.sleep(min(beat * fraction, 0.25))
    os.kill(pid, signal.SIGKILL)
    os.close(told)
    return wait(pid), beat


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["at a call", "at a moment"])
def test_of_100_writers_killed_none_loses_a_committed_shard_or_writes_a_wrong_number(kind, receipt, place):
    num_shards = len(LAYERS) * len(receipt["arrays"]["layer-00"]["shards"])
    kills = finished = 0
    before: dict[str, tuple[int, int, str]] = {}
    stages = set()  # how many shards were committed when a writer died
    beat = 0.0
    for seed in range(200):  # what is demanded below follows from the seeds, on a machine of any speed
        rng = np.random.default_rng(seed)
        event, early, promised, fraction = int(rng.integers(1, 70)), rng.integers(2) == 1, 0, rng.uniform()
        if kind == "at a call":
            code = wait(forked(lambda e=event, b=early: (die_at(e, b), write_store(place))))
        else:
            promised = event % 4
            code, beat = die_after(promised, beat, fraction)
        after = committed(place)  # every one still has its bytes
        assert {k: after.get(k) for k in before} == before  # neither lost nor made again
        assert len(after) >= min(len(before) + promised, num_shards)
        before = after
        assert code in ((0, -signal.SIGKILL) if kind == "at a call" else (-signal.SIGKILL,))
        kills += code != 0
        stages.add(len(after))
        if code == 0 or len(after) == num_shards:
            write_store(place)
            check_whole(place, receipt)
            shutil.rmtree(place)
            before, finished = {}, finished + 1
        if kills == 100:
            break
    write_store(place)
    check_whole(place, receipt)
    assert kills == 100
    assert finished >= 5
    if kind == "at a call":
        assert len(stages) > 5


@pytest.mark.parametrize("limit", ["a shard", "the journal"])
def test_a_limit_on_the_size_of_files_is_named_and_the_rerun_goes_on(limit, receipt, place, capfd):
    line = len((place.parents[2] / "calm" / "features" / HEADER["key"] / "journal.jsonl").read_bytes().splitlines()[0])
    sizes = [size for size, _ in receipt["arrays"]["layer-00"]["shards"]]
    assert sizes[0] < max(sizes)

    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def narrow() -> None:
        if limit == "a shard":
            resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 1, hard))
            return
        real = Journal.append  # only the journal is held back: its third line is torn in the middle

        def append(self, *args):
            if len(self.rows) == 2:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2 * line + 30, hard))
            real(self, *args)

        Journal.append = append

    assert wait(forked(lambda: write_store(place, narrow))) == 5
    told = capfd.readouterr().err
    assert ("journal.jsonl" if limit == "the journal" else "layer-0") in told
    assert "larger than this process or file system allows" in told
    assert told.count("\n") == 1
    before = committed(place)
    assert before
    if limit == "the journal":
        assert len(before) == 2
        assert not (place / "journal.jsonl").read_bytes().endswith(b"\n")
    write_store(place)
    after = committed(place)
    assert {k: after[k] for k in before} == before
    check_whole(place, receipt)


FILL_DISK = """
import os, sys
from pathlib import Path
from cache.errors import ResourceError
from cache.publish import read_json
from cache.journal import Journal
from cache.writer import StoreWriter
from tests import test_cache_faults as faults

root, what, receipt = Path(sys.argv[1]), sys.argv[2], read_json(Path(sys.argv[3]))
os.environ["DECANT_STORE"] = str(root)
place = faults.store_path("features", faults.HEADER["key"])
kind, committed = (Journal, 0) if what == "journal" else (StoreWriter, 3)  # the first line takes the journal's first page
method = "append" if what == "journal" else "write"
real = getattr(kind, method)

def late(self, *args):
    rows = self.rows if what == "journal" else self.journal.rows
    if len(rows) == committed:
        with open(root / "filler", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                assert error.errno == 28, error
    real(self, *args)

setattr(kind, method, late)
try:
    faults.write_store(place)
    sys.exit("the disk was not full")
except ResourceError as error:
    print(error)
setattr(kind, method, real)
before = faults.committed(place)
assert len(before) == committed, before
(root / "filler").unlink()
faults.write_store(place)
after = faults.committed(place)
assert {k: after[k] for k in before} == before
faults.check_whole(place, receipt)
"""
ON_SMALL_DISK = 'mount -t tmpfs -o size=600k none "$1" && exec "$2" -c "$3" "$1" "$4" "$5"'


def in_own_mounts(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["unshare", "-rm", *command], capture_output=True, text=True, cwd=Path(__file__).parents[1])


@pytest.mark.parametrize("what", ["shard", "journal"])
def test_a_full_disk_is_named_and_the_rerun_goes_on(what, receipt, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not shutil.which("unshare") or in_own_mounts("mount", "-t", "tmpfs", "none", str(disk)).returncode:
        pytest.skip("no small file system may be mounted here")
    write_json(tmp_path / "receipt.json", receipt)
    shell = [
        "sh",
        "-ec",
        ON_SMALL_DISK,
        "sh",
        str(disk),
        sys.executable,
        FILL_DISK,
        what,
        str(tmp_path / "receipt.json"),
    ]
    done = in_own_mounts(*shell)
    assert done.returncode == 0, done.stderr
    name = "journal.jsonl" if what == "journal" else r"layer-04/c/1/.*"
    assert re.search(
        rf"{name}.*: the disk is full \(0 MB free\); free some space and run the same command again", done.stdout
    )


def test_a_place_that_may_not_be_written_is_named_before_anything_is_written(receipt, capfd, monkeypatch):
    root = Path(tempfile.mkdtemp())  # not below tmp_path, which only its owner may enter
    try:
        root.chmod(0o555)
        monkeypatch.setenv("DECANT_STORE", str(root))

        def work() -> None:
            if os.geteuid() == 0:
                os.setuid(65_534)  # nobody: permissions do not hold for root
            write_store(store_path("features", HEADER["key"]))

        assert wait(forked(work)) == 5
        assert re.fullmatch(
            rf"{root}/\S+: Permission denied; make it writable or choose another place\n", capfd.readouterr().err
        )
        assert list(root.iterdir()) == []
    finally:
        root.chmod(0o755)
        shutil.rmtree(root)
