"""Noisy students: the same noise from any readers, in any order, after resuming; clean targets; masks as often as asked."""

import csv
import pickle

import numpy as np
import pytest
import soundfile
import torch
from pydantic import ValidationError

from cache.errors import DataError
from cache.manifest import Manifest
from cache.receipts import open_receipt
from pipeline.distill.augment import AugmentParams, HideParams, draw_hidden, spans
from pipeline.distill.batches import BatchReader
from pipeline.distill.noisy import NoisyBatches, as_int16
from pipeline.distill.plan import Aligned, Item, Planned, plan_epoch
from pipeline.distill.settings import StudentParams
from pipeline.distill.train import distil
from pipeline.distortion.distort import Distortion
from pipeline.layers.choose import choose_targets
from stages._params import read_params
from tests.distill_fixtures import make_world, write_params

CPU = torch.device("cpu")
CROP = Aligned(kind="aligned", max_seconds=0.6)
ROOM = {"probability": 0.5, "rooms": {"kind": "synthetic", "t60_sec": [0.2, 0.6], "direct_db": [0.0, 6.0]}}
NOISE = {
    "probability": 0.7,
    "sources": [{"kind": "babble", "voices": [1, 3]}, {"kind": "coloured", "exponents": [0.0, 2.0]}],
    "snr_db": [0.0, 20.0],
}
GAUSSIAN = {"probability": 0.5, "snr_db": [5.0, 20.0]}


def distortion(**parts):
    nothing = {"combine": "each", "reverberation": None, "noise": None, "gaussian": None}
    return Distortion.model_validate({**nothing, **parts})


EVERYTHING = distortion(reverberation=ROOM, noise=NOISE, gaussian=GAUSSIAN)


@pytest.fixture(scope="module")
def world(shared_root):
    return make_world(shared_root)


def open_reader(world, distort=None, seed=0, manifest=None):
    waves, features = (open_receipt(world.root / "receipts" / name) for name in ("waves.json", "hubert.json"))
    chosen = manifest or world.manifest
    return BatchReader(chosen, waves, [features], [["layer-03", "layer-01"]], distort, seed)


def two_epochs(world):
    plans = [plan_epoch(world.manifest.samples, CROP, 3.0, 0, epoch) for epoch in range(2)]
    return [Planned(number, items) for number, items in enumerate(items for plan in plans for items in plan)]


def read_ahead(reader, planned, readers=1):
    with reader.ahead(iter(planned), 3.0, readers, CPU) as batches:
        return {batch.number: copied(batch) for batch in batches}


def copied(batch):
    return batch._replace(waves=batch.waves.clone(), targets=[rows.clone() for rows in batch.targets])


def same(got, want):
    assert got.keys() == want.keys()
    return all(torch.equal(got[n].waves, want[n].waves) and got[n].ids == want[n].ids for n in want)


def test_the_noise_is_the_same_from_any_number_of_readers_after_resuming_and_in_any_order(world):
    planned = two_epochs(world)
    alone = read_ahead(open_reader(world, EVERYTHING), planned)
    assert same(read_ahead(open_reader(world, EVERYTHING), planned[::-1], readers=2), alone)
    # a training that is resumed asks for what is left, and knows nothing of what was before; this process makes the same
    reader = open_reader(world, EVERYTHING)
    left = {number: alone[number] for number in range(3, len(planned))}
    assert same({p.number: reader.read(p) for p in planned[3:]}, left)


def test_the_noise_of_an_utterance_does_not_depend_on_the_rows_beside_it(world):
    reader = open_reader(world, EVERYTHING)
    items = [Item(u, None) for u in (4, 0, 7)]
    together = reader.read(Planned(5, items))
    for row, item in enumerate(items):
        single = reader.read(Planned(5, [item]))
        count = int(single.samples[0])
        assert torch.equal(together.waves[row, :count], single.waves[0])
        assert not together.waves[row, count:].any()


def test_other_seeds_batches_and_utterances_have_other_noise(world):
    loud = distortion(gaussian={"probability": 1.0, "snr_db": [0.0, 0.0]})
    clean = open_reader(world).read_clean([Item(0, None), Item(1, None)])
    found = []
    for seed, number in ((0, 0), (1, 0), (0, 1)):
        noisy = open_reader(world, loud, seed).read(Planned(number, [Item(0, None), Item(1, None)]))
        found += [(noisy.waves - clean.waves)[row, :3_000].double() for row in (0, 1)]
    likeness = np.corrcoef(torch.stack(found).numpy()) - np.eye(6)
    assert np.abs(likeness).max() < 0.1  # 3000 independent samples: 0.018 is one standard deviation


