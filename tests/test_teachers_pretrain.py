"""HuBERT pretraining in miniature: units on the frame grid, hidden spans, the published loss, and a pinned result."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchaudio
import yaml

from cache.errors import DataError, SettingsError
from cache.frames import num_frames
from cache.manifest import Manifest, Utterance, write_manifest
from cache.publish import write_json
from cache.ragged import Store
from cache.receipts import make_receipt, store_key
from cache.waves import WaveWriter
from pipeline.teachers.forward import load_teacher
from pipeline.teachers.pretrain import MaskedPrediction, PretrainParams, mask_spans, new_model, plan_epoch, pretrain
from pipeline.teachers.sources import Corpus, TeacherParams, materialise
from pipeline.teachers.units import cluster, mfcc

SETTINGS = {
    "kind": "pretrain",
    "shape": {
        "conv_channels": [8, 8, 8, 16, 16, 16, 16],
        "width": 24,
        "layers": 2,
        "heads": 2,
        "ffn": 48,
        "position_kernel": 8,
        "position_groups": 2,
    },
    "iterations": [{"units": {"kind": "mfcc", "centre": False}, "clusters": 8, "steps": 6, "restart": True}],
    "fit_frames": 2_000,
    "batch_seconds": 4.0,
    "crop_seconds": 1.0,
    "lr": 0.002,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "clip": 1.0,
    "dropout": 0.1,
    "mask_prob": 0.8,
    "mask_frames": 10,
    "unmasked_weight": 0.0,
    "codeword_width": 16,
    "temperature": 0.1,
    "seed": 0,
}
LAYER_ROUND = {"units": {"kind": "layer", "layer": 1, "centre": True}, "clusters": 6, "steps": 3, "restart": False}


def settings(**changes):
    return PretrainParams.model_validate({**SETTINGS, **changes})


def tones(seed, samples):
    """A melody of 0.2 s notes: structure that clusters and context that predicts."""
    rng = np.random.default_rng(seed)
    notes = np.repeat(rng.choice([200, 450, 900, 1_800], samples // 3_200 + 1), 3_200)[:samples]
    wave = 0.3 * np.sin(2 * np.pi * np.cumsum(notes) / 16_000) + 0.003 * rng.standard_normal(samples)
    return (wave * 32_767).astype(np.int16)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twenty melodies of a wave store; those of dev are named in the manifest and are not in the store."""
    root = tmp_path_factory.mktemp("waves")
    rows = []
    with WaveWriter(root) as writer:
        for number in range(20):
            wave = tones(number, 12_000 + 1_234 * number)
            audio = writer.add(f"u{number:02d}", wave)
            rows.append(
                Utterance(
                    id=f"u{number:02d}", corpus="tones", path=f"{number}.wav", samples=len(wave), rate_hz=16_000,
                    file_samples=len(wave), file_bytes=2 * len(wave), audio=audio, split="train", tasks={},
                )
            )  # fmt: skip
        place = writer.finish(store_key("waves", {}), {})
    unheard = dataclasses.replace(rows[0], id="unheard", split="dev")
    return Corpus(Manifest((*rows, unheard)), Store(place, ("wave",)))


def run(corpus, out, **changes):
    out.mkdir()
    notes = []
    pretrain(
        settings(**changes), corpus.manifest, corpus.waves, out, lambda seconds, note: notes.append((seconds, note))
    )
    return (out / "model.safetensors").read_bytes(), notes


@pytest.mark.parametrize("samples", [400, 401, 559, 560, 719, 720, 721, 1_039, 1_040, 16_000, 23_456])
def test_mfccs_have_exactly_the_frames_of_the_model(samples):
    assert mfcc(tones(0, samples)).shape == (num_frames(samples), 39)


def test_an_mfcc_frame_is_that_of_its_own_400_samples():
    wave = tones(1, 8_000)
    found = mfcc(wave)
    for t in (0, 7, 23):
        alone = mfcc(wave[320 * t : 320 * t + 400])
        np.testing.assert_allclose(found[t, :13], alone[0, :13], rtol=0, atol=1e-3)


