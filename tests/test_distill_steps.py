"""Single steps: batches that are added up, losses that are no numbers, signals, a compiled encoder."""

import csv
import os
import shutil
import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file

from cache.errors import DataError, DecantError, Interrupted
from cache.publish import read_json
from cache.receipts import open_receipt
from pipeline.distill.inputs import open_inputs
from pipeline.distill.plan import Item, Planned
from pipeline.distill.settings import StudentParams
from pipeline.distill.world import ALONE
from pipeline.padding import INT16_SCALE
from stages._params import read_params
from tests.distill_fixtures import (
    PRUNE,
    contents,
    make_world_and_targets,
    targets_of,
    train_student,
    write_params,
)

NO_DROPOUT = {"dropout": {"features": 0.0, "hidden": 0.0, "attention": 0.0, "activation": 0.0}}
STATE = "models/.distil.training.partial"


@pytest.fixture
def world(tmp_path, store_here):
    return make_world_and_targets(tmp_path)


def inputs_of(world):
    params = read_params("students.distil", StudentParams, world.root / "params.yaml")
    waves, init = open_receipt(world.root / "receipts/waves.json"), [world.root / "init/hubert.safetensors"]
    return open_inputs(params, targets_of(world), world.manifest, waves, init, "cpu", 1.0, ALONE, lambda _: None)


def test_two_batches_that_are_added_up_make_the_update_of_both_in_one(world):
    write_params(world, shape=NO_DROPOUT, train={"accumulate": 2, "clip": None})
    inputs = inputs_of(world)
    reader, learner = inputs.readers_of["train"], inputs.learner
    of_each = [[Item(0, None), Item(3, None), Item(5, None)], [Item(1, None), Item(7, None)]]
    batches = [reader.read(Planned(number, items)) for number, items in enumerate(of_each)]
    frames = sum(int(batch.frames.sum()) for batch in batches)
    update = learner.update(batches, frames, 1)
    ours = {name: p.grad for name, p in learner.named_parameters() if p.grad is not None}

    by_hand = inputs_of(world).learner  # the same weights; all five utterances in one batch, no code of the loss
    both = reader.read(Planned(0, [item for items in of_each for item in items]))
    states = by_hand.encoder(both.waves.float() * INT16_SCALE, both.samples)
    (predicted,) = by_hand.predictor(states, by_hand.encoder.read_out(states))
    l1 = cosine = torch.zeros(())
    for b, count in enumerate(both.frames.tolist()):
        for n in range(2):
            p, h = predicted[b, n, :count], both.targets[0][b, n, :count].float()
            l1 = l1 + (p - h).abs().mean(dim=1).sum()
            similarity = (p * h).sum(1) / (p.square().sum(1).sqrt() * h.square().sum(1).sqrt())
            cosine = cosine - torch.log(1 / (1 + torch.exp(-similarity))).sum()
    total = (l1 + cosine) / 2 / frames  # two targets, each with half of the weight
    total.backward()
    theirs = {name: p.grad for name, p in by_hand.named_parameters() if p.grad is not None}
    assert update.terms["total"] == pytest.approx(float(total.detach()), abs=1e-5)
    assert update.terms["l1"] == pytest.approx(float(l1.detach()) / 2 / frames, abs=1e-5)
    assert set(ours) == set(theirs)
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)


def test_adding_up_reads_as_many_batches_a_step_and_resumes_in_the_middle_of_an_epoch(world):
    write_params(world, train={"steps": 7, "accumulate": 3, "batch_seconds": 1.2, "crop": {"kind": "full"}})
    train_student(world, out="models/whole")

    def tick(amount, note="", found=False):
        if amount == 1 and (world.root / STATE / "state-000000004.json").exists() and not found:
            raise RuntimeError("the power went")

    with pytest.raises(RuntimeError, match="the power went"):
        train_student(world, tick=tick)
    record = read_json(world.root / STATE / "state-000000004.json")["progress"]
    assert record["batches"] == 12
    train_student(world)
    assert contents(world.root / "models/distil") == contents(world.root / "models/whole")


