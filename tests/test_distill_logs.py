"""TensorBoard and Weights & Biases: every row once, whatever happened to the run."""

import csv
import json
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cache.errors import SettingsError
from pipeline.distill.logs import TensorBoard, WeightsAndBiases, open_logs, tagged
from tests.distill_fixtures import make_world_and_targets, train_student, write_params
from tests.in_process import decant


@pytest.fixture
def world(tmp_path, store_here):
    return make_world_and_targets(tmp_path)


def break_after(step):
    """What a training is told every step: the power goes after one of them."""

    def tick(amount, note="", found=False):
        nonlocal made
        made += amount
        if made == step:
            raise RuntimeError("the power went")

    made = 0
    return tick


def rows(world, out="models/distil"):
    """Points of curves.csv by their tag."""
    points = {}
    for row in csv.DictReader((world.root / out / "curves.csv").read_text().splitlines()):
        for column, value in row.items():
            if column != "step" and value:
                name = f"dev/{column[4:]}" if column.startswith("dev_") else f"train/{column}"
                points.setdefault(name, []).append((int(row["step"]), pytest.approx(float(value), rel=1e-5)))
    return points


def points(directory):
    """What TensorBoard shows of a folder."""
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_every_row_once_also_of_a_run_that_was_broken_off(world):
    write_params(world, train={"steps": 14, "log_every": 1, "validate_every": 3, "checkpoint_every": 4})
    for stop in (6, 11):  # after the states of steps 4 and 8
        with pytest.raises(RuntimeError, match="the power went"):
            train_student(world, tick=break_after(stop), logs=[TensorBoard(world.root / "logs")])
    train_student(world, logs=[TensorBoard(world.root / "logs")])
    assert len(list((world.root / "logs").iterdir())) == 3
    shown = points(world.root / "logs")
    assert shown == rows(world)
    assert [step for step, _ in shown["train/total"]] == list(range(1, 15))
    assert [step for step, _ in shown["dev/total"]] == [0, 3, 6, 9, 12, 14]


def test_a_training_that_begins_anew_replaces_what_its_folder_shows(world):
    write_params(world, train={"steps": 9})
    train_student(world, logs=[TensorBoard(world.root / "logs")])
    write_params(world, train={"steps": 6}, seed=8)
    train_student(world, logs=[TensorBoard(world.root / "logs")])
    assert points(world.root / "logs") == rows(world)


def test_a_logger_changes_nothing_of_the_product(world):
    train_student(world, out="models/without")
    done = decant(*world.command()[3:], "--tensorboard", world.root / "logs", cwd=world.root)
    assert done.returncode == 0, done.stderr
    for path in (world.root / "models/without").iterdir():
        assert (world.root / "models/distil" / path.name).read_bytes() == path.read_bytes()
    assert points(world.root / "logs") == rows(world)


@pytest.mark.parametrize(("option", "extra"), [("--tensorboard", "tensorboard"), ("--wandb", "wandb")])
def test_a_package_that_is_not_there_is_named_with_its_extra(world, monkeypatch, option, extra):
    monkeypatch.setitem(sys.modules, extra, None)  # as if it were not installed
    done = decant(*world.command()[3:], option, "somewhere", cwd=world.root)
    assert done.returncode == SettingsError.exit_code
    assert f"{extra} is not installed; install the extra {extra}: " in done.stderr
    assert not (world.root / "models").exists()


class Recorder:
    """Stands for the package: it keeps what it is told as the documentation says that the service does."""

    class Error(Exception):
        pass

    def __init__(self):
        self.runs = {}

    def init(self, *, project, name, id, resume, config):
        assert resume == "allow"
        return Run(self.runs.setdefault((project, id), {}))


class Run:
    def __init__(self, kept):
        self.kept, self.open = kept, True

    def log(self, values, step):
        assert self.open
        if step >= max(self.kept, default=0):
            self.kept[step] = values

    def finish(self):
        self.open = False


def test_a_resumed_training_goes_on_in_its_run_of_wandb_and_a_new_one_gets_another(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", service := Recorder())
    write_params(world, train={"steps": 9, "log_every": 1, "validate_every": 3, "checkpoint_every": 4})
    with pytest.raises(RuntimeError, match="the power went"):
        train_student(world, tick=break_after(6), logs=[WeightsAndBiases("students", "distil", {})])
    train_student(world, logs=[WeightsAndBiases("students", "distil", {})])
    ((_, kept),) = service.runs.items()
    assert list(kept) == list(range(10))
    shown = {}
    for step, values in kept.items():
        for tag, value in values.items():
            shown.setdefault(tag, []).append((step, value))
    assert shown == rows(world)
    train_student(world, logs=[WeightsAndBiases("students", "distil", {})])
    assert len(service.runs) == 2


def test_wandb_itself_keeps_every_row_offline(world, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    for name, value in {"MODE": "offline", "DIR": str(world.root), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    write_params(world, train={"steps": 4, "log_every": 2, "validate_every": 4})
    train_student(world, logs=open_logs(None, "students", "distil", _settings(world)))
    (path,) = world.root.glob("wandb/offline-run-*/run-*.wandb")
    kept = {}
    for data in _records(path.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            kept[items["_step"]] = items
    shown = {tag: [(s, v[tag]) for s, v in kept.items() if tag in v] for tag in rows(world)}
    assert shown == rows(world)


def _records(log):
    """Of a log in LevelDB's format (doc/log_format.md), which W&B has after 7 bytes of its own."""
    at, data = 7, b""
    while at + 7 <= len(log):
        if 32_768 - at % 32_768 < 7:  # no head of a record fits into the rest of a block
            at += 32_768 - at % 32_768
            continue
        length, kind = int.from_bytes(log[at + 4 : at + 6], "little"), log[at + 6]
        data += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield data
            data = b""


def _settings(world):
    from pipeline.distill.settings import StudentParams
    from stages._params import read_params

    return read_params("students.distil", StudentParams, world.root / "params.yaml")


def test_columns_are_grouped_by_what_they_are_of():
    assert tagged({"rate": 1.0, "l1": 2.0, "dev_l1": 3.0}) == {"train/rate": 1.0, "train/l1": 2.0, "dev/l1": 3.0}