def test_targets_lengths_and_padding_stay_as_they_are_and_so_does_validation(world):
    clean, noisy = open_reader(world), open_reader(world, EVERYTHING)
    changed = 0
    for planned in two_epochs(world):
        want, got = clean.read(planned), noisy.read(planned)
        assert torch.equal(got.samples, want.samples)
        assert torch.equal(got.frames, want.frames)
        assert torch.equal(got.targets[0], want.targets[0])
        changed += int((got.waves != want.waves).any(1).sum())
        for row, count in enumerate(want.samples.tolist()):
            assert not got.waves[row, count:].any()
        validation = noisy.read_clean(planned.items)
        assert torch.equal(validation.waves, want.waves)
        assert validation.number == -1
    assert changed > 11  # of 22, where each has some part with 0.925


def test_a_probability_of_zero_is_no_distortion_bit_for_bit(world):
    never = {"reverberation": ROOM, "noise": NOISE, "gaussian": GAUSSIAN}
    never = distortion(**{name: {**part, "probability": 0.0} for name, part in never.items()})
    never, off = open_reader(world, never), open_reader(world)
    planned = two_epochs(world)
    assert same({p.number: never.read(p) for p in planned}, {p.number: off.read(p) for p in planned})


@pytest.mark.parametrize("snr", [0.0, 10.0, 20.0])
def test_the_ratio_asked_for_is_the_one_the_student_hears(world, snr):
    coloured = {"probability": 1.0, "sources": [{"kind": "coloured", "exponents": [0.0, 2.0]}], "snr_db": [snr, snr]}
    reader = open_reader(world, distortion(noise=coloured))
    for planned in two_epochs(world):
        noisy, clean = reader.read(planned), reader.read_clean(planned.items)
        for row, count in enumerate(clean.samples.tolist()):
            signal = clean.waves[row, :count].double()
            noise = noisy.waves[row, :count].double() - signal
            assert float(10 * torch.log10(signal.square().sum() / noise.square().sum())) == pytest.approx(snr, abs=0.05)


def test_what_is_too_loud_is_turned_down_as_a_whole_and_nothing_else_is():
    every = torch.arange(-32_768, 32_768)
    np.testing.assert_array_equal(as_int16(every.float() / 32_768), every.numpy())
    wave = torch.sin(torch.arange(1_000) / 9)
    for factor in (1.5, -4.0):
        loud = as_int16(factor * wave).astype(np.float64)
        assert abs(loud).max() in (32_767, 32_768)
        np.testing.assert_allclose(loud / abs(loud).max(), np.sign(factor) * (wave / wave.abs().max()), atol=5e-5)


def test_babble_is_made_of_other_utterances_of_the_same_split(world):
    one = {"probability": 1.0, "sources": [{"kind": "babble", "voices": [1, 1]}], "snr_db": [0.0, 0.0]}
    train = world.manifest.select(split="train")
    reader = open_reader(world, distortion(noise=one), manifest=train)
    waves = [open_receipt(world.root / "receipts/waves.json").read("wave", u.id).astype(np.float64) for u in train]
    own = int(np.argmin([len(wave) for wave in waves]))  # so that a stretch of any other is long enough
    for number in range(6):
        noisy = reader.read(Planned(number, [Item(own, None)])).waves[0].numpy()
        noise = noisy - waves[own]
        peaks = [np.abs(np.correlate(wave, noise, "valid")).max() / np.linalg.norm(noise) ** 2 for wave in waves]
        peaks[own] = 0.0
        best = int(np.argmax(peaks))
        assert peaks[best] == pytest.approx(1.0, abs=0.3)  # that stretch at the loudness of this one
        assert sorted(peaks)[-2] < 0.3
    alone = Manifest((train[0],))
    with pytest.raises(DataError, match="there is only one"):
        open_reader(world, distortion(noise=one), manifest=alone).read(Planned(0, [Item(0, None)]))


