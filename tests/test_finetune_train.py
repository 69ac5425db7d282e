"""What moves and what does not, one task or both, one seed or several."""

import csv
import re

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from cache.errors import DecantError, SettingsError
from stages.finetune import app
from tests.finetune_fixtures import FROZEN, make_world, products, tune, write_params


@pytest.fixture(scope="module")
def corpus(shared_root):
    """One corpus for all tests: each has an output of its own."""
    return make_world(shared_root)


@pytest.fixture
def world(corpus):
    write_params(corpus)
    return corpus


def test_a_frozen_encoder_stays_bit_for_bit_and_tuned_parts_move(world):
    start = load_file(world.root / "models/start/weights.safetensors")
    for out, encoder, moves in (
        ("frozen", FROZEN, lambda name: False),
        ("upper", {"freeze_convolutions": True}, lambda name: not name.startswith("front.")),
        ("whole", {"frozen_steps": 7}, lambda name: True),  # of 8 steps the last one moves it
    ):
        write_params(world, encoder=encoder, train={"publish": "last"})
        metrics = tune(world, f"models/{out}")
        assert metrics["frozen"] == (out == "frozen")
        now = load_file(world.root / f"models/{out}/weights.safetensors")
        for name, tensor in start.items():
            assert torch.equal(now[name], tensor) != moves(name), (out, name)


def test_the_frozen_steps_leave_the_encoder_alone(world):
    write_params(world, encoder={"frozen_steps": 4}, train={"steps": 5, "validate_every": 1, "checkpoint_every": 1})
    seen = {}

    def stop_after_four(amount, note="", found=False):
        folder = world.root / "models/.waits.training.partial/state-seed-1"
        for path in folder.glob("state-*.pt"):
            seen[path.stem] = torch.load(path, weights_only=True)["modules"]["model.encoder.projection.weight"]

    tune(world, "models/waits", tick=stop_after_four)
    start = load_file(world.root / "models/start/weights.safetensors")["projection.weight"]
    assert [torch.equal(seen[f"state-{step:09d}"], start) for step in range(1, 6)] == [True] * 4 + [False]


def test_one_task_alone_has_only_its_own_head_and_scores(world):
    for task, other in (("kws", "sv"), ("sv", "kws")):
        weights = {"kind": "fixed", task: 1.0, other: None}
        write_params(world, tasks={other: None}, loss_weights=weights, train={"steps": 2})
        metrics = tune(world, f"models/only-{task}")
        assert list(metrics["tasks"]) == [task]
        heads = load_file(world.root / f"models/only-{task}/heads.safetensors")
        assert all(name.startswith(f"{task}.") for name in heads)


def test_uncertainty_moves_the_weights_and_the_curves_tell_of_it(world):
    write_params(world, loss_weights={"kind": "uncertainty"}, train={"steps": 6, "log_every": 1})
    tune(world, "models/uncertain")
    rows = list(csv.DictReader((world.root / "models/uncertain/curves.csv").read_text().splitlines()))
    weights = [(float(row["kws_weight"]), float(row["sv_weight"])) for row in rows]
    assert weights[0] == (1.0, 1.0)
    assert weights[-1][0] < 1.0  # losses above 1/2 come to count less
    assert weights[-1][1] < 1.0


def test_seeds_are_trainings_of_their_own_and_the_first_is_published(world):
    write_params(world, seeds=[1, 2])
    both = tune(world, "models/both")
    write_params(world, seeds=[2])
    second = tune(world, "models/second")
    write_params(world, seeds=[1])
    first = tune(world, "models/first")
    for task in ("kws", "sv"):
        told = both["tasks"][task]
        assert told["seeds"] == first["tasks"][task]["seeds"] + second["tasks"][task]["seeds"]
        means = [first["tasks"][task]["mean"], second["tasks"][task]["mean"]]
        assert told["mean"] == pytest.approx(sum(means) / 2)
        assert told["sd"] == pytest.approx(abs(means[0] - means[1]) / 2**0.5)
    assert (
        products(world, "models/both")["weights.safetensors"] == products(world, "models/first")["weights.safetensors"]
    )
    assert (
        products(world, "models/second")["weights.safetensors"]
        != products(world, "models/first")["weights.safetensors"]
    )


