"""A fine-tuning goes on where it was stopped or killed, to the same bytes."""

import re
import signal
import subprocess
import sys

import pytest

from cache.errors import Interrupted
from tests.finetune_fixtures import make_world, products, stopping_after, tune, write_params


@pytest.fixture(scope="module")
def corpus(shared_root):
    """One corpus for all tests: each has an output of its own."""
    return make_world(shared_root)


@pytest.fixture
def world(corpus):
    write_params(corpus)
    return corpus


KILLED = """
import os, signal, sys
import pipeline.finetune.loop as module
from stages.finetune import app
save = module._save
def killing(run, progress, *rest):
    if progress.step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    save(run, progress, *rest)
module._save = killing
app(sys.argv[2:])
"""
"""`decant finetune` that is killed before it saves the state after a step."""


def test_a_run_that_is_stopped_goes_on_to_the_same_bytes(world):
    write_params(world, seeds=[1, 2], train={"checkpoint_every": 3})
    tune(world, "models/whole-run")
    for stop in (2, 5, 11):  # in the first seed, in it again, and in the second
        with pytest.raises(Interrupted, match=r"with its state saved; the same command goes on"):
            tune(world, "models/stopped", tick=stopping_after(stop))
    said = []
    tune(world, "models/stopped", said=said)
    assert any(re.search(r"seed 2: going on after step \d+ of 8", line) for line in said)
    assert products(world, "models/stopped") == products(world, "models/whole-run")


def test_a_killed_run_goes_on_to_the_same_bytes(world):
    write_params(world)
    tune(world, "models/alive")
    command = [sys.executable, "-c", KILLED, "6", *world.command()[4:]]
    killed = subprocess.run(command, env=world.environment(), stdout=subprocess.DEVNULL, check=False)
    assert killed.returncode == -signal.SIGKILL
    said = []
    tune(world, said=said)
    assert said == ["seed 1: going on after step 4 of 8"]
    assert products(world) == products(world, "models/alive")


def test_states_of_other_settings_are_thrown_away(world):
    write_params(world)
    with pytest.raises(Interrupted):
        tune(world, "models/other", tick=stopping_after(3))
    write_params(world, train={"weight_decay": 0.02})
    said = []
    tune(world, "models/other", said=said)
    assert any("is of other settings: thrown away" in line for line in said)


def test_a_damaged_result_of_a_seed_is_made_again(world):
    write_params(world, seeds=[1, 2], train={"steps": 4})
    tune(world, "models/undamaged")
    with pytest.raises(Interrupted):
        tune(world, "models/damaged", tick=stopping_after(6))
    kept = world.root / "models/.damaged.training.partial/state-seed-1/result.safetensors"
    flipped = bytearray(kept.read_bytes())
    flipped[-9] ^= 1
    kept.write_bytes(flipped)
    said = []
    tune(world, "models/damaged", said=said)
    assert any("seed 1 is trained again" in line for line in said)
    assert products(world, "models/damaged") == products(world, "models/undamaged")
