"""Workers in real processes, a corpus of eight shards, and a folder of what is to happen to a worker at which shard."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import dask
import torch
from distributed import Client
from distributed.utils import get_mp_context

from cache.journal import Journal
from cache.receipts import open_receipt
from pipeline.extract import extract
from pipeline.extraction.cluster import extract_on, order_of
from pipeline.extraction.crew import Crew, Limits
from pipeline.extraction.executors import THREADS, local_workers
from pipeline.extraction.job import plan_job
from pipeline.extraction.settings import Calibration, ExtractParams, Fail, Keep
from pipeline.models import open_models
from pipeline.student.checkpoint import save_student
from pipeline.student.encoder import Encoder, initialise
from tests.conftest import TinyCorpus, make_tiny_corpus
from tests.student_fixtures import TINY, changed

ROOT = Path(__file__).parent.parent
PRELOAD = ROOT / "tests" / "cluster_preload.py"
# What a worker imports, once for all of them: a forked one is there in a fraction of a second.
WARM = ["distributed", "distributed.nanny", "torch", "torchaudio", "pipeline.extraction.task", "pipeline.logmel"]
PATIENCE_SEC = 240.0  # for what happens in a second on a machine with nothing else to do

PARAMS = ExtractParams(
    version=1,
    codec="float16",
    chunk_frames=16,
    shard_frames=112,
    batch_seconds=2.0,
    long=Fail(kind="fail", max_sec=60.0),
    calibration=Calibration(seconds=60, seed=0),
)
ALL = Keep(layers="all", select="all")
SHAPE = changed(TINY, heads=(3, 3), ffn=(40, 40))


class Hooks:
    """What happens to workers, and what they have done."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def at(self, shard: int, what: str, once: bool = False, text: object = "") -> None:
        (self.folder / f"{shard}.{what}{'.once' if once else ''}").write_text(str(text))

    def made(self) -> list[int]:
        """Shards that were begun, in order."""
        return [shard for shard, _ in self._log()]

    def pids(self) -> set[int]:
        """Processes that began them."""
        return {pid for _, pid in self._log()}

    def _log(self) -> list[tuple[int, int]]:
        log = self.folder / "made"
        lines = log.read_text().splitlines() if log.exists() else []
        return [(int(shard), int(pid)) for shard, pid in map(str.split, lines)]

    def clear(self) -> None:
        for file in self.folder.iterdir():
            file.unlink()


class Cluster(NamedTuple):
    client: Client
    hooks: Hooks


@contextlib.contextmanager
def dask_settings(folder: Path) -> Iterator[Hooks]:
    """Dask as a person may set it up: a preload script, a folder for scratch; workers forked off a warm process."""
    hooks = Hooks(folder / "hooks")
    hooks.folder.mkdir()
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    told = {"DECANT_TEST_HOOKS": str(hooks.folder), "PYTHONPATH": path}
    settings = {
        "distributed.worker.multiprocessing-method": "forkserver",
        "distributed.worker.preload": [str(PRELOAD)],
        "distributed.nanny.environ": told,  # a forked one has the environment of the test that came first
        "distributed.comm.timeouts.connect": "10s",
        "temporary-directory": str(folder),
    }
    with mock.patch.dict(os.environ, told), dask.config.set(settings):
        get_mp_context().set_forkserver_preload(WARM)
        multiprocessing.forkserver.ensure_running()
        yield hooks


@contextlib.contextmanager
def two_workers(folder: Path) -> Iterator[Cluster]:
    with dask_settings(folder) as hooks, local_workers(2, "cpu", 1) as client:
        yield Cluster(client, hooks)


def settle(dask_worker: Any) -> None:
    """In a worker: wait until its threads have ended what a driver that failed had given them."""
    barrier = threading.Barrier(THREADS)
    list(dask_worker.executors["default"].map(lambda _: barrier.wait(PATIENCE_SEC), range(THREADS)))


def make_corpus(root: Path) -> TinyCorpus:
    """Sixteen utterances, two a shard of 112 frames."""
    return make_tiny_corpus(root, [14_000 + 320 * (n % 5) for n in range(16)])


def make_logmel(root: Path) -> Path:
    (root / "logmel.json").write_text('{"model": "log-mel", "num_mels": 20, "floor": 1e-6}')
    return root / "logmel.json"


def make_student(root: Path) -> Path:
    encoder = Encoder(SHAPE)
    initialise(encoder, torch.Generator().manual_seed(0))
    (root / "student").mkdir()
    save_student(root / "student", encoder, {})
    return root / "student"


def in_this_process(corpus: TinyCorpus, model: Path, params: ExtractParams, keep: Keep = ALL) -> dict[str, Any]:
    upstream = open_models([model], "cpu")
    return extract(upstream, corpus.manifest, corpus.waves, params, keep, "cpu", lambda *_, **__: None, writers=0)


class Driver:
    """A run on workers: `receipt = driver()`; what it said and ticked is kept."""

    def __init__(
        self,
        client: Client,
        corpus: TinyCorpus,
        model: Path,
        params: ExtractParams = PARAMS,
        keep: Keep = ALL,
        attempts: int = 3,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.job = plan_job(open_models([model], "cpu"), corpus.manifest, params, keep, "cpu")
        self.order = order_of(self.job, [model], corpus.manifest_path, corpus.waves_path, keep)
        self.said: list[str] = []
        self.ticks: list[tuple[float, bool]] = []
        self.crew = Crew(client, Limits(1000.0, attempts), self.said.append, clock)

    def __call__(self) -> dict[str, Any]:
        return extract_on(self.crew, self.order, self.job, self._tick)

    def _tick(self, seconds: float, found: bool = False) -> None:
        self.ticks.append((seconds, found))

    @property
    def committed(self) -> set[int]:
        return {shard for _, shard in Journal(self.job.directory).rows}


def files(receipt: dict[str, Any]) -> dict[str, bytes]:
    """All bytes of a store but the order of its journal."""
    place = open_receipt(receipt, verify=True).place
    assert isinstance(place, Path)
    found = {str(f.relative_to(place)): f.read_bytes() for f in sorted(place.rglob("*")) if f.is_file()}
    found["journal.jsonl"] = b"\n".join(sorted(found["journal.jsonl"].splitlines()))
    return found


def until(true: Callable[[], object], what: str) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + PATIENCE_SEC
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