def test_noise_of_a_folder_reaches_the_reader_processes(world, tmp_path, monkeypatch):
    tone = (0.5 * np.sin(2 * np.pi * 1_000 * np.arange(40_000) / 16_000)).astype(np.float32)
    soundfile.write(tmp_path / "tone.wav", tone, 16_000, "FLOAT")
    monkeypatch.setenv("SOME_NOISE", str(tmp_path))
    folder = {"probability": 1.0, "sources": [{"kind": "folder", "path": "$SOME_NOISE"}], "snr_db": [0.0, 0.0]}
    planned = [Planned(0, [Item(0, None)])]
    clean = read_ahead(open_reader(world), planned)[0].waves[0].double()
    noise = (read_ahead(open_reader(world, distortion(noise=folder)), planned)[0].waves[0] - clean).numpy()
    spectrum = np.abs(np.fft.rfft(noise)) ** 2
    at = round(1_000 * len(noise) / 16_000)
    assert spectrum[at - 3 : at + 4].sum() > 0.95 * spectrum.sum()


def test_readers_of_clean_audio_are_sent_nothing_that_needs_torch(world):
    assert b"pipeline" not in pickle.dumps(open_reader(world).padded)
    noisy = NoisyBatches(open_reader(world).padded, EVERYTHING, np.arange(3, dtype=np.int32), 0)
    again = pickle.loads(pickle.dumps(noisy))
    assert (again.params, again.seed) == (noisy.params, noisy.seed)


def hide(**parts):
    return HideParams.model_validate({"time": None, "channels": None, **parts})


TIME, CHANNELS = {"probability": 0.65, "frames": 10}, {"probability": 0.25, "width": 20}


def test_as_much_is_hidden_as_asked_and_no_padding():
    frames = torch.tensor([500, 120, 7])
    found = [draw_hidden(hide(time=TIME, channels=CHANNELS), 0, number, frames, 510, 768) for number in range(300)]
    rows = torch.stack([hidden.frames for hidden in found]).double()  # (300, B, T)
    assert rows.shape == (300, 3, 510)
    for row, count in enumerate(frames.tolist()):
        assert not rows[:, row, count:].any()
    # 32.5 spans of 10 among 491 places, without replacement: a frame is hidden unless none of the 10 that reach it was drawn
    share = 1 - np.prod([(491 - 32.5 - i) / (491 - i) for i in range(10)])
    inside = rows[:, 0, 9:491].mean()
    assert float(inside) == pytest.approx(share, abs=0.01)
    channels = torch.stack([hidden.channels for hidden in found]).double()
    assert channels.shape == (300, 3, 768)
    share = 1 - np.prod([(749 - 9.6 - i) / (749 - i) for i in range(20)])
    assert float(channels[:, :, 19:749].mean()) == pytest.approx(share, abs=0.01)
    # and not always at the same places
    assert channels[:, :, 19:749].mean((0, 1)).min() > 0.1


def test_masks_are_a_function_of_seed_and_batch():
    params, frames = hide(time=TIME, channels=CHANNELS), torch.tensor([100, 80])
    first, again = (draw_hidden(params, 3, 8, frames, 100, 64) for _ in range(2))
    assert torch.equal(first.frames, again.frames)
    assert torch.equal(first.channels, again.channels)
    for seed, number in ((4, 8), (3, 9)):
        other = draw_hidden(params, seed, number, frames, 100, 64)
        assert not torch.equal(first.frames, other.frames)
    assert not torch.equal(first.channels[0], first.channels[1])


def test_what_is_null_is_not_hidden_and_a_probability_of_zero_hides_nothing():
    frames = torch.tensor([50])
    assert draw_hidden(hide(), 0, 0, frames, 50, 16) == (None, None)
    never = draw_hidden(
        hide(time={**TIME, "probability": 0.0}, channels={**CHANNELS, "probability": 0.0}), 0, 0, frames, 50, 16
    )
    assert not never.frames.any()
    assert not never.channels.any()


def test_a_span_is_no_longer_than_what_there_is():
    rng = np.random.default_rng(0)
    assert not spans(3, 0.0, 10, rng).any()
    assert spans(3, 1.0, 10, rng).all()
    assert spans(10, 1.0, 1, rng).all()


