"""What a model costs: multiply-accumulates against a closed form, bytes against files, seconds against one that sleeps."""

import json
import time

import pytest
import torch

from cache.errors import SettingsError, StoreError
from pipeline import profile as profiles
from pipeline.models import open_model
from pipeline.profile import ProfileParams, count_macs, machine, profile, weight_bytes
from pipeline.report.products import ProfileFile, parsed
from pipeline.student.checkpoint import save_student
from pipeline.student.encoder import Encoder, count_parameters, initialise
from pipeline.student.shape import EncoderShape
from pipeline.teachers.sources import Folder, TeacherParams, materialise
from pipeline.upstream import LayersAlone
from stages.profile import main
from tests.conftest import TINY_HUBERT
from tests.student_fixtures import TINY, WAVLM, changed
from tests.test_teachers_forward import make_folder

PARAMS = ProfileParams(seconds=(0.5, 0.1), rounds=5, threads=1)
PRUNED = changed(TINY, heads=(0, 2, 3), ffn=(40, 7, 0), conv_channels=(8, 5, 8, 3, 8, 8, 12))
WHOLE = 32_123  # samples: no multiple of the hop


def macs_by_hand(shape: EncoderShape, samples: int) -> int:
    """Products of matrices and convolutions, one after another."""
    total, frames, channels = 0, samples, 1
    for (kernel, stride), out in zip(shape.spans, shape.conv_channels, strict=True):
        frames = (frames - kernel) // stride + 1
        total += frames * kernel * channels * out
        channels = out
    width, t = shape.width, frames
    total += t * channels * width
    padded = t + 2 * (shape.position_kernel // 2) - shape.position_kernel + 1
    total += padded * shape.position_kernel * width * (width // shape.position_groups)
    for heads, units in zip(shape.heads, shape.ffn, strict=True):
        inner = heads * shape.head_width
        total += 4 * t * width * inner  # query, key, value, out
        total += 2 * t * t * inner  # scores, and what they weigh
        total += 2 * t * width * units
        if heads and shape.position_bias is not None:
            total += t * width * 8  # the gates of the relative positions
    return total


def student(folder, shape):
    encoder = Encoder(shape)
    initialise(encoder, torch.Generator().manual_seed(0))
    folder.mkdir(parents=True)
    save_student(folder, encoder, {})
    return encoder


@pytest.mark.parametrize("shape", [TINY, PRUNED, WAVLM], ids=["tiny", "pruned", "wavlm"])
@pytest.mark.parametrize("samples", [400, 16_000, WHOLE])
def test_the_macs_of_a_student_are_those_of_the_closed_form(tmp_path, shape, samples):
    student(tmp_path / "student", shape)
    model = open_model(tmp_path / "student", "cpu")
    assert count_macs(model, samples) == macs_by_hand(shape, samples)
    assert count_macs(model, samples) == count_macs(model, samples)


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_the_macs_of_a_teacher_are_those_of_the_closed_form(tmp_path, family):
    small = {"num_buckets": 12, "max_bucket_distance": 20} if family == "wavlm" else {}
    make_folder(tmp_path / "source", family, "base", **small)
    source = Folder(kind="folder", path=str(tmp_path / "source"))
    materialise(TeacherParams(source=source, normalise=None), tmp_path / "teacher")
    shape = WAVLM if family == "wavlm" else TINY
    assert (shape.width, shape.num_blocks) == (TINY_HUBERT["hidden_size"], TINY_HUBERT["num_hidden_layers"])
    assert count_macs(open_model(tmp_path / "teacher", "cpu"), WHOLE) == macs_by_hand(shape, WHOLE)


def test_attention_grows_with_the_square_of_the_length(tmp_path):
    student(tmp_path / "student", TINY)
    model = open_model(tmp_path / "student", "cpu")
    linear = macs_by_hand(changed(TINY, heads=(0, 0, 0)), 160_400) / macs_by_hand(
        changed(TINY, heads=(0, 0, 0)), 16_400
    )
    assert count_macs(model, 160_400) / count_macs(model, 16_400) > 1.3 * linear


def test_parameters_and_bytes_are_those_of_the_model_and_its_file(tmp_path):
    encoder = student(tmp_path / "student", PRUNED)
    (tmp_path / "student" / "heads.safetensors").write_bytes(bytes(1000))  # those of distillation: dropped after it
    (tmp_path / "logmel.json").write_text('{"model": "log-mel", "num_mels": 20, "floor": 1e-6}')
    found = profile({"log-mel": tmp_path / "logmel.json", "s": tmp_path / "student"}, PARAMS)
    assert found["s"].num_params == count_parameters(encoder)
    assert found["s"].weight_bytes == (tmp_path / "student" / "weights.safetensors").stat().st_size
    assert (found["log-mel"].num_params, found["log-mel"].weight_bytes, found["log-mel"].kind) == (0, 0, "log-mel")
    assert found["s"].digest == open_model(tmp_path / "student", "cpu").digest
    assert [cost.seconds for cost in found["s"].costs] == [0.1, 0.5]
    assert found["s"].costs[1].macs_per_second == found["s"].costs[1].macs / 0.5
    assert weight_bytes(tmp_path / "nothing") == 0


class Sleeper(LayersAlone):
    """Takes as long as it is told for every second of audio."""

    num_layers, width = 1, 1

    def __init__(self, per_second: float, order: list[float]) -> None:
        self.per_second, self.order, self.threads = per_second, order, set[int]()

    def describe(self):
        return {"kind": "sleeper", "digest": str(self.per_second), "num_params": 0}

    def layers(self, waves, samples):
        self.threads.add(torch.get_num_threads())
        self.order.append(self.per_second)
        time.sleep(self.per_second * float(samples[0]) / 16_000)
        return [torch.zeros(1, 1, 1)]


def test_the_real_time_factor_is_seconds_of_computing_per_second_of_audio(tmp_path, monkeypatch):
    order: list[float] = []
    sleepers = {"slow": Sleeper(0.4, order), "fast": Sleeper(0.1, order)}
    monkeypatch.setattr(profiles, "open_model", lambda path, device: sleepers[path.name])
    before = torch.get_num_threads()
    ticks: list[float] = []
    params = ProfileParams(seconds=(0.5,), rounds=5, threads=2)
    found = profile({name: tmp_path / name for name in sleepers}, params, on_turn=ticks.append)
    for name, factor in (("slow", 0.4), ("fast", 0.1)):
        (cost,) = found[name].costs
        assert factor <= cost.rtf.low <= cost.rtf.median <= cost.rtf.high
        assert cost.rtf.median < 2 * factor
    assert len(ticks) == 2 * 5
    assert {*sleepers["slow"].threads, *sleepers["fast"].threads} == {2}
    assert torch.get_num_threads() == before
    rounds = order[-5 * (1 + 1) :]  # a turn of either is one forward here
    assert sorted(rounds) == [0.1] * 5 + [0.4] * 5
    assert all(set(rounds[n : n + 2]) == {0.1, 0.4} for n in range(0, 10, 2)), "a round has a turn of each"


def test_an_utterance_shorter_than_a_frame_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"profile.seconds has 0.02, and a frame needs 400 samples: at least 0.025"):
        profile({}, PARAMS.model_copy(update={"seconds": (1.0, 0.02)}))


def test_fewer_than_five_rounds_are_refused():
    with pytest.raises(ValueError, match="greater than or equal to 5"):
        ProfileParams(seconds=(1.0,), rounds=3, threads=1)


def test_the_machine_is_told_without_a_name_or_a_path():
    found = machine()
    assert set(found) == {"cpu", "cores", "torch"}
    assert "/" not in str(found["cpu"])


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with a student, a baseline and settings."""
    monkeypatch.chdir(tmp_path)
    student(tmp_path / "models" / "tiny", TINY)
    (tmp_path / "logmel.json").write_text('{"model": "log-mel", "num_mels": 20, "floor": 1e-6}')
    (tmp_path / "params.yaml").write_text(
        "profile: {seconds: [0.1, 0.2], rounds: 5, threads: 1}\n"
        "models: {logmel: {path: logmel.json}, tiny: {path: models/tiny}}\n"
    )
    return tmp_path


def test_the_command_measures_the_models_of_the_params_file(project, capsys):
    main(out=project / "profile.json", of="models")
    found = json.loads((project / "profile.json").read_text())
    assert list(found["models"]) == ["logmel", "tiny"]
    read = parsed(project / "profile.json", ProfileFile)  # as the report does
    assert read.models["tiny"].costs[1].rtf.median == found["models"]["tiny"]["costs"][1]["rtf"]["median"]
    assert found["params"] == {"seconds": [0.1, 0.2], "rounds": 5, "threads": 1}
    assert found["models"]["tiny"]["costs"][1]["macs"] == macs_by_hand(TINY, 3_200)
    assert str(project) not in (project / "profile.json").read_text()
    assert "tiny: " in capsys.readouterr().out


def test_a_model_of_the_params_file_that_is_not_made_yet_is_left_out_and_named(project, capsys):
    with open(project / "params.yaml", "a", encoding="utf-8") as file:
        file.write("later: {tiny: {path: models/tiny}, big: {path: models/big}}\n")
    main(out=project / "profile.json", of="later")
    assert list(json.loads((project / "profile.json").read_text())["models"]) == ["tiny"]
    assert "big: models/big is not there yet; left out\n" in capsys.readouterr().out


def test_models_may_be_given_by_name_and_path(project):
    main(out=project / "profile.json", models=["one=models/tiny"])
    assert list(json.loads((project / "profile.json").read_text())["models"]) == ["one"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"models": ["models/tiny"]}, SettingsError, r"--models is 'models/tiny'; write it NAME=PATH"),
        ({}, SettingsError, r"there is nothing to measure; give --models NAME=PATH, or --of models"),
        ({"of": "profile"}, SettingsError, r"profile"),
        ({"models": ["x=nowhere"]}, StoreError, r"nowhere is no model"),
    ],
)
def test_what_is_no_model_is_refused(project, options, error, message):
    with pytest.raises(error, match=message):
        main(out=project / "profile.json", **options)
    assert not (project / "profile.json").exists()
