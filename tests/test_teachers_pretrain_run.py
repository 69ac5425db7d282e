"""Pretraining as a whole: it learns, ends in the same bytes however often it is killed, and goes on from other teachers."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file

import pipeline.teachers.pretrain.run as module
from cache.errors import DecantError, Interrupted, ResourceError, SettingsError
from cache.process import exclusive
from pipeline.teachers.forward import load_teacher
from pipeline.teachers.pretrain.batches import Recordings
from pipeline.teachers.pretrain.models import open_start
from pipeline.teachers.pretrain.run import Job, pretrain
from pipeline.teachers.pretrain.settings import PretrainParams, without_paths
from pipeline.teachers.sources import Folder, TeacherParams, materialise
from tests.conftest import TINY_HUBERT
from tests.pretrain_fixtures import (
    CONTRASTIVE,
    DISTORT,
    LAYER_ROUND,
    MFCC_ROUND,
    MIX,
    SHAPE,
    TWO_ROUNDS,
    WHOLE,
    make_melodies,
    objective,
    pinned,
    run,
    settings,
)

# WavLM's own call, a boolean padding mask beside a float bias: PyTorch adds them as meant
pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
FAMILIES = {
    "hubert": {},
    "robust": {"distort": DISTORT},
    "wavlm": {"family": "wavlm", "mix": MIX},
    "wav2vec2": {"family": "wav2vec2", "objective": CONTRASTIVE},
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_melodies(tmp_path_factory.mktemp("waves"))


def test_masked_prediction_learns_a_melody(corpus, tmp_path):
    _, notes = run(corpus, tmp_path / "m", steps=[100], dropout=0.0, lr=0.005)
    losses = [float(note.split("loss ")[1].split(",")[0]) for _, note in notes if "loss" in note]
    assert losses[-1] < 0.8 * np.log(8)
    assert sum(seconds for seconds, _ in notes) == pytest.approx(100 * 4.0, rel=0.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(corpus, tmp_path, family):
    first, _ = run(corpus, tmp_path / "a", **FAMILIES[family])
    torch.rand(7)  # the state of the process plays no part
    again, _ = run(corpus, tmp_path / "b", **FAMILIES[family])
    other, _ = run(corpus, tmp_path / "c", **FAMILIES[family], seed=1)
    assert first == again
    assert first != other


def test_distortion_and_mixing_change_what_is_learnt(corpus, tmp_path):
    inputs = ((None, None), (DISTORT, None), (None, MIX))
    found = {run(corpus, tmp_path / str(n), distort=d, mix=m)[0] for n, (d, m) in enumerate(inputs)}
    assert len(found) == 3


def test_a_second_round_clusters_a_layer_of_the_first_and_may_start_afresh(corpus, tmp_path):
    one, _ = run(corpus, tmp_path / "one")
    on, notes = run(corpus, tmp_path / "on", **TWO_ROUNDS)
    rounds = [MFCC_ROUND, {**LAYER_ROUND, "restart": True}]
    fresh, _ = run(corpus, tmp_path / "fresh", objective=objective(iterations=rounds), steps=[6, 3])
    assert len({one, on, fresh}) == 3
    assert "round 2: 6 units of layer 1" in [note for _, note in notes]


DYING = textwrap.dedent(
    """
    import os, signal, sys
    from pathlib import Path
    import pipeline.teachers.pretrain.run as module
    from tests.pretrain_fixtures import *

    where, name, out, saves = sys.argv[1:]
    save = module.save_checked

    def save_and_die(*arguments):
        save(*arguments)
        save_and_die.left -= 1
        if not save_and_die.left:
            os.kill(os.getpid(), signal.SIGKILL)

    save_and_die.left = int(saves)
    module.save_checked = save_and_die
    from tests.test_teachers_pretrain_run import CASES
    run(make_melodies(Path(where)), Path(out), **CASES[name])
    """
)
CASES = {
    "two rounds": {**TWO_ROUNDS, "distort": DISTORT, "mix": MIX, "checkpoint_every": 2},
    "contrastive": {**FAMILIES["wav2vec2"], "checkpoint_every": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(corpus, tmp_path, name):
    whole, _ = run(corpus, tmp_path / "whole", **CASES[name])
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    for saves in ("1", "2"):  # after two steps; two states later: in the next round, or at the end of the only one
        command = [sys.executable, "-c", DYING, tmp_path / f"waves{saves}", name, tmp_path / "killed", saves]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    resumed, notes = run(corpus, tmp_path / "killed", **CASES[name])
    assert resumed == whole
    assert notes[0][0] > 0  # what was found done


def test_a_stop_signal_saves_the_state_and_the_same_command_goes_on(corpus, tmp_path, monkeypatch):
    whole, _ = run(corpus, tmp_path / "whole", **TWO_ROUNDS)
    update, steps = module._update, []

    def interrupted(*arguments):
        steps.append(arguments[4])
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*arguments)

    monkeypatch.setattr(module, "_update", interrupted)
    with pytest.raises(Interrupted, match="stopped after step 3 of 6 of round 1"):
        run(corpus, tmp_path / "stopped", **TWO_ROUNDS)
    resumed, _ = run(corpus, tmp_path / "stopped", **TWO_ROUNDS)
    assert resumed == whole
    assert steps == [1, 2, 3, 4, 5, 6, 1, 2, 3]


def test_a_stop_signal_while_units_are_made_is_heard_at_the_next_recording(corpus, tmp_path):
    whole, _ = run(corpus, tmp_path / "whole", **TWO_ROUNDS)
    job = Job(settings(**TWO_ROUNDS), Recordings(corpus.manifest, corpus.waves), None, False, "cpu")
    (tmp_path / "stopped-states").mkdir()

    def stop(seconds, note="", found=False):
        if note == "round 2: units of 7 of 20 recordings":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped before the units of round 2 were made"):
        pretrain(job, tmp_path / "stopped-states", tmp_path, stop)
    resumed, _ = run(corpus, tmp_path / "stopped", **TWO_ROUNDS)
    assert resumed == whole


def test_a_state_of_other_settings_or_with_damaged_units_is_not_gone_on_from(corpus, tmp_path):
    whole, _ = run(corpus, tmp_path / "whole", **TWO_ROUNDS)
    run(corpus, tmp_path / "other", **TWO_ROUNDS, seed=1)
    other, notes = run(corpus, tmp_path / "other", **TWO_ROUNDS)
    assert other == whole
    assert notes[0][0] == 0
    units = tmp_path / "other-states" / "units-1.u16"
    units.write_bytes(units.read_bytes()[:-1] + b"\x07")
    again, notes = run(corpus, tmp_path / "other", **TWO_ROUNDS)
    assert again == whole
    assert notes[0][0] == 0


def test_a_loss_that_is_no_number_ends_the_run_in_one_line(corpus, tmp_path):
    with pytest.raises(DecantError, match=r"step \d+: loss .* not finite \(batch of u.*lower lr or clip") as raised:
        run(corpus, tmp_path / "m", steps=[60], lr=1e30, clip=1e30, warmup=0.0)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("family", ["hubert", "wav2vec2"])
def test_bfloat16_trains_to_about_where_float32_does(corpus, tmp_path, family):
    wanted = {**FAMILIES[family], "steps": [40], "dropout": 0.0}
    ends = {}
    for precision in ("float32", "bfloat16"):
        _, notes = run(corpus, tmp_path / precision, **wanted, precision=precision)
        ends[precision] = float(notes[-1][1].split("loss ")[1].split(",")[0])
    assert ends["bfloat16"] != ends["float32"]
    assert ends["bfloat16"] == pytest.approx(ends["float32"], rel=0.05)
    weights = load_file(tmp_path / "bfloat16" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_trains_to_about_where_the_cpu_does(corpus, tmp_path, family):
    ends = {}
    for device in ("cpu", "cuda"):
        materialise(
            TeacherParams(source=settings(**FAMILIES[family], steps=[40], dropout=0.0), normalise=None),
            tmp_path / device, corpus, device=device,
            on_progress=lambda seconds, note="", found=False, d=device: ends.update({d: note}),
        )  # fmt: skip
    losses = {device: float(note.split("loss ")[1].split(",")[0]) for device, note in ends.items()}
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.1)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_teacher_of_every_family_is_pinned_and_opens(corpus, tmp_path, name):
    found = pinned(corpus, tmp_path / "t", **FAMILIES[name])
    teacher = load_teacher(tmp_path / "t")
    family = settings(**FAMILIES[name]).family
    assert (found.family, found.normalise, teacher.num_layers, teacher.width) == (family, False, 3, 24)
    assert len(teacher.layers(torch.zeros(1, 4_000), torch.tensor([4_000]))) == 3
    recorded = json.loads((tmp_path / "t" / "teacher.json").read_text())["source"]
    assert PretrainParams.model_validate({k: v for k, v in recorded.items() if k != "audio"}) == settings(
        **FAMILIES[name]
    )
    assert not [
        path for path in tmp_path.iterdir() if path.name.startswith(".")
    ]  # the state is gone with the need for it


def test_a_teacher_is_continued_on_distorted_input_with_units_of_its_own_layer_on_clean_audio(corpus, tmp_path):
    before = pinned(corpus, tmp_path / "hubert")
    changes = {**WHOLE, "distort": DISTORT, "objective": objective(iterations=[LAYER_ROUND]), "steps": [3]}
    # what is clustered: layer 1 of the starting teacher, of the clean recordings
    teacher, recordings = load_teacher(tmp_path / "hubert"), module.Recordings(corpus.manifest, corpus.waves)

    def layer_1(wave):
        waves = torch.from_numpy(wave).float()[None] / 32_768
        return teacher.layers(waves, torch.tensor([len(wave)]))[1][0].numpy()

    name = module.fit_clusters(recordings, layer_1, True, 6, 2_000, 0)
    run(corpus, tmp_path / "units", tmp_path / "hubert", **changes)
    units = module.UnitFile(tmp_path / "units-states" / "units-0.u16", recordings.frames)
    agree = np.concatenate([units[u] == name(recordings[u]) for u in range(len(recordings))])
    assert agree.mean() > 0.999  # but for rounding at a border

    after = pinned(corpus, tmp_path / "robust", tmp_path / "hubert", **changes)
    assert (after.family, after.layers, after.width) == (before.family, before.layers, before.width)
    assert after.source["starts_from"] == {"family": "hubert", "digest": before.digest}
    configs = [(tmp_path / name / "config.json").read_bytes() for name in ("hubert", "robust")]
    assert configs[0] == configs[1]
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("hubert", "robust"))
    moved = {name: float((new[name] - old[name]).abs().max()) for name in old}
    assert old.keys() == new.keys()
    assert 0 < max(moved.values()) < 0.05  # a few small steps away from where it was


@pytest.mark.parametrize("family", ["hubert", "wavlm", "wav2vec2"])
@pytest.mark.parametrize("front", ["base", "large"])
def test_a_hugging_face_model_of_either_front_end_is_continued_with_its_own_normalisation(
    corpus, tmp_path, family, front
):
    large = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True} if front == "large" else {}
    model_type = {"hubert": "Hubert", "wavlm": "WavLM", "wav2vec2": "Wav2Vec2"}[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{model_type}Config")(
        **TINY_HUBERT, **large, apply_spec_augment=False, layerdrop=0.9
    )
    getattr(transformers, f"{model_type}Model")(config).save_pretrained(tmp_path / "published")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=front == "large").save_pretrained(tmp_path / "published")
    source = Folder(kind="folder", path=str(tmp_path / "published"))
    materialise(TeacherParams(source=source, normalise=None), tmp_path / "first")
    changes = {**FAMILIES[family], **WHOLE, "steps": [2], "lr": 1e-9, "mix": None}
    found = pinned(corpus, tmp_path / "second", tmp_path / "first", **changes)
    assert found.normalise == (front == "large")
    wave = torch.from_numpy(corpus.waves.read("wave", "u03")).float()[None] / 32_768
    layers = [load_teacher(tmp_path / name).layers(wave, torch.tensor([wave.shape[1]])) for name in ("first", "second")]
    for before, after in zip(*layers, strict=True):  # the rate is next to nothing, so it is the same model
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_a_teacher_takes_the_convolutions_of_another_family_and_begins_anew_behind_them(corpus, tmp_path):
    before = pinned(corpus, tmp_path / "hubert")
    changes = {**FAMILIES["wav2vec2"], "takes": "convolutions", "steps": [1], "lr": 1e-9}
    after = pinned(corpus, tmp_path / "wav2vec2", tmp_path / "hubert", **changes)
    assert (before.family, after.family) == ("hubert", "wav2vec2")
    old, new = (load_file(tmp_path / name / "model.safetensors") for name in ("hubert", "wav2vec2"))
    assert old.keys() == new.keys()
    for name in old:
        if name.startswith("feature_extractor."):
            torch.testing.assert_close(new[name], old[name], rtol=0, atol=1e-6)  # the rate is next to nothing
    assert not torch.allclose(
        new["encoder.layers.0.attention.k_proj.weight"], old["encoder.layers.0.attention.k_proj.weight"]
    )


def test_what_is_hidden_is_hidden_also_of_a_model_that_says_it_wants_no_masking(corpus, tmp_path):
    config = transformers.HubertConfig(**TINY_HUBERT, apply_spec_augment=False)
    transformers.HubertModel(config).save_pretrained(tmp_path / "published")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False).save_pretrained(tmp_path / "published")
    source = Folder(kind="folder", path=str(tmp_path / "published"))
    materialise(TeacherParams(source=source, normalise=None), tmp_path / "first")
    model = module.first_model(settings(**WHOLE), open_start(tmp_path / "first")).eval()
    hidden = torch.ones(1, 12, dtype=torch.bool)
    one, other = (model(torch.randn(1, 4_000), mask_time_indices=hidden).last_hidden_state for _ in range(2))
    assert torch.equal(one, other)


def refusals(tmp_path, corpus):
    pinned(corpus, tmp_path / "hubert", steps=[1])
    (tmp_path / "other.json").write_text('{"model": "log-mel"}')
    front = {"takes": "convolutions"}
    layer_9 = objective(iterations=[{**LAYER_ROUND, "units": {"kind": "layer", "layer": 9, "centre": True}}])
    layer_3 = objective(
        iterations=[MFCC_ROUND, {**LAYER_ROUND, "units": {"kind": "layer", "layer": 3, "centre": True}}]
    )
    return [
        ({"objective": objective(iterations=[LAYER_ROUND])}, None, r"begin with \{kind: mfcc\}"),
        ({"objective": layer_3, "steps": [1, 1]}, None, r"iterations\[1\]\.units\.layer is 3 and .* layers 0 to 2"),
        ({"objective": layer_9, **WHOLE}, "hubert", "layer is 9 and the model has layers 0 to 2"),
        ({"shape": {**SHAPE, "heads": 5}}, None, r"shape\.width 24 must be a multiple of heads \(5\)"),
        ({"shape": None}, None, "shape is null and no whole model is taken"),
        ({}, "hubert", "takes is null and there is a teacher to start from; choose model or convolutions"),
        ({"takes": "convolutions"}, None, "takes is 'convolutions' and there is no teacher to start from"),
        ({"takes": "model"}, "hubert", "shape: the model that is taken has one; set it to null"),
        ({**WHOLE, "family": "wavlm"}, "hubert", "family is 'wavlm' and the teacher that it starts from is hubert"),
        ({**front, "shape": {**SHAPE, "conv_channels": [4] * 7}}, "hubert", r"'conv_dim': \[8, .* these are .*\[4, 4"),
        ({**front, "objective": objective(iterations=[LAYER_ROUND])}, "hubert", r"begin with \{kind: mfcc\}"),
        ({}, "other.json", "holds {'model': 'log-mel'}; a teacher starts from the folder of another one"),
    ]


def test_what_does_not_fit_is_refused_before_anything_is_trained(corpus, tmp_path):
    for number, (changes, start, text) in enumerate(refusals(tmp_path, corpus)):
        with pytest.raises(SettingsError, match=text) as raised:
            pinned(corpus, tmp_path / str(number), None if start is None else tmp_path / start, **changes)
        assert "\n" not in str(raised.value)
        assert not (tmp_path / str(number)).exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"family": "wav2vec2"}, "objective.kind is 'masked_units', and wav2vec2 is trained with contrastive"),
        ({"objective": CONTRASTIVE}, "objective.kind is 'contrastive', and hubert is trained with masked_units"),
        ({"steps": [3, 3]}, "steps has 2 numbers and the objective has rounds: 1"),
        ({"objective": objective(iterations=[{**MFCC_ROUND, "clusters": 65_537}])}, "less than or equal to 65536"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, text):
    with pytest.raises(ValidationError, match=text):
        settings(**changes)


def test_a_folder_or_a_hub_commit_starts_from_nothing(corpus, tmp_path):
    pinned(corpus, tmp_path / "hubert", steps=[1])
    source = Folder(kind="folder", path=str(tmp_path / "hubert"))
    with pytest.raises(SettingsError, match="source is of kind folder, which is a whole teacher"):
        materialise(TeacherParams(source=source, normalise=None), tmp_path / "t", starts_from=tmp_path / "hubert")
    scratch = Path(__file__).parent.parent / "recipes" / "scratch.json"
    again = materialise(TeacherParams(source=source, normalise=None), tmp_path / "t", starts_from=scratch)
    assert again.digest == load_teacher(tmp_path / "hubert").describe()["digest"]


def test_two_trainings_of_one_teacher_are_not_run_side_by_side(corpus, tmp_path):
    with (
        exclusive(tmp_path / ".t.training.partial" / "lock"),
        pytest.raises(ResourceError, match="is being written by"),
    ):
        pinned(corpus, tmp_path / "t")


def test_a_product_names_folders_but_not_where_they_lie():
    noise = {"probability": 1.0, "sources": [{"kind": "folder", "path": "/data/musan/noise/"}], "snr_db": [0.0, 20.0]}
    params = settings(distort={"combine": "each", "reverberation": None, "noise": noise, "gaussian": None})
    said = without_paths(params.model_dump(mode="json"))
    assert said["distort"]["noise"]["sources"] == [{"kind": "folder", "path": "noise"}]
    assert "/data" not in json.dumps(said)
