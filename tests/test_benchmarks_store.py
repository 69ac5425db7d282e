"""The store's benchmark: every reader it compares brings the same bytes, in this process, in a worker and in the ring."""

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from pathlib import Path
import numpy as np
from bench_store import check
from cache.children import Child
from cache.ring import Ring
from store_contenders import Contenders, GatherInto, serve
from store_corpus import BATCH, NAMES, Corpus

corpus = Corpus(Path(sys.argv[1]), BATCH + 2)
contenders = Contenders(corpus)
check(corpus, contenders)
batch = corpus.draw(np.random.default_rng(1))
with Ring(GatherInto(corpus), [batch], contenders.out.nbytes, 2) as ring:
    size, slot = next(ring)
    contenders.out.fill(0)
    contenders.reads["preadv"](batch)
    assert size == corpus.bytes_of([batch]) and (slot == contenders.out.reshape(-1).view(np.uint8)).all()
worker = Child(serve, (corpus,), [], "worker")
assert worker.recv() == "up"
for name in contenders.reads:
    worker.send((name, [batch], True))
    assert [worker.recv(), worker.recv()] == ["done", "ready"]
print(*contenders.reads, sep=", ")
"""


@pytest.mark.slow
def test_all_that_are_compared_bring_the_same_bytes(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", CODE, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1] / "benchmarks",
    )
    assert done.returncode == 0, done.stderr
    for name in ("preadv", "memmap", "gather", "zarr-python", "zarrs", "tensorstore", "h5py"):
        assert name in done.stdout.split(", ")