def poison(monkeypatch, name):
    """One value of an utterance's targets is no number."""
    from pipeline.distill.batches import BatchReader

    real = BatchReader._batch

    def poisoned(self, *args):
        batch = real(self, *args)
        if name in batch.ids:
            batch.targets[0][batch.ids.index(name), 0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(BatchReader, "_batch", poisoned)


@pytest.mark.parametrize("more", [{}, {"prune": PRUNE}], ids=["without gates", "with gates"])
@pytest.mark.parametrize("name", ["utt-04", "utt-09"])
def test_of_batches_that_are_added_up_the_one_without_numbers_is_kept(world, monkeypatch, name, more):
    poison(monkeypatch, name)
    write_params(world, train={"accumulate": 3, "batch_seconds": 1.2, "checkpoint_every": 1}, **more)
    with pytest.raises(DataError, match=f"the targets of {name} are not finite"):
        train_student(world)
    (dump,) = (world.root / STATE).glob("not-finite-*")
    assert name in read_json(dump / "batch.json")["ids"]
    kept = load_file(dump / "batch.safetensors")
    assert torch.isnan(kept["targets.0"]).sum() == 1
    assert torch.isfinite(kept["predicted.0"]).all()


def test_targets_of_the_dev_split_that_are_no_numbers_are_named_before_a_state_holds_them(world, monkeypatch):
    write_params(world, train={"validate_every": 4, "checkpoint_every": 1, "publish": "best"})

    def tick(amount, note="", found=False):
        if amount == 1 and not found:
            poison(monkeypatch, "utt-05")

    with pytest.raises(DataError, match="step 4: on the dev split the targets of utt-05 are not finite"):
        train_student(world, tick=tick)
    states = sorted(path.name for path in (world.root / STATE).glob("state-*.json"))
    assert states == ["state-000000002.json", "state-000000003.json"]
    with pytest.raises(DataError, match="step 0: on the dev split the targets of utt-05 are not finite"):
        train_student(world, out="models/other")


def test_pruning_that_diverges_stops_the_run_and_leaves_a_state_of_numbers(world):
    train = {"checkpoint_every": 1, "validate_every": None, "clip": None}
    write_params(world, train=train, prune={**PRUNE, "lambda_lr": 1e30, "warmup_steps": 0})
    with pytest.raises(DecantError, match=r"step \d+: loss or gradient is not finite \(batch of utt-"):
        train_student(world)
    (*_, newest) = sorted((world.root / STATE).glob("state-*.pt"))
    assert all(torch.isfinite(t).all() for t in torch.load(newest, weights_only=True)["modules"].values())


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_the_state_after_the_step_and_the_same_command_goes_on(world, number):
    write_params(world, train={"checkpoint_every": 100, "validate_every": None})
    train_student(world, out="models/whole")
    steps = 0

    def tick(amount, note="", found=False):
        nonlocal steps
        steps += amount
        if steps == 4:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped after step 5 of 12 with its state saved"):
        train_student(world, tick=tick)
    assert signal.getsignal(number) is before
    assert [path.name for path in (world.root / STATE).glob("state-*.json")] == ["state-000000005.json"]
    assert not (world.root / "models/distil").exists()
    train_student(world)
    assert contents(world.root / "models/distil") == contents(world.root / "models/whole")


@pytest.mark.compiler
@pytest.mark.timeout(1200)
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_student_has_the_losses_of_one_that_is_not(world, tmp_path):
    """In processes of their own: the shape checks of the tests are no part of what is compiled."""
    losses = []
    shape = {**NO_DROPOUT, "heads": [2], "ffn": [24]}
    one_shape = {"batch_seconds": 0.75, "validate_every": None}  # each other one would be compiled anew
    compiler = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "compiled"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    for compile_seconds in (None, 1.0):
        train = {"steps": 4, "log_every": 1, **one_shape, "compile_seconds": compile_seconds}
        write_params(world, shape=shape, train=train)
        environment = world.environment(**compiler)
        done = subprocess.run(world.command(), env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        text = (world.root / "models/distil/curves.csv").read_text()
        losses.append([[float(v) if v else -1.0 for v in row.values()] for row in csv.DictReader(text.splitlines())])
    eager, compiled = map(torch.tensor, losses)
    assert eager.shape == compiled.shape
    assert len(eager) == 5  # of step 0, too
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-4)
    assert any((tmp_path / "compiled").rglob("*.so"))
    assert not torch.equal(compiled, eager)
