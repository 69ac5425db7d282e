import csv
import os
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cache.errors import DataError, DecantError, ResourceError, SettingsError, StoreError
from cache.process import exclusive
from cache.publish import read_json
from pipeline.layers.targets import targets_json
from pipeline.student.checkpoint import load_student
from stages.distill import app
from tests.distill_fixtures import (
    STOP_BEFORE,
    make_world_and_targets,
    relabelled,
    targets_of,
    train_student,
    without_teachers,
    write_params,
    write_receipt,
)

FILES = ["curves.csv", "heads.safetensors", "metrics.json", "shape.json", "weights.safetensors"]


@pytest.fixture
def world(tmp_path, store_here):
    return make_world_and_targets(tmp_path)


def products(world, out="models/distil"):
    folder = world.root / out
    assert sorted(p.name for p in folder.iterdir()) == FILES
    return {name: (folder / name).read_bytes() for name in FILES}


def run_stage(world):
    """The stage in this process; gives what it printed."""
    return CliRunner().invoke(app, world.command()[4:], catch_exceptions=False).output


def test_training_lowers_the_loss_and_leaves_a_whole_product(world):
    write_params(world, train={"steps": 60, "learning_rate": 0.01})
    metrics = train_student(world)
    rows = list(csv.DictReader((world.root / "models/distil/curves.csv").read_text().splitlines()))
    assert [int(r["step"]) for r in rows if r["dev_l1"]] == [0, *range(5, 61, 5)]
    assert [int(r["step"]) for r in rows if r["l1"]][:6] == [3, 5, 6, 9, 10, 12]
    assert float(rows[-1]["dev_total"]) < 0.8 * float(rows[0]["dev_total"])
    assert metrics["dev"]["total"] == pytest.approx(float(rows[-1]["dev_total"]), rel=1e-6)
    assert metrics == read_json(world.root / "models/distil/metrics.json")
    described = read_json(world.root / "models/distil/shape.json")
    assert described["settings"]["train"]["steps"] == 60
    assert described["targets"] == targets_json(targets_of(world))
    assert str(world.root) not in (world.root / "models/distil/shape.json").read_text()
    assert load_student(world.root / "models/distil").shape.num_blocks == 2
    assert not list((world.root / "models").glob(".*"))


def test_the_same_settings_give_the_same_bytes_and_another_seed_does_not(world):
    train_student(world, out="models/a")
    train_student(world, out="models/b")
    assert products(world, "models/a") == products(world, "models/b")
    write_params(world, seed=4)
    train_student(world, out="models/c")
    assert products(world, "models/c")["weights.safetensors"] != products(world, "models/a")["weights.safetensors"]


def test_no_steps_give_the_untrained_student(world):
    write_params(world, train={"steps": 0})
    metrics = train_student(world)
    weights, adopted = (
        load_file(world.root / "models/distil/weights.safetensors"),
        load_file(world.root / "init/hubert.safetensors"),
    )
    assert metrics["steps"] == 0
    assert metrics["dev"]["l1"] > 0
    for name, tensor in weights.items():
        if not name.startswith("norm."):
            torch.testing.assert_close(tensor, adopted[name], rtol=0, atol=0)
    write_params(world, train={"steps": 0}, init={"kind": "random"})
    train_student(world, out="models/random", init=None)
    assert not torch.equal(
        load_file(world.root / "models/random/weights.safetensors")["projection.weight"], weights["projection.weight"]
    )