def test_settings_that_mean_nothing_are_refused():
    for wrong in ({"time": {"probability": 1.5, "frames": 10}}, {"channels": {"probability": 0.5, "width": 0}}):
        with pytest.raises(ValidationError):
            hide(**wrong)
    with pytest.raises(ValidationError, match="hide"):  # a switch that is off is written down
        AugmentParams.model_validate({"distort": None})


HARDER = {
    "distort": {"combine": "each", "reverberation": ROOM, "noise": NOISE, "gaussian": GAUSSIAN},
    "hide": {"time": {"probability": 0.3, "frames": 4}, "channels": {"probability": 0.2, "width": 3}},
}


class Stopped(Exception):
    """What a test ends a training with."""


def distilled(world, out, augment, readers=1, stop_after=None, said=None):
    """Weights and curves of a student of twelve steps."""
    write_params(world, augment=augment)
    params = read_params("students.distil", StudentParams, world.root / "params.yaml")
    targets = choose_targets(params.ensemble, world.root / "receipts", params.init, world.root / "init")
    steps = [0]

    def tick(count, note="", found=False):
        steps[0] += count
        if steps[0] == stop_after:
            raise Stopped

    waves, init = open_receipt(world.root / "receipts/waves.json"), [world.root / "init/hubert.safetensors"]
    say = (lambda _: None) if said is None else said.append
    folder = world.root / out
    distil(params, targets, world.manifest, waves, init, folder, "cpu", tick, say, readers)
    return {name: (folder / name).read_bytes() for name in ("weights.safetensors", "heads.safetensors", "curves.csv")}


def test_a_noisy_student_is_the_same_from_two_readers_and_after_a_stop_and_another_than_a_clean_one(world):
    whole = distilled(world, "models/whole", HARDER)
    with pytest.raises(Stopped):
        distilled(world, "models/again", HARDER, stop_after=7)
    said = []
    assert distilled(world, "models/again", HARDER, readers=2, said=said) == whole
    assert any("going on after step 6 of 12" in line for line in said)
    clean = distilled(world, "models/clean", None)
    assert clean["weights.safetensors"] != whole["weights.safetensors"]
    # before the first step both students are the same, and validation is clean for both
    first = [csv.DictReader(one["curves.csv"].decode().splitlines()) for one in (clean, whole)]
    (before, noisy_before), (*_, after), (*_, noisy_after) = [next(rows) for rows in first], *first
    assert before["dev_total"] == noisy_before["dev_total"]
    assert after["dev_total"] != noisy_after["dev_total"]


def test_settings_that_switch_nothing_on_train_the_same_student_bit_for_bit(world):
    nothing = {"distort": None, "hide": {"time": None, "channels": None}}
    never = {
        "distort": {
            "combine": "each",
            "reverberation": None,
            "noise": None,
            "gaussian": {**GAUSSIAN, "probability": 0.0},
        },
        "hide": {"time": {"probability": 0.0, "frames": 10}, "channels": {"probability": 0.0, "width": 4}},
    }
    clean = distilled(world, "models/off", None)
    assert distilled(world, "models/nothing", nothing) == clean
    assert distilled(world, "models/never", never) == clean


def test_a_folder_of_noise_that_has_changed_begins_the_training_anew(world, tmp_path):
    hiss = np.random.default_rng(0).normal(0, 0.1, 30_000)
    soundfile.write(tmp_path / "hiss.wav", hiss, 16_000, "FLOAT")
    folder = {"probability": 1.0, "sources": [{"kind": "folder", "path": str(tmp_path)}], "snr_db": [5.0, 5.0]}
    augment = {"distort": {"combine": "each", "reverberation": None, "noise": folder, "gaussian": None}, "hide": None}
    said = []
    with pytest.raises(Stopped):
        distilled(world, "models/folder", augment, stop_after=7)
    with pytest.raises(Stopped):
        distilled(world, "models/folder", augment, stop_after=6, said=said)  # as soon as it has found the state
    soundfile.write(tmp_path / "more.wav", hiss[:9_000], 16_000, "FLOAT")
    with pytest.raises(Stopped):
        distilled(world, "models/folder", augment, stop_after=0, said=said)
    went_on, thrown_away = said
    assert went_on == "going on after step 6 of 12"
    assert thrown_away.endswith("is of other noise: thrown away, starting at step 0")
