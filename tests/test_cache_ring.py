"""The ring of reader processes: order, back pressure, what stays valid, every way to end, and nothing left behind."""

import gc
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from cache.errors import ResourceError, StoreError
from cache.receipts import open_receipt
from cache.ring import Ring
from cache.shared import available_bytes, make_shared
from tests.cache_fixtures import LAYERS, damage, with_receipt
from tests.ring_fills import Counting, Gathering, Noting, OddError, SlowToStart, Stumbling
from tests.test_cache_process import is_running

SLOT = 5_000 * 8  # no multiple of a page


@pytest.fixture(autouse=True)
def nothing_is_left_behind():
    """In /dev/shm, among the open files, among the children: nothing that was not there when the test began.

    Other tests may have left a child (the resource tracker of `multiprocessing`) and run beside this one.
    """

    def there():
        gc.collect()
        shm = os.listdir("/dev/shm") if os.path.isdir("/dev/shm") else []
        return len(os.listdir("/proc/self/fd")), {n for n in shm if n.startswith("decant")} | children()

    files, things = there()
    yield
    files_left, things_left = there()
    assert files_left <= files
    assert things_left <= things


def children():
    """Process ids of this process's children, running or dead."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        if parent == os.getpid():
            found.add(int(folder.name))
    return found


def ends(pids):
    """Whether they end at all: what they would do otherwise takes ten minutes."""
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    return not any(map(is_running, pids))


@pytest.mark.parametrize(("slots", "workers", "hold"), [(2, 1, 1), (3, 2, 1), (4, 2, 2), (7, 3, 3)])
def test_items_come_in_order_and_held_slots_stay_as_they_are(slots, workers, hold):
    kept = []
    pids = set()
    for (number, pid), slot in Ring(Counting(), range(40), SLOT, slots, workers, hold):
        assert slot.nbytes == SLOT
        kept.append((number, slot))
        pids.add(pid)
        time.sleep(0.002)  # so that a worker that may go on does
        for old, data in kept[-hold:]:
            assert (data.view(np.int64) == old).all()
    assert [number for number, _ in kept] == list(range(40))
    assert len(pids) == workers
    assert os.getpid() not in pids
    assert len({slot.ctypes.data for _, slot in kept}) == slots  # the same memory again and again
    assert all((data.view(np.int64) == old).all() for old, data in kept[-hold:])  # after its end too


def test_the_first_slot_that_is_not_held_is_the_first_to_be_filled_again():
    with Ring(Counting(), range(10), SLOT, slots=2, workers=1, hold=1) as ring:
        (_, first), (_, second) = next(ring), next(ring)
        deadline = time.monotonic() + 60
        while first.view(np.int64)[-1] != 2:
            assert time.monotonic() < deadline
        assert (second.view(np.int64) == 1).all()


def test_workers_run_ahead_by_the_slots_while_the_caller_is_busy_and_no_further(tmp_path):
    taken = []

    def items():
        for number in range(1_000_000):  # taken one by one: a plan may be endless
            taken.append(number)
            yield number

    notes = tmp_path / "notes"
    with Ring(Noting(str(notes)), items(), SLOT, slots=5, workers=2) as ring:
        for _ in range(3):
            next(ring)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(notes.read_text().split()) < 7:
            sum(range(1_000))  # pure Python, never asking for the next batch
        time.sleep(0.3)
        # 0 to 2 were given out, 2 is held: its slot waits, the four others are full
        assert sorted(map(int, notes.read_text().split())) == list(range(7)) == taken


def test_a_caller_can_see_whether_it_would_have_to_wait():
    with Ring(SlowToStart(), range(3), SLOT, slots=3) as ring:
        assert not ring.ready()
        for _ in range(3):
            while not ring.ready():
                time.sleep(0.01)
            start = time.monotonic()
            next(ring)
            assert time.monotonic() - start < 0.5
        assert ring.ready()  # to say that there is no more
        assert list(ring) == []
    assert ring.ready()


def test_a_batch_is_the_stores_and_a_damaged_chunk_is_the_same_error_as_in_this_process(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    receipt = tmp_path / "receipt.json"
    with_receipt(receipt)
    store = open_receipt(receipt, verify=True)
    rng = np.random.default_rng(0)
    batches = [rng.permutation(len(store.rows))[:3].tolist() for _ in range(20)]
    store.read(LAYERS[0], 0)  # its files are open here already
    with Ring(Gathering(store, list(LAYERS)), batches, 10**6, slots=4, workers=2) as ring:
        for batch, ((shape, counts), slot) in zip(batches, ring, strict=True):
            want, want_counts = store.read_batch(batch, list(LAYERS))
            np.testing.assert_array_equal(slot[: want.nbytes].view(np.float16).reshape(shape), want)
            np.testing.assert_array_equal(counts, want_counts)
    damage("payload", store.directory)
    with pytest.raises(StoreError) as here:
        open_receipt(receipt, verify=True).read_batch([3], list(LAYERS))
    with (
        Ring(Gathering(open_receipt(receipt, verify=True), list(LAYERS)), [[3]], 10**6, 2) as ring,
        pytest.raises(StoreError, match=f"^{re.escape(str(here.value))}$"),
    ):
        next(ring)


def test_a_users_error_arrives_in_its_turn_with_its_class_and_message():
    got = []
    with pytest.raises(OddError, match=r"^layer-00/c/0/0: chunk 3 is damaged \(its checksum differs\)$"):
        for (number, _), _slot in Ring(Stumbling("store error"), range(20), SLOT, 6, 2):
            got.append(number)
    assert got == [0, 1, 2, 3, 4]  # what was before it is good


def test_a_defect_carries_the_traceback_of_its_process():
    with pytest.raises(RuntimeError, match="^in a reader process: ZeroDivisionError: division by zero$") as caught:
        list(Ring(Stumbling("defect"), range(20), SLOT, 4, 2))
    assert "ring_fills.py" in str(caught.value.__cause__)
    assert "return a / b" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("how", "kind", "message"),
    [
        ("SIGKILL", ResourceError, r"was killed by SIGKILL; .* memory runs out: use fewer or smaller buffers$"),
        ("SIGSEGV", ResourceError, r"a reader process \(process \d+\) was killed by SIGSEGV$"),
        ("quits", RuntimeError, r"ended with exit code 3 before its work was done$"),
        ("large answer", RuntimeError, r"an answer of \d+ bytes is larger than \d+; put arrays into the slot$"),
    ],
)
def test_a_worker_that_dies_is_named(how, kind, message):
    with pytest.raises(kind, match=message):
        for (number, _), _slot in Ring(Stumbling(how), range(20), SLOT, 4, 2):
            assert number < 5


def test_what_a_terminal_or_a_scheduler_sends_to_all_processes_is_the_parents_to_handle():
    with Ring(Counting(), range(30), SLOT, 3, 2) as ring:
        next(ring), next(ring)  # both are up
        for pid in ring.pids:
            for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
                os.kill(pid, signal.Signals[name])
        assert [number for (number, _), _ in ring] == list(range(2, 30))


def test_a_slow_start_is_no_error():
    start = time.monotonic()
    assert [number for (number, _), _ in Ring(SlowToStart(), range(5), SLOT, 3, 2)] == list(range(5))
    assert time.monotonic() - start > 2


def test_a_fill_that_no_other_process_can_import_is_an_error_and_no_hang():
    code = "from cache.ring import Ring\ndef fill(item, slot): return item\nnext(Ring(fill, [1], 4096, 2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1
    assert (
        "RuntimeError: in a reader process: AttributeError: Can't get attribute 'fill' on <module '__main__'"
        in done.stderr
    )


class Wanted(Exception):
    pass


@pytest.mark.parametrize("how", ["break", "error", "close", "forgotten", "plan", "never asked"])
def test_however_it_ends_early_the_workers_end_at_once_though_they_are_busy(how):
    def items():
        yield from range(8)
        if how == "plan":
            raise Wanted
        yield from range(8, 100)

    ring = Ring(Stumbling("hangs"), items(), SLOT, 4, 2)
    pids = ring.pids
    assert all(map(is_running, pids))
    slot = None
    if how != "never asked":
        for _ in range(4):
            _, slot = next(ring)
        time.sleep(0.05)  # item 5 hangs now
    match how:
        case "break":
            with ring:
                for _ in ring:
                    break
        case "error":
            with pytest.raises(Wanted), ring:
                raise Wanted
        case "close":
            ring.close()
            ring.close()
            assert list(ring) == []
        case "forgotten" | "never asked":
            del ring
        case "plan":
            with pytest.raises(Wanted):
                list(ring)
    assert ends(pids)
    if slot is not None:
        assert (slot.view(np.int64) == slot.view(np.int64)[0]).all()  # a view outlives its ring


def test_a_forked_copy_of_the_caller_does_not_end_the_callers_workers():
    ring = Ring(Counting(), range(20), SLOT, 3, 2)
    next(ring)
    pid = os.fork()
    if pid == 0:
        ring.close()
        os._exit(0)
    os.waitpid(pid, 0)
    assert [number for (number, _), _ in ring] == list(range(1, 20))


PARENT = """
import os, sys, time
from cache.ring import Ring
from tests.ring_fills import Counting, Stumbling
mode, parent = sys.argv[1], os.getppid()
ring = Ring(Stumbling("hangs") if mode == "busy" else Counting(), range(10**9), 2**20, 4, 2)
next(ring), next(ring)  # both are up
if mode == "sibling" and os.fork() == 0:
    time.sleep(60)  # holds copies of the pipes' ends
