"""DPHuBERT from a store: a full copy is pruned while it learns, made smaller, and distilled on; in one run that resumes."""

import csv

import pytest

from cache.publish import read_json, write_json
from cache.receipts import open_receipt
from pipeline.distill.settings import StudentParams
from pipeline.distill.train import distil
from pipeline.layers.choose import choose_targets
from pipeline.layers.ensembles import SingleTeacher
from pipeline.layers.targets import Adopted, targets_json
from pipeline.student.checkpoint import load_student
from pipeline.student.encoder import count_parameters
from pipeline.student.shape import EncoderShape
from pipeline.student.size import full_parameters
from stages._params import read_params
from tests.distill_fixtures import SHAPE, make_world, write_params, write_receipt

LAYERS = ["projection", 1, 2, 3]
FULL = {**SHAPE, "dropout": dict.fromkeys(SHAPE["dropout"], 0.0)}
PRUNE = {
    "units": ["conv", "heads", "ffn"],
    "sparsity": 0.3,
    "warmup_steps": 40,
    "gate_lr": 0.1,
    "lambda_lr": 0.1,
    "drop": {"conv": 0.01, "heads": 0.01, "ffn": 0.5},
    "rounding": "size",
    "final": {"steps": 10, "learning_rate": 0.001, "warmup": 0.2},
}
STUDENT = {
    "ensemble": {"kind": "single", "teacher": "hubert", "layers": LAYERS, "normalise": None},
    "init": {"kind": "adopted", "teacher": "hubert", "final_norm": True},
    "shape": FULL,
    "predict": {"kind": "layers", "student": "same", "several": "mean", "linears": [[0], [1, 2, 3]]},
    "prune": PRUNE,
}
TRAIN = {
    "steps": 100,
    "crop": {"kind": "full"},
    "cosine": "raw",
    "learning_rate": 0.001,
    "validate_every": 10,
    "feature_grad_mult": 1.0,
}
FILES = ("curves.csv", "heads.safetensors", "metrics.json", "shape.json", "weights.safetensors")


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    world = make_world(tmp_path)
    write_receipt(world, "hubert", seed=0, layers=tuple(LAYERS))
    write_params(world, **STUDENT, train=TRAIN)
    write_json(world.root / "targets.json", targets_json(targets_of(world)))
    return world


def targets_of(world):
    ensemble = SingleTeacher.model_validate(STUDENT["ensemble"])
    init = Adopted.model_validate(STUDENT["init"])
    return choose_targets(ensemble, world.root / "receipts", init, world.root / "init")


def train(world, out="models/distil", said=None):
    params = read_params("students.distil", StudentParams, world.root / "params.yaml")
    waves, init = open_receipt(world.root / "receipts/waves.json"), [world.root / "init/hubert.safetensors"]
    say = (lambda _: None) if said is None else said.append
    paths = targets_of(world), world.manifest, waves, init, world.root / out
    metrics = distil(params, *paths, "cpu", lambda *_, **__: None, say)
    return metrics, {name: (world.root / out / name).read_bytes() for name in FILES}


def test_a_full_copy_begins_as_its_teacher(world):
    write_params(world, **{**STUDENT, "prune": None}, train={**TRAIN, "steps": 0})
    metrics, _ = train(world)
    assert metrics["dev"]["l1"] < 1e-3  # float16 targets
    assert metrics["dev"]["cosine"] == pytest.approx(-1.0, abs=1e-5)


def test_the_student_is_as_small_as_was_asked_and_learns_on(world):
    said = []
    metrics, _ = train(world, said=said)
    full = full_parameters(EncoderShape.model_validate(FULL))
    left = metrics["parameters"]["student"]
    assert count_parameters(load_student(world.root / "models/distil")) == left
    assert abs(1 - left / full - 0.3) <= 0.005
    assert [line for line in said if line.startswith(f"pruned: {left:,} parameters are left")]
    rows = list(csv.DictReader((world.root / "models/distil/curves.csv").read_text().splitlines()))
    sparsity = {int(row["step"]): row["sparsity"] for row in rows if row["rate"]}
    assert sparsity[110] == ""  # no gates in the second phase
    assert abs(float(sparsity[100]) - 0.3) < 0.05
    dev = {int(row["step"]): float(row["dev_total"]) for row in rows if row["dev_total"]}
    assert dev[110] < dev[100]
    assert metrics["steps"] == 110


@pytest.mark.parametrize("step", [12, 100, 106], ids=["pruning", "between", "final"])
def test_a_run_that_was_stopped_in_any_phase_ends_in_the_same_bytes(world, monkeypatch, step):
    from pipeline.distill import loop

    _, whole = train(world, out="models/whole")
    save = loop.save_state

    def save_and_die(directory, progress, *rest):
        save(directory, progress, *rest)
        if progress.step == step:
            raise RuntimeError("the power went")

    monkeypatch.setattr(loop, "save_state", save_and_die)
    with pytest.raises(RuntimeError, match="the power went"):
        train(world)
    monkeypatch.setattr(loop, "save_state", save)
    said = []
    _, again = train(world, said=said)
    assert f"going on after step {step} of 110" in said
    assert again == whole


def test_the_best_student_is_one_without_gates(world):
    write_params(world, **STUDENT, train={**TRAIN, "keep": 2, "publish": "best"})
    metrics, _ = train(world)
    kept = sorted(p.name for p in (world.root / "models/distil/checkpoints").iterdir())
    assert kept == ["step-000000110"]
    assert metrics["best"]["step"] == 110
    described = read_json(world.root / "models/distil/checkpoints" / kept[0] / "shape.json")
    assert described["step"] == 110
    assert load_student(world.root / "models/distil/checkpoints" / kept[0]).shape.heads == tuple(
        described["shape"]["heads"]
    )
