"""One fine-tuning by two processes: torchrun on a CPU makes the updates of one process that accumulates."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from cache.publish import read_json
from tests.finetune_fixtures import make_world, write_params

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # each start of a process imports torch

STOPS = """
import os, signal, sys, time
from pipeline.finetune.learner import Learner
from stages.__main__ import main
update = Learner.update
def stopping(self, batches, examples, number):
    if number == 3 and os.environ["RANK"] == "1":
        handler = signal.getsignal(signal.SIGTERM)
        os.kill(os.getppid(), signal.SIGTERM)
        for _ in range(6000):  # until the launcher has sent it on to this process, which restores the handler
            if signal.getsignal(signal.SIGTERM) is not handler:
                break
            time.sleep(0.01)
    return update(self, batches, examples, number)
Learner.update = stopping
main()
"""
"""`decant` of which the second process stops the launcher before the third update."""


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    world = make_world(tmp_path)
    (tmp_path / "stops.py").write_text(STOPS)
    return world


def run(world, launch, out):
    arguments = world.command()[3:]
    arguments[arguments.index("--out") + 1] = str(world.root / out)
    done = subprocess.run([*launch, *arguments], env=world.environment(), capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_two_processes_make_the_updates_of_one_and_go_on_after_sigterm(world):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    write_params(world, train={"publish": "last"})
    code, stdout, stderr = run(world, [*torchrun, "-m", "stages"], "models/two")
    assert code == 0, stderr
    assert stdout.count("on test") == 2  # one line a task: one process speaks
    code, _, stderr = run(world, [*torchrun, str(world.root / "stops.py")], "models/stopped")
    assert code != 0
    assert "with its state saved" in stderr
    code, stdout, stderr = run(world, [*torchrun, "-m", "stages"], "models/stopped")
    assert code == 0, stderr
    assert "going on after step 3 of 8" in stdout
    write_params(world, train={"publish": "last", "accumulate": 2})
    code, _, stderr = run(world, [sys.executable, "-m", "stages"], "models/one")
    assert code == 0, stderr
    for file in ("weights.safetensors", "heads.safetensors"):
        one, two, stopped = (load_file(world.root / "models" / name / file) for name in ("one", "two", "stopped"))
        for name, tensor in one.items():
            torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)
            assert torch.equal(stopped[name], two[name])
    tasks = {name: read_json(world.root / "models" / name / "metrics.json")["tasks"] for name in ("one", "two")}
    for task in ("kws", "sv"):
        assert tasks["one"][task]["mean"] == pytest.approx(tasks["two"][task]["mean"], abs=0.03)