def test_slopes_are_the_regression_over_two_frames_of_10_ms_on_each_side():
    wave = tones(2, 8_000)
    every_10_ms = torchaudio.compliance.kaldi.mfcc(torch.from_numpy(wave).float()[None], use_energy=False).numpy()
    t = 10
    slope = sum(n * (every_10_ms[2 * t + n] - every_10_ms[2 * t - n]) for n in (1, 2)) / 10
    np.testing.assert_allclose(mfcc(wave)[t, 13:26], slope, rtol=0, atol=1e-3)


def blocks(wave):
    """The first sample of each frame, and nothing else."""
    return np.stack([wave[320 * t].astype(np.float32) * np.ones(2, np.float32) for t in range(num_frames(len(wave)))])


def test_clusters_find_what_was_planted_and_do_not_depend_on_the_voice_when_centred():
    low_high = [np.repeat([0, 1_000, 0, 1_000], 3_200).astype(np.int16) for _ in range(6)]
    shifted = [wave + np.int16(10_000 * (u % 2)) for u, wave in enumerate(low_high)]
    truth = blocks(low_high[0])[:, 0] > 500
    for waves, centre in ((low_high, False), (shifted, True)):
        units = cluster(waves, blocks, centre, clusters=2, fit_frames=10_000, seed=0)
        for found in units:
            assert len({*zip(found.tolist(), truth.tolist(), strict=True)}) == 2
        assert all(np.array_equal(found, units[0]) for found in units)
    apart = cluster(shifted, blocks, False, clusters=2, fit_frames=10_000, seed=0)
    assert len(np.unique(apart[0])) == 1  # uncentred, the voice is the unit


def test_more_units_than_frames_are_refused():
    with pytest.raises(SettingsError, match="37 frames cannot make clusters: 100"):
        cluster([tones(0, 12_000)], mfcc, False, clusters=100, fit_frames=1_000, seed=0)


def test_spans_hide_about_half_of_the_frames_in_runs_of_at_least_ten():
    rng = np.random.default_rng(0)
    hidden = mask_spans(400, 150, 0.8, 10, rng)
    # 12 spans of 10 without replacement among 141 starts: 1 - (1 - 12/141)^10, a little less at the edges
    assert 0.54 < hidden.mean() < 0.60
    for row in hidden:
        edges = np.flatnonzero(np.diff(np.r_[0, row, 0]))
        assert (edges[1::2] - edges[::2] >= 10).all()


@pytest.mark.parametrize("frames", [1, 2, 9, 10, 11, 25])
def test_short_rows_are_hidden_somewhere_and_never_past_their_end(frames):
    hidden = mask_spans(5, frames, 0.8, 10, np.random.default_rng(0))
    assert hidden.shape == (5, frames)
    assert hidden.any(1).all()


def test_an_epoch_has_every_recording_once_in_batches_of_the_asked_size():
    frames = np.random.default_rng(0).integers(20, 400, 300)
    plan = plan_epoch(frames, 1_000, 150, np.random.default_rng(1))
    again = plan_epoch(frames, 1_000, 150, np.random.default_rng(1))
    assert sorted(np.concatenate([b.utterances for b in plan]).tolist()) == list(range(300))
    for batch, same in zip(plan, again, strict=True):
        assert np.array_equal(batch.utterances, same.utterances)
        assert len(batch.utterances) * batch.frames <= 1_000
        assert batch.frames == min(150, frames[batch.utterances].min())
    kept = sum(len(b.utterances) * b.frames for b in plan) / np.minimum(frames, 150).sum()
    assert kept > 0.9  # cropping to the shortest costs little, since neighbours are of like length


def test_a_recording_longer_than_a_batch_is_a_batch():
    (batch,) = plan_epoch(np.array([500]), 100, 1_000, np.random.default_rng(0))
    assert (batch.utterances.tolist(), batch.frames) == ([0], 500)