@pytest.mark.slow
def test_a_run_killed_five_times_at_random_moments_ends_in_the_same_bytes(world):
    write_params(world, train={"steps": 60, "checkpoint_every": 5, "log_every": 4, "validate_every": 30})
    train_student(world, out="models/whole")
    state = world.root / "models/.distil.training.partial"
    moments = random.Random(0)
    for life in range(5):
        before = {p.name for p in state.glob("state-*.json")}
        command = [sys.executable, "-c", STOP_BEFORE, str(10 * life + 15), *world.command()[4:]]
        with subprocess.Popen(command, env=world.environment(), stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and {p.name for p in state.glob("state-*.json")} == before:
                time.sleep(0.002)
            time.sleep(moments.uniform(0.0, 0.15))
            process.kill()
        assert process.returncode == -signal.SIGKILL
    said = []
    train_student(world, said=said)
    assert [line for line in said if re.fullmatch("going on after step (2[5-9]|[3-5][0-9]) of 60", line)]
    assert products(world) == products(world, "models/whole")


TELL_OF_ROWS = """
import sys
from pipeline.distill.curves import Curves
from stages.__main__ import main
add = Curves.add
def telling(self, step, **values):
    add(self, step, **values)
    print(f"row {step}", flush=True)
Curves.add = telling
main()
"""


def test_sigterm_saves_the_state_and_exits_with_75(world):
    never = 10**7
    write_params(world, train={"steps": 10**6, "checkpoint_every": never, "validate_every": None, "log_every": 20})
    command = [sys.executable, "-c", TELL_OF_ROWS, *world.command()[3:]]
    with subprocess.Popen(
        command, env=world.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        told = iter(process.stdout.readline, "")
        assert "row 20\n" in told
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate()
    assert process.returncode == 75, errors
    assert "with its state saved; the same command goes on" in errors
    assert errors.count("\n") == 1
    state = world.root / "models/.distil.training.partial"
    steps = [int(p.stem.removeprefix("state-")) for p in state.glob("state-*.json")]
    assert len(steps) == 1
    assert 20 <= steps[0] < 10**6
    assert not (world.root / "models/distil").exists()


def stop_at(world, monkeypatch, step):
    """Run until the state after `step` is saved, as if the power went then."""
    from pipeline.distill import loop as module

    save = module.save_state

    def save_and_die(directory, progress, *rest):
        save(directory, progress, *rest)
        if progress.step == step:
            raise RuntimeError("the power went")

    monkeypatch.setattr(module, "save_state", save_and_die)
    with pytest.raises(RuntimeError, match="the power went"):
        train_student(world)
    monkeypatch.setattr(module, "save_state", save)
    return world.root / "models/.distil.training.partial"


def test_a_damaged_state_is_passed_over_for_the_one_before(world, monkeypatch):
    train_student(world, out="models/whole")
    state = stop_at(world, monkeypatch, 8)
    assert sorted(p.name for p in state.glob("state-*.pt")) == ["state-000000006.pt", "state-000000008.pt"]
    data = bytearray((state / "state-000000008.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (state / "state-000000008.pt").write_bytes(data)
    said = []
    train_student(world, said=said)
    assert any("state-000000008.pt is damaged" in line for line in said)
    assert "going on after step 6 of 12" in said
    assert products(world) == products(world, "models/whole")


def test_a_state_of_other_settings_is_thrown_away_and_said_to_be(world, monkeypatch):
    write_params(world, seed=5)
    train_student(world, out="models/whole")
    write_params(world, seed=3)
    stop_at(world, monkeypatch, 4)
    write_params(world, seed=5)
    said = []
    train_student(world, said=said)
    assert [line for line in said if "is of other settings: thrown away, starting at step 0" in line]
    assert products(world) == products(world, "models/whole")


def test_a_state_whose_settings_are_not_known_is_thrown_away(world, monkeypatch):
    write_params(world, seed=5)
    train_student(world, out="models/whole")
    write_params(world, seed=3)
    state = stop_at(world, monkeypatch, 4)
    (state / "run.json").unlink()  # as a kill in the middle of throwing away leaves it
    write_params(world, seed=5)
    train_student(world)
    assert products(world) == products(world, "models/whole")


def test_going_on_with_another_number_of_threads_is_said(world, monkeypatch):
    stop_at(world, monkeypatch, 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    said = []
    train_student(world, said=said)
    assert any("(threads 1, now 2): going on, but not bit for bit" in line for line in said)
    assert "going on after step 4 of 12" in said


def test_two_trainings_into_one_folder_are_refused(world):
    with (
        exclusive(world.root / "models/.distil.training.partial/lock"),
        pytest.raises(ResourceError, match=f"being written by process {os.getpid()}"),
    ):
        train_student(world)


def test_targets_that_are_no_numbers_stop_the_run_with_the_batch_kept(world, monkeypatch):
    from pipeline.distill.batches import BatchReader

    real = BatchReader._batch

    def poisoned(self, *args):
        batch = real(self, *args)
        if "utt-07" in batch.ids:
            batch.targets[0][batch.ids.index("utt-07"), 0, 0, 0] = float("nan")
        return batch

    monkeypatch.setattr(BatchReader, "_batch", poisoned)
    with pytest.raises(DataError, match=r"the targets of utt-07 are not finite"):
        train_student(world)
    (dump,) = (world.root / "models/.distil.training.partial").glob("not-finite-*")
    assert "utt-07" in read_json(dump / "batch.json")["ids"]
    assert torch.isnan(load_file(dump / "batch.safetensors")["targets.0"]).sum() == 1
    assert not (world.root / "models/distil").exists()


def test_a_bit_that_flipped_in_a_target_stops_the_run_before_it_is_learned(world):
    targets = targets_of(world)
    shard = next((world.root / "store/features" / targets.stores[0].key / "layer-01").glob("c/0/0"))
    data = bytearray(shard.read_bytes())
    data[40] ^= 4
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=r"layer-01/c/0/0: chunk 0 is damaged"):
        train_student(world)


def test_a_diverging_run_stops_and_keeps_its_last_good_state(world):
    write_params(
        world, train={"learning_rate": 1e30, "clip": None, "warmup": 0.5, "checkpoint_every": 1, "validate_every": None}
    )
    with pytest.raises(DecantError, match=r"not finite \(batch of utt-.*lower train.learning_rate"):
        train_student(world)
    (*_, newest) = sorted((world.root / "models/.distil.training.partial").glob("state-*.pt"))
    assert all(torch.isfinite(t).all() for t in torch.load(newest, weights_only=True)["modules"].values())


def test_settings_that_do_not_fit_are_named(world):
    with pytest.raises(SettingsError, match="pass --init"):
        train_student(world, init=None)
    write_params(world, shape={"ffn": [32, 24]})
    with pytest.raises(
        SettingsError, match=r"students\.distil: blocks\.0\.ffn_up\.weight is \(24, 16\) in .* but \(32, 16\)"
    ):
        run_stage(world)
    write_params(world, train={"steps": -1})
    with pytest.raises(SettingsError, match=r"students\.distil\.train\.steps is -1: "):
        run_stage(world)


def test_a_manifest_of_other_audio_or_without_a_split_is_refused(world):
    with pytest.raises(DataError, match="no utterance of split 'dev'; set train.validate_every: null"):
        train_student(world, manifest=relabelled(world.manifest, split="train"))
    with pytest.raises(DecantError, match="extracted from other audio"):
        train_student(world, manifest=relabelled(world.manifest, audio="0" * 32))


def test_bfloat16_on_a_cpu_is_said_to_be_float32(world):
    write_params(world, train={"steps": 1, "precision": "bfloat16"})
    lines = run_stage(world)
    assert "this run computes in float32" in lines
    assert "parameters after 1 steps: dev l1" in lines


def test_a_student_trains_with_every_teacher_deleted_and_transformers_unimportable(world):
    train_student(world, out="models/beside")
    environment = without_teachers(world)
    refused = subprocess.run(
        [world.command()[0], "-c", "import transformers"], env=environment, capture_output=True, text=True
    )
    assert "transformers is not installed here" in refused.stderr
    result = subprocess.run(world.command(), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert products(world) == products(world, "models/beside")


def test_a_student_can_be_narrower_than_its_teacher(world):
    changes = {"width": 12, "head_width": 4, "heads": [3, 1], "ffn": [20, 8], "position_groups": 3}
    write_params(world, shape=changes, init={"kind": "random"}, train={"steps": 2})
    train_student(world, init=None)
    heads = load_file(world.root / "models/distil/heads.safetensors")
    assert heads["split.weight"].shape == (2, 12, 16)


def test_the_store_is_asked_for_the_targets_alone(world):
    train_student(world, out="models/before")
    write_receipt(world, "wavlm", seed=9)
    write_receipt(world, "hubert", seed=0)
    train_student(world, out="models/after")
    assert products(world, "models/before") == products(world, "models/after")
    assert np.isfinite(read_json(world.root / "models/after/metrics.json")["dev"]["l1"])


def test_a_full_disk_is_named_and_leaves_the_state_before(world, monkeypatch):
    train_student(world, out="models/whole")
    state = stop_at(world, monkeypatch, 6)
    (state / ".state-000000008.pt.partial").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match="the disk is full"):
        train_student(world)
    (state / ".state-000000008.pt.partial").unlink()
    train_student(world)
    assert products(world) == products(world, "models/whole")


def test_a_wrong_path_does_not_cost_the_state(world, monkeypatch):
    state = stop_at(world, monkeypatch, 4)
    with pytest.raises(DecantError, match="extracted from other audio"):
        train_student(world, manifest=relabelled(world.manifest, audio="0" * 32))
    assert (state / "state-000000004.json").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bfloat16_on_a_gpu_lowers_the_loss(world):
    write_params(world, train={"steps": 60, "learning_rate": 0.01, "precision": "bfloat16"})
    train_student(world, device="cuda")
    rows = list(csv.DictReader((world.root / "models/distil/curves.csv").read_text().splitlines()))
    assert float(rows[-1]["dev_total"]) < 0.8 * float(rows[0]["dev_total"])