if mode == "busy":
    next(ring), next(ring)
print(*ring.pids, flush=True)
if mode == "exit":
    sys.exit(0)
while os.getppid() == parent:
    sum(range(100))
"""


@pytest.mark.parametrize("mode", ["idle", "busy", "sibling", "exit"])
def test_workers_and_their_memory_go_with_a_parent_that_is_killed(mode):
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, mode],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    )
    try:
        pids = list(map(int, parent.stdout.readline().split()))
        if mode != "exit":
            for pid in pids:
                assert is_running(pid)
                # no name that could stay
                assert "memfd:decant (deleted)" in Path(f"/proc/{pid}/maps").read_text()
            parent.kill()
        parent.wait(timeout=60)
        assert ends(pids)
    finally:
        os.killpg(parent.pid, signal.SIGKILL) if mode == "sibling" else parent.kill()
        parent.wait()
        parent.stdout.close()


def test_a_machine_with_too_little_memory_is_named_before_anything_starts(tmp_path, monkeypatch):
    with pytest.raises(
        ResourceError,
        match=r"^reading ahead \(4 slots of 1000000000.0 MB\) needs 4000000.00 GB of memory and "
        r"\d+\.\d\d GB are available; use fewer slots or smaller batches$",
    ):
        Ring(Counting(), range(3), 10**15, 4)
    for part in ("proc", "sys/fs/cgroup"):
        (tmp_path / part).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text("MemTotal:  99 kB\nMemFree:  3 kB\nMemAvailable:     50 kB\n")
    assert available_bytes(tmp_path) == 51_200
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("max\n")
    assert available_bytes(tmp_path) == 51_200
    (tmp_path / "sys/fs/cgroup/memory.max").write_text("4096\n")  # a container's limit
    assert available_bytes(tmp_path) == 4096


def test_memory_that_the_kernel_refuses_is_named():
    # in a process of its own: the limit is for all files, memory without a name among them
    code = (
        "import resource; from cache.shared import make_shared; from cache.errors import ResourceError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))\n"
        "try: make_shared(2 * 10**6, 'a test', 'use less')\n"
        "except ResourceError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.stdout == "a test needs 0.00 GB of shared memory: File too large; use less\n"


def test_a_dev_shm_of_64_mib_does_not_matter(tmp_path):
    code = (
        "from cache.ring import Ring\nfrom tests.ring_fills import Counting\n"
        "print(sum(n for (n, _), _ in Ring(Counting(), range(5), 2**20, 4, 2)))"
    )
    shell = ["sh", "-ec", 'mount -t tmpfs -o size=64k none /dev/shm && exec "$@"', "sh", sys.executable, "-c", code]
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tmp_path)]).returncode
    ):
        pytest.skip("no small file system may be mounted here")
    done = subprocess.run(["unshare", "-rm", *shell], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.stdout, done.returncode) == ("10\n", 0), done.stderr


def test_without_memfd_a_file_without_a_name_does_the_same(monkeypatch):
    monkeypatch.delattr(os, "memfd_create", raising=False)
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    assert [number for (number, _), _ in Ring(Counting(), range(9), SLOT, 3, 2)] == list(range(9))
    handle = make_shared(10_000, "a test", "use less")
    assert os.fstat(handle).st_nlink == 0
    os.close(handle)


def test_a_worker_imports_what_its_fill_needs_and_not_the_program():
    code = (
        "import json, pathlib, sys\n"
        "import stages.__main__, h5py\n"
        "from cache.ring import Ring\n"
        "from tests.ring_fills import Counting\n"
        "ring = Ring(Counting(), range(2), 4096, 2); next(ring)\n"
        "print(pathlib.Path(f'/proc/{ring.pids[0]}/maps').read_text())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    assert "numpy" in done.stdout
    assert "h5py" not in done.stdout


def test_the_memory_is_one_block_that_a_caller_may_pin():
    with Ring(Counting(), range(9), SLOT, 3, 1) as ring:
        address, size = ring.memory
        assert address % 4096 == size % 4096 == 0
        for _, slot in ring:
            assert address <= slot.ctypes.data <= slot.ctypes.data + slot.nbytes <= address + size


def test_a_fill_that_cannot_be_sent_starts_nothing():
    with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
        Ring(lambda item, slot: item, range(3), SLOT, 3, 2)


def test_too_few_slots_are_refused():
    with pytest.raises(ValueError, match="3 slots of 40000 bytes do not suffice for 2 workers and hold=2"):
        Ring(Counting(), range(3), SLOT, 3, 2, 2)