def test_the_loss_is_the_published_formula_over_the_hidden_frames_alone():
    torch.manual_seed(0)
    task = MaskedPrediction(new_model(settings()), settings(), clusters=8).eval()
    waves, units = torch.randn(3, 16_000) * 0.1, torch.randint(0, 8, (3, 49))
    hidden = torch.from_numpy(mask_spans(3, 49, 0.8, 10, np.random.default_rng(0)))
    with torch.no_grad():
        found = task(waves, hidden, units)
        other = task(waves, hidden, torch.where(hidden, units, 7 - units))
        states = task.model(waves, mask_time_indices=hidden).last_hidden_state
    assert found.loss == other.loss
    o = (
        states.double().numpy() @ task.projection.weight.detach().double().numpy().T
        + task.projection.bias.detach().double().numpy()
    )
    e = task.codewords.detach().double().numpy()
    cosine = (o / np.linalg.norm(o, axis=2, keepdims=True)) @ (e / np.linalg.norm(e, axis=1, keepdims=True)).T
    p = np.exp(cosine / 0.1) / np.exp(cosine / 0.1).sum(2, keepdims=True)
    picked = np.take_along_axis(p, units.numpy()[..., None], 2)[..., 0][hidden.numpy()]
    assert found.loss.item() == pytest.approx(-np.log(picked).mean(), abs=1e-5)


def test_frames_that_were_not_hidden_count_when_asked():
    torch.manual_seed(0)
    plain = MaskedPrediction(new_model(settings()), settings(), clusters=8).eval()
    waves, units = torch.randn(2, 16_000) * 0.1, torch.randint(0, 8, (2, 49))
    hidden = torch.zeros(2, 49, dtype=torch.bool)
    hidden[:, 5:20] = True
    with torch.no_grad():
        masked = plain(waves, hidden, units).loss
        plain.params = settings(unmasked_weight=0.5)
        both = plain(waves, hidden, units).loss
        states = plain.model(waves, mask_time_indices=hidden).last_hidden_state
        seen = torch.nn.functional.cross_entropy(plain.score(states[~hidden]), units[~hidden])
    torch.testing.assert_close(both, masked + 0.5 * seen)


def test_masked_prediction_learns_a_melody(corpus, tmp_path):
    rounds = [{**SETTINGS["iterations"][0], "steps": 100}]
    _, notes = run(corpus, tmp_path / "m", iterations=rounds, dropout=0.0, lr=0.005)
    losses = [float(note.split("loss ")[1].split(",")[0]) for _, note in notes if "loss" in note]
    assert losses[-1] < 0.8 * np.log(8)
    assert sum(seconds for seconds, _ in notes) == pytest.approx(100 * 4.0, rel=0.2)


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not(corpus, tmp_path):
    first, _ = run(corpus, tmp_path / "a", iterations=[*SETTINGS["iterations"], LAYER_ROUND])
    torch.rand(7)  # the state of the process plays no part
    again, _ = run(corpus, tmp_path / "b", iterations=[*SETTINGS["iterations"], LAYER_ROUND])
    other, _ = run(corpus, tmp_path / "c", iterations=[*SETTINGS["iterations"], LAYER_ROUND], seed=1)
    assert first == again
    assert first != other


def test_a_second_round_clusters_a_layer_of_the_first_and_may_start_afresh(corpus, tmp_path):
    one, _ = run(corpus, tmp_path / "one")
    on, notes = run(corpus, tmp_path / "on", iterations=[*SETTINGS["iterations"], LAYER_ROUND])
    fresh, _ = run(corpus, tmp_path / "fresh", iterations=[*SETTINGS["iterations"], {**LAYER_ROUND, "restart": True}])
    assert len({one, on, fresh}) == 3
    assert "round 2: 6 units of layer 1" in [note for _, note in notes]


