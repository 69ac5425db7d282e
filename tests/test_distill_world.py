"""One training by two processes: torchrun on a CPU, whole, killed, stopped and poisoned."""

import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from cache.publish import write_json
from pipeline.layers.choose import choose_targets
from pipeline.layers.ensembles import SingleTeacher
from pipeline.layers.targets import Adopted, targets_json
from tests.distill_fixtures import make_world, write_params

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]  # each start of a process imports torch

FILES = ["curves.csv", "heads.safetensors", "metrics.json", "shape.json", "weights.safetensors"]
TRAIN = {"steps": 12, "checkpoint_every": 2, "validate_every": 5}

HAPPENS = """
import os, signal, sys, time
from pipeline.distill.batches import BatchReader
from pipeline.distill.learner import Learner
from stages.__main__ import main
what, rank, step = sys.argv[1], sys.argv[2], int(sys.argv[3])
del sys.argv[1:4]
update, batch = Learner.update, BatchReader._batch
def happening(self, batches, frames, number):
    if number == step and os.environ["RANK"] == rank and what != "poison":
        if what == "rank":
            os.kill(os.getpid(), signal.SIGKILL)
        handler = signal.getsignal(signal.SIGTERM)
        os.kill(os.getppid(), signal.SIGKILL if what == "launcher" else signal.SIGTERM)
        for _ in range(6000):  # until the signal has come that this brings about, which restores the handler
            if signal.getsignal(signal.SIGTERM) is not handler:
                break
            time.sleep(0.01)
    return update(self, batches, frames, number)
def poisoned(self, *args):
    read = batch(self, *args)
    if what == "poison" and "utt-07" in read.ids:
        read.targets[0][read.ids.index("utt-07"), 0, 0, 0] = float("nan")
    return read
Learner.update, BatchReader._batch = happening, poisoned
main()
"""
"""`decant` in which one process is killed, or kills or stops its launcher, before an update; or a target is no number."""


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    world = make_world(tmp_path)
    init = Adopted(kind="adopted", teacher="hubert", final_norm=False)
    ensemble = SingleTeacher(kind="single", teacher="hubert", layers=(3, 1), normalise=None)
    targets = choose_targets(ensemble, tmp_path / "receipts", init, tmp_path / "init")
    write_json(tmp_path / "targets.json", targets_json(targets))
    (tmp_path / "happens.py").write_text(HAPPENS)
    write_params(world, train=TRAIN)
    return world


def start(world, command):
    """A process; its two streams end when all processes that it started have ended."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=world.environment(), text=True, **pipes)


def two(world, *happens, out="models/distil"):
    """`decant distill` by two processes under torchrun; gives its exit code and its two streams."""
    own = [str(world.root / "happens.py"), *happens] if happens else ["-m", "stages"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = start(world, [*launch, *own, *arguments(world, out)])
    stdout, stderr = process.communicate(timeout=240)
    return process.returncode, stdout, stderr


def arguments(world, out):
    given = world.command()[3:]
    given[given.index("--out") + 1] = str(world.root / out)
    return given


def products(world, out="models/distil"):
    folder = world.root / out
    assert sorted(p.name for p in folder.iterdir()) == FILES
    return {name: (folder / name).read_bytes() for name in FILES}


def states(world):
    folder = world.root / "models/.distil.training.partial"
    return sorted(int(p.stem.removeprefix("state-")) for p in folder.glob("state-*.json"))


def test_two_processes_make_the_updates_of_one_that_accumulates_two_batches(world):
    code, stdout, stderr = two(world, out="models/two")
    assert code == 0, stderr
    assert stdout.count("parameters after 12 steps") == 1
    write_params(world, train={**TRAIN, "accumulate": 2})
    process = start(world, [*world.command()[:3], *arguments(world, "models/one")])
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    for file in ("weights.safetensors", "heads.safetensors"):
        one, both = load_file(world.root / "models/one" / file), load_file(world.root / "models/two" / file)
        for name, tensor in one.items():
            torch.testing.assert_close(both[name], tensor, rtol=0, atol=1e-6)


def test_a_training_of_two_goes_on_after_the_death_of_one_and_of_the_launcher_and_after_sigterm(world):
    code, _, stderr = two(world, out="models/whole")
    assert code == 0, stderr

    code, _, stderr = two(world, "rank", "1", "4")
    assert code == 1
    assert stderr.count("another process of this training has gone or cannot be reached") == 1
    assert states(world) == [2]

    code, stdout, _ = two(world, "launcher", "0", "6")  # returns when no process is left that it started
    assert code == -signal.SIGKILL
    assert stdout.count("going on after step 2 of 12") == 1
    assert max(states(world)) == 6

    code, _, stderr = two(world, "term", "1", "9")
    assert code != 0
    assert stderr.count("with its state saved; the same command goes on") == 1
    assert max(states(world)) == 9
    assert not (world.root / "models/distil").exists()

    code, stdout, stderr = two(world)
    assert code == 0, stderr
    assert stdout.count("going on after step 9 of 12") == 1
    assert products(world) == products(world, "models/whole")


def test_an_error_of_one_process_ends_all_and_is_told_once(world):
    code, _, stderr = two(world, "poison", "-", "0")
    assert code == 1
    assert stderr.count("decant distill:") == 1
    assert stderr.count("the targets of utt-07 are not finite") == 1
    assert len(list((world.root / "models/.distil.training.partial").glob("not-finite-*"))) == 1

    write_params(world, train={"steps": -1})  # an error that both have
    code, _, stderr = two(world)
    assert code == 1
    assert stderr.count("decant distill:") == 1