def test_the_best_step_is_published_where_that_is_asked_for(world):
    write_params(
        world, train={"steps": 6, "validate_every": 1, "head_learning_rate": 0.5}
    )  # too fast: best is not last
    metrics = tune(world, "models/best")
    rows = list(csv.DictReader((world.root / "models/best/curves.csv").read_text().splitlines()))
    errors = [float(row["dev_error"]) for row in rows if row["dev_error"]]
    assert metrics["tasks"]["kws"]["seeds"][0]["step"] == 1 + errors.index(min(errors))
    eer, accuracy = metrics["tasks"]["sv"]["dev"], metrics["tasks"]["kws"]["dev"]
    assert (eer + 1 - accuracy) / 2 == pytest.approx(min(errors), rel=1e-6)


def test_noise_and_masks_change_what_is_learned_but_not_what_is_judged(world):
    masks = {"time": {"probability": 0.5, "frames": 4}, "channels": {"probability": 0.3, "width": 3}}
    write_params(world, train={"steps": 3})
    tune(world, "models/plain")
    write_params(world, train={"steps": 3}, augment={"distort": None, "hide": masks})
    tune(world, "models/masked")
    tune(world, "models/masked-again")
    assert products(world, "models/masked") == products(world, "models/masked-again")
    assert (
        products(world, "models/masked")["weights.safetensors"]
        != products(world, "models/plain")["weights.safetensors"]
    )


def test_the_command_tells_the_scores_and_needs_trials(world):
    write_params(world, train={"steps": 2})
    arguments = [*world.command()[4:-4], "--out", str(world.root / "models/command"), *world.command()[-2:]]
    output = CliRunner().invoke(app, arguments, catch_exceptions=False).output
    assert re.search(r"finetune tuned: kws: accuracy \d+\.\d % on test", output)
    assert re.search(r"finetune tuned: sv: EER \d+\.\d % on test", output)
    at = arguments.index("--trials")
    with pytest.raises(SettingsError, match=r"finetunes.tuned: tasks.sv is set.*--trials"):
        CliRunner().invoke(app, arguments[:at] + arguments[at + 2 :], catch_exceptions=False)


class Told:
    """A log that remembers."""

    def __init__(self):
        self.told = []

    def begin(self, first, run):
        self.told.append(first)

    def row(self, step, values):
        self.told.append((step, values["total"]))

    def flush(self):
        pass

    def close(self):
        self.told.append("closed")


def test_loggers_are_told_the_rows_of_their_seed(world):
    write_params(world, seeds=[1, 2], train={"steps": 4})
    logs = {1: Told(), 2: Told()}
    tune(world, "models/logged", logs_of=lambda seed: [logs[seed]])
    rows = list(csv.DictReader((world.root / "models/logged/curves.csv").read_text().splitlines()))
    for seed, log in logs.items():
        first, *told, closed = log.told
        assert (first, closed) == (0, "closed")
        of_seed = [(int(row["step"]), pytest.approx(float(row["total"]))) for row in rows if row["seed"] == str(seed)]
        assert told == of_seed
        assert [step for step, _ in told] == [3, 4]


def test_settings_that_contradict_each_other_are_told_in_a_line(world):
    write_params(world, encoder={"frozen_steps": 8})
    with pytest.raises(
        SettingsError, match=r"finetunes.tuned: value error, encoder.frozen_steps 8 leaves nothing of the 8"
    ):
        tune(world, "models/refused")


def test_a_loss_that_is_no_number_changes_no_weight_and_is_told(world):
    write_params(world, train={"head_learning_rate": 1e30, "clip": None, "checkpoint_every": 1})
    with pytest.raises(DecantError, match=r"step \d of seed 1: loss or gradient is not finite .* lower encoder"):
        tune(world, "models/diverged")
    for path in (world.root / "models/.diverged.training.partial").glob("state-seed-1/*.pt"):
        tensors = torch.load(path, weights_only=True)["modules"]
        assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