@pytest.mark.parametrize(
    ("rounds", "text"),
    [
        ([LAYER_ROUND], r"begin with \{kind: mfcc\}"),
        (
            [SETTINGS["iterations"][0], {**LAYER_ROUND, "units": {"kind": "layer", "layer": 3, "centre": True}}],
            "layers 0 to 2",
        ),
    ],
)
def test_a_round_that_clusters_a_layer_which_is_not_there_is_refused(corpus, tmp_path, rounds, text):
    with pytest.raises(SettingsError, match=text):
        pretrain(settings(iterations=rounds), corpus.manifest, corpus.waves, tmp_path)


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(SettingsError, match=r"shape\.width 24 must be a multiple of heads \(5\)"):
        new_model(settings(shape={**SETTINGS["shape"], "heads": 5}))


def test_a_manifest_without_training_recordings_is_refused(corpus, tmp_path):
    with pytest.raises(DataError, match="no utterance has split train"):
        pretrain(settings(), corpus.manifest.select(split="dev"), corpus.waves, tmp_path)


def test_a_pretrained_teacher_is_pinned_and_opens(corpus, tmp_path):
    pinned = materialise(TeacherParams(source=settings(), normalise=None), tmp_path / "t", corpus)
    teacher = load_teacher(tmp_path / "t")
    assert (pinned.family, pinned.normalise, teacher.num_layers, teacher.width) == ("hubert", False, 3, 24)
    assert len(teacher.layers(torch.zeros(1, 4_000), torch.tensor([4_000]))) == 3
    recorded = json.loads((tmp_path / "t" / "teacher.json").read_text())["source"]
    assert PretrainParams.model_validate({k: v for k, v in recorded.items() if k != "audio"}) == settings()


def decant(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "stages", "teacher", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_the_command_writes_the_teacher_and_what_a_student_starts_from(corpus, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    from pipeline.student.adopt import adopt

    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    with WaveWriter(tmp_path / "store" / "waves") as writer:
        for utterance in corpus.manifest.select(split="train"):
            writer.add(utterance.id, corpus.waves.read("wave", utterance.id))
        place = writer.finish(store_key("waves", {}), {})
    write_json(tmp_path / "waves.json", make_receipt(place, ["wave"]))
    write_manifest(tmp_path / "manifest.jsonl", corpus.manifest.select(split="train"))
    teachers = {
        "made": {"source": SETTINGS, "normalise": None, "keep": {}},
        "copied": {"source": {"kind": "folder", "path": str(tmp_path / "made")}, "normalise": None, "keep": {}},
        "moving": {"source": {"kind": "hub", "repo": "someone/hubert", "revision": "main"}, "normalise": None},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"teachers": teachers}))

    def command(name, *more):
        out, init = tmp_path / name, tmp_path / f"{name}.safetensors"
        return decant(name, "--out", out, "--init", init, "--params", tmp_path / "params.yaml", *more)

    refused = command("made")
    assert (refused.returncode, refused.stderr) == (
        2,
        "decant teacher: a teacher of kind pretrain needs --manifest and --waves\n",
    )
    done = command("made", "--manifest", tmp_path / "manifest.jsonl", "--waves", tmp_path / "waves.json")
    assert done.returncode == 0, done.stderr
    assert "teacher made: hubert, " in done.stdout
    wanted = adopt(tmp_path / "made")
    found = load_file(tmp_path / "made.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)

    assert command("copied").returncode == 0
    digests = [load_teacher(tmp_path / name).describe()["digest"] for name in ("made", "copied")]
    assert digests[0] == digests[1]
    assert (tmp_path / "made.safetensors").read_bytes() == (tmp_path / "copied.safetensors").read_bytes()

    moving = command("moving")
    assert moving.returncode == 2
    assert "teachers.moving.source.revision is 'main'" in moving.stderr
    assert "a branch or tag can move" in moving.stderr
    assert moving.stderr.count("\n") == 1
