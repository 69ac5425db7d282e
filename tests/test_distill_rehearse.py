"""The dry run: the largest batches of a plan, what each phase takes, and nothing on the disk."""

import re

import numpy as np
import pytest

from cache.frames import FIELD, HOP, num_frames
from cache.receipts import open_receipt
from pipeline.distill.inputs import open_inputs
from pipeline.distill.plan import Aligned, Full, plan_epoch
from pipeline.distill.rehearse import longest_of, rehearse
from pipeline.distill.settings import StudentParams
from pipeline.distill.world import ALONE
from stages._params import read_params
from tests.distill_fixtures import (
    PRUNE,
    contents,
    make_world_and_targets,
    targets_of,
    train_student,
    write_params,
)
from tests.in_process import decant


@pytest.fixture
def world(tmp_path, store_here):
    return make_world_and_targets(tmp_path)


def rehearsed(world, said):
    params = read_params("students.distil", StudentParams, world.root / "params.yaml")
    waves, init = open_receipt(world.root / "receipts/waves.json"), [world.root / "init/hubert.safetensors"]
    inputs = open_inputs(params, targets_of(world), world.manifest, waves, init, "cpu", 1.0, ALONE, said.append)
    return rehearse(params, inputs, 1, said.append)


@pytest.mark.parametrize("crop", [Full(kind="full"), Aligned(kind="aligned", max_seconds=0.7)])
def test_the_longest_piece_of_each_batch_is_what_its_items_say(crop):
    samples = np.random.default_rng(0).integers(400, 30_000, size=200)
    plan = plan_epoch(samples, crop, 4.0, 1, 0)
    by_hand = []
    for items in plan:
        whole = [int(samples[i.utterance]) for i in items if i.span is None]
        by_hand.append(max([*whole, *[(i.span.count - 1) * HOP + FIELD for i in items if i.span is not None]]))
    assert longest_of(plan).tolist() == by_hand
    if isinstance(crop, Aligned):
        assert max(num_frames(size) for size in by_hand) == num_frames(int(0.7 * 16_000))


def test_a_dry_run_computes_the_fullest_batch_and_tells_what_it_takes(world, monkeypatch):
    from pipeline.distill.learner import Learner

    update, seen = Learner.update, []

    def watched(self, batches, frames, number):
        seen.append((len(batches), frames, [tuple(batch.waves.shape) for batch in batches]))
        return update(self, batches, frames, number)

    monkeypatch.setattr(Learner, "update", watched)
    write_params(world, train={"steps": 50, "accumulate": 2, "batch_seconds": 2.0, "crop": {"kind": "full"}})
    said = []
    (phase,) = rehearsed(world, said)
    train = world.manifest.select(split="train")
    plan = plan_epoch(train.samples, Full(kind="full"), 2.0, 3, 0)
    fullest = max(len(items) * max(int(train.samples[i.utterance]) for i in items) for items in plan)
    assert fullest in {shape[0][0] * shape[0][1] for _, _, shape in seen}
    for count, frames, shapes in seen:
        assert count == 2
        assert shapes[0] == shapes[1]
        assert 0 < frames <= 2 * shapes[0][0] * num_frames(shapes[0][1])
    (shape, *_) = [shapes[0] for _, _, shapes in seen if shapes[0][0] * shapes[0][1] == fullest]
    assert f"{shape[0]} utterances padded to {shape[1] / 16_000:.2f} s" in said[0]
    assert phase.phase.steps == 50
    assert min(phase.step_seconds, phase.read_seconds, phase.validation_seconds) > 0
    assert phase.seconds <= 50 * max(phase.step_seconds, phase.read_seconds) + 11 * phase.validation_seconds
    assert 2**27 < phase.peak_bytes < 2**36
    assert re.fullmatch(r"about [\d.]+ minutes for 50 steps; nothing was written", said[-1])


def test_both_phases_of_a_pruned_student_are_rehearsed(world):
    write_params(world, prune=PRUNE, train={"validate_every": None})
    first, final = rehearsed(world, said := [])
    assert (first.phase.name, final.phase.name) == ("prune", "final")
    assert (first.phase.steps, final.phase.steps) == (12, 6)
    assert final.validation_seconds == 0
    assert [line.split(":")[0] for line in said[:3]] == ["the largest of train", "prune", "final"]
    assert "18 steps" in said[3]


def test_a_dry_run_writes_nothing_and_disturbs_no_state(world):
    made = 0

    def tick(amount, **_):
        nonlocal made
        made += amount
        if made == 5:
            raise RuntimeError("the power went")

    before = contents(world.root)
    done = decant(*world.command()[3:], "--dry-run", "--tensorboard", world.root / "logs")
    assert done.returncode == 0, done.stderr
    assert "nothing was written" in done.stdout
    assert contents(world.root) == before
    assert not (world.root / "models").exists()
    with pytest.raises(RuntimeError, match="the power went"):
        train_student(world, tick=tick)
    before = contents(world.root)
    write_params(world, seed=9)  # of another training than the state
    before["params.yaml"] = (world.root / "params.yaml").read_bytes()
    assert decant(*world.command()[3:], "--dry-run").returncode == 0
    assert contents(world.root) == before


def test_a_loss_that_is_no_number_is_told_before_anything_is_trained(world):
    write_params(world, train={"learning_rate": 1e30, "warmup": 0.0, "clip": None})
    done = decant(*world.command()[3:], "--dry-run")
    assert done.returncode == 1
    assert "is not finite" in done.stderr
    assert "lower train.learning_rate" in done.stderr
