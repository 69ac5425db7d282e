"""Students kept on the way: the latest few and the best, whole, in the same files whatever happened."""

import csv
from weakref import WeakKeyDictionary

import numpy as np
import pytest
import torch

from cache.publish import digest_file, read_json
from pipeline.student.checkpoint import load_student
from tests.distill_fixtures import contents, make_world, train_student, write_params

TRAIN = {"steps": 14, "validate_every": 2, "checkpoint_every": 3, "learning_rate": 0.02, "warmup": 0.0}


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    return make_world(tmp_path)


def dev_totals(folder):
    """Step and loss of every validation after step 0."""
    rows = csv.DictReader((folder / "curves.csv").read_text().splitlines())
    return {int(row["step"]): float(row["dev_total"]) for row in rows if row["dev_total"] and row["step"] != "0"}


def worse_after(monkeypatch, step):
    """From a step on, add to what the dev split says: so the best student is not the last one."""
    from pipeline.distill.learner import Learner

    evaluate, update = Learner.evaluate, Learner.update
    made = WeakKeyDictionary()  # a learner that is gone must not lend its steps to the next one

    def counting(self, batches, frames, number):
        made[self] = number
        return update(self, batches, frames, number)

    def worse(self, batches, names):
        terms = evaluate(self, batches, names)
        late = max(0, made.get(self, 0) - step)
        return {**terms, "total": terms["total"] + 0.5 * late}

    monkeypatch.setattr(Learner, "update", counting)
    monkeypatch.setattr(Learner, "evaluate", worse)


def break_at(step):
    """What a training is told every step: the power goes after one of them."""

    def tick(amount, note="", found=False):
        nonlocal made
        made += amount
        if not found and made == step:
            raise RuntimeError("the power went")

    made = 0
    return tick


def test_the_best_student_is_the_one_with_the_smallest_loss_on_the_dev_split(world, monkeypatch):
    worse_after(monkeypatch, 8)
    write_params(world, train={**TRAIN, "publish": "best", "keep": 7})
    metrics = train_student(world)
    folder = world.root / "models/distil"
    totals = dev_totals(folder)
    best = min(totals, key=totals.get)
    assert best == 8
    assert metrics["best"] == {"step": best, **metrics["dev"]}  # what is told is of what is published
    assert (metrics["step"], metrics["dev"]["total"]) == (best, pytest.approx(totals[best], rel=1e-8))
    place = folder / f"checkpoints/step-{best:09d}"
    for name in ("weights.safetensors", "shape.json", "heads.safetensors"):
        assert (folder / name).read_bytes() == (place / name).read_bytes()
    last = folder / "checkpoints/step-000000014"
    assert (folder / "weights.safetensors").read_bytes() != (last / "weights.safetensors").read_bytes()
    write_params(world, train={**TRAIN, "publish": "last", "keep": 1})
    train_student(world, out="models/last")
    for name in ("weights.safetensors", "heads.safetensors"):
        assert (world.root / "models/last" / name).read_bytes() == (last / name).read_bytes()


def test_the_two_latest_and_the_best_are_kept_and_each_is_a_whole_student(world, monkeypatch):
    worse_after(monkeypatch, 4)
    write_params(world, train={**TRAIN, "keep": 2})
    train_student(world)
    kept = sorted((world.root / "models/distil/checkpoints").iterdir())
    assert [place.name for place in kept] == [f"step-{step:09d}" for step in (4, 12, 14)]
    waves = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 4_000)).astype(np.float32))
    outputs = []
    for place in kept:
        described = read_json(place / "shape.json")
        assert described["step"] == int(place.name.removeprefix("step-"))
        assert described["weights"] == digest_file(place / "weights.safetensors")
        with torch.no_grad():
            outputs.append(load_student(place).eval()(waves, torch.tensor([4_000])).hidden[-1])
    assert not torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[1], outputs[2])


@pytest.mark.parametrize("steps", [(5,), (8, 11)])
def test_a_run_that_was_broken_off_keeps_the_same_files(world, monkeypatch, steps):
    worse_after(monkeypatch, 6)
    write_params(world, train={**TRAIN, "keep": 1, "publish": "best"})
    train_student(world, out="models/whole")
    for step in steps:
        with pytest.raises(RuntimeError, match="the power went"):
            train_student(world, tick=break_at(step))
    train_student(world)
    whole = contents(world.root / "models/whole")
    assert contents(world.root / "models/distil") == whole
    assert sorted({name.split("/")[1] for name in whole if "/" in name}) == ["step-000000006", "step-000000014"]


def test_where_the_best_student_is_gone_the_best_of_those_to_come_counts(world, monkeypatch):
    worse_after(monkeypatch, 4)
    write_params(world, train={**TRAIN, "publish": "best"})
    with pytest.raises(RuntimeError, match="the power went"):
        train_student(world, tick=break_at(7))
    (gone,) = (world.root / "models/.distil.training.partial/students").glob("step-*4")
    gone.rename(gone.with_name("lost"))
    said = []
    metrics = train_student(world, said=said)
    assert "the best student so far, of step 4, is gone: the best of those to come counts" in said
    assert metrics["best"]["step"] == 8
