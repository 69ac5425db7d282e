"""Noise, rooms and mixing: the asked ratios, scipy's convolution, and no shift in time."""

import numpy as np
import pytest
import scipy.signal
import scipy.stats
import soundfile
import torch
from pydantic import ValidationError

from cache.errors import DataError
from pipeline.distortion.distort import Distorter, Distortion, add_noise, choose, folders_of
from pipeline.distortion.mixing import Mixer, Mixing, scale
from pipeline.distortion.noises import (
    AudioFolder,
    BabbleNoise,
    FolderNoise,
    babble,
    coloured,
    noise_maker,
)
from pipeline.distortion.rooms import FolderRooms, from_direct_path, reverberate, room_maker, synthetic
from tests.pretrain_fixtures import DISTORT, MIX


def rng(seed=0):
    return np.random.default_rng(seed)


def speech(seed=0, samples=16_000):
    """Noise in bursts: loud and quiet stretches, and a sharp autocorrelation."""
    envelope = np.repeat(rng(seed + 100).uniform(0.01, 1.0, samples // 800 + 1), 800)[:samples]
    return torch.from_numpy((0.2 * envelope * rng(seed).standard_normal(samples)).astype(np.float32))


def db(signal, noise):
    signal, noise = np.asarray(signal, dtype=np.float64), np.asarray(noise, dtype=np.float64)
    return 10 * np.log10(np.square(signal).sum() / np.square(noise).sum())


class Voices:
    """Recordings that babble is made of."""

    def __init__(self, *waves):
        self.waves = waves

    def __len__(self):
        return len(self.waves)

    def samples_of(self, u):
        return len(self.waves[u])

    def read(self, u, start, count):
        return np.asarray(self.waves[u], dtype=np.float32)[start : start + count]


NOBODY = Voices()


@pytest.mark.parametrize("snr", [-5.0, 0.0, 12.5, 40.0])
def test_the_ratio_that_was_asked_for_is_the_one_that_comes_out(snr):
    wave = speech()
    noise = coloured(len(wave), 1.0, rng(1))
    noisy = add_noise(wave, noise, snr)
    assert db(wave, (noisy.double() - wave.double()).numpy()) == pytest.approx(snr, abs=0.01)
    # what was added is the noise, not something else
    assert np.corrcoef((noisy - wave).numpy(), noise)[0, 1] == pytest.approx(1, abs=1e-4)


def test_silence_and_silent_noise_leave_the_waveform_as_it_is():
    wave, silence = speech(), torch.zeros(16_000)
    assert torch.equal(add_noise(silence, wave.numpy(), 5.0), silence)
    assert torch.equal(add_noise(wave, silence.numpy(), 5.0), wave)
    assert torch.equal(reverberate(silence, synthetic(0.5, 0.0, rng())), silence)


def test_a_room_is_scipys_convolution_at_the_loudness_of_the_dry_sound():
    wave, response = speech(), synthetic(0.7, -3.0, rng(2))
    wet = reverberate(wave, response).numpy()
    wanted = scipy.signal.oaconvolve(wave.double().numpy(), response.astype(np.float64))[: len(wave)]
    wanted *= np.sqrt(np.square(wave.double().numpy()).sum() / np.square(wanted).sum())
    np.testing.assert_allclose(wet, wanted, rtol=0, atol=1e-5)
    assert len(wet) == len(wave)


@pytest.mark.parametrize("direct_db", [-3.0, 0.0, 10.0])
def test_a_room_does_not_shift_time(direct_db):
    wave = speech().numpy()
    for seed in range(5):
        wet = reverberate(torch.from_numpy(wave), synthetic(0.8, direct_db, rng(seed))).numpy()
        lags = scipy.signal.correlation_lags(len(wet), len(wave))
        assert lags[np.abs(scipy.signal.correlate(wet, wave)).argmax()] == 0


@pytest.mark.parametrize("t60", [0.2, 0.5, 1.0])
def test_a_synthetic_room_decays_by_60_db_in_the_time_asked_for_and_has_the_direct_energy_asked_for(t60):
    response = synthetic(t60, 4.0, rng(3)).astype(np.float64)
    assert response[0] == 1.0
    assert -10 * np.log10(np.square(response[1:]).sum()) == pytest.approx(4.0, abs=0.01)
    # Schroeder's backward integral, as T60 is measured: the line through -5 to -25 dB
    left = 10 * np.log10(np.cumsum(np.square(response[:0:-1]))[::-1] / np.square(response[1:]).sum())
    time = np.arange(len(left)) / 16_000
    line = (left < -5) & (left > -25)
    slope = np.polyfit(time[line], left[line], 1)[0]
    assert -60 / slope == pytest.approx(t60, rel=0.1)


def test_a_recorded_room_begins_with_its_direct_path(tmp_path):
    late = np.concatenate([np.zeros(333), 0.5 * synthetic(0.3, 6.0, rng(4))]).astype(np.float32)
    soundfile.write(tmp_path / "room.wav", np.stack([late, rng(5).standard_normal(len(late))], 1), 16_000, "FLOAT")
    found = room_maker(FolderRooms(kind="folder", path=str(tmp_path)))(rng())
    np.testing.assert_array_equal(found, late[333:])  # the first channel, from its largest sample on
    np.testing.assert_array_equal(from_direct_path(late), late[333:])


def test_coloured_noise_falls_by_3_db_an_octave_for_each_exponent():
    for exponent in (0.0, 1.0, 2.0):
        noise = coloured(160_000, exponent, rng(6))
        frequency, power = scipy.signal.welch(noise, 16_000, nperseg=4_096)
        band = (frequency > 100) & (frequency < 6_000)
        slope = np.polyfit(np.log2(frequency[band]), 10 * np.log10(power[band]), 1)[0]
        assert slope == pytest.approx(-3.01 * exponent, abs=0.3)


def test_babble_is_of_other_recordings_as_loud_as_each_other():
    voices = Voices(np.full(900, 0.9), np.full(900, 0.1), np.full(50, 0.3))
    for seed in range(20):
        noise = babble(voices, 400, 3, own=0, rng=rng(seed))
        np.testing.assert_allclose(noise, 3.0, rtol=1e-5)  # each brought to power 1, the short one repeated
    alone = {float(np.abs(babble(Voices(speech(0), 0 * speech(1)), 400, 1, 0, rng(s))).max()) for s in range(5)}
    assert alone == {0.0}  # recording 0 is never its own babble, and a silent one adds nothing
    with pytest.raises(DataError, match="there is only one"):
        babble(Voices(speech(0)), 400, 1, 0, rng())
    draw = noise_maker(BabbleNoise(kind="babble", voices=(2, 5)), voices)
    assert {round(float(draw(100, rng(seed), 0).mean())) for seed in range(40)} == {2, 3, 4, 5}


def test_noise_of_a_folder_is_a_stretch_of_one_of_its_files(tmp_path, monkeypatch):
    (tmp_path / "noise" / "free-sound").mkdir(parents=True)
    ramp = (np.arange(5_000) / 10_000).astype(np.float32)
    soundfile.write(tmp_path / "noise" / "free-sound" / "long.wav", ramp, 16_000, "FLOAT")
    (tmp_path / "noise" / "ANNOTATIONS").write_text("no audio")
    monkeypatch.setenv("MUSAN", str(tmp_path))
    draw = noise_maker(FolderNoise(kind="folder", path="$MUSAN/noise"), NOBODY)
    starts = set()
    for seed in range(30):
        noise = draw(1_000, rng(seed), 0)
        np.testing.assert_allclose(np.diff(noise), 1e-4, rtol=1e-2)
        starts.add(float(noise[0]))
    assert len(starts) > 20
    wrapped = draw(12_000, rng(), 0)  # longer than the file: it begins anew
    np.testing.assert_array_equal(wrapped[:5_000], wrapped[5_000:10_000])
    assert len(wrapped) == 12_000
    soundfile.write(tmp_path / "noise" / "other.wav", ramp[:800], 16_000, "FLOAT")
    again = AudioFolder("$MUSAN/noise")
    assert [file.path.name for file in again.files] == ["long.wav", "other.wav"]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: None, "holds no audio"),
        (lambda folder: soundfile.write(folder / "a.wav", np.zeros(99), 8_000), "a.wav is at 8000 Hz and 16000 are wanted"),
        (lambda folder: (folder / "b.flac").write_bytes(b"fLaC but no more"), "b.flac cannot be read as audio"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_noise_is_refused_in_one_line(tmp_path, make, text):
    make(tmp_path)
    with pytest.raises(DataError, match=text) as raised:
        folders_of(FolderNoise(kind="folder", path=str(tmp_path)))
    assert "\n" not in str(raised.value)


def test_an_unset_variable_in_a_path_is_named():
    with pytest.raises(DataError, match="the variable NO_SUCH_VARIABLE is not set"):
        AudioFolder("$NO_SUCH_VARIABLE/noise")


def test_parts_happen_as_often_as_asked_each_or_one_at_a_time():
    shares = {"reverberation": 0.5, "noise": 0.3, "gaussian": 0.1}
    parts = {name: {**DISTORT[name], "probability": share} for name, share in shares.items()}
    draw = rng(7)
    each = [choose(Distortion.model_validate({"combine": "each", **parts}), draw) for _ in range(4_000)]
    one = [choose(Distortion.model_validate({"combine": "one", **parts}), draw) for _ in range(4_000)]
    for name, share in shares.items():
        for found in (each, one):
            # four standard deviations of 4000 draws
            assert sum(name in chosen for chosen in found) / 4_000 == pytest.approx(share, abs=0.032)
    assert max(map(len, one)) == 1
    assert max(map(len, each)) == 3
    with pytest.raises(ValidationError, match="probabilities are shares, and they add up to 1.5"):
        Distortion.model_validate({**DISTORT, "combine": "one"})


def test_a_distorter_does_what_is_asked_and_nothing_else():
    wave = speech()
    nothing = Distortion(combine="each", reverberation=None, noise=None, gaussian=None)
    assert torch.equal(Distorter(nothing, NOBODY)(wave, 0, rng()), wave)
    loud = {"probability": 1.0, "snr_db": [7.0, 7.0]}
    gaussian = Distortion.model_validate({"combine": "one", "reverberation": None, "noise": None, "gaussian": loud})
    added = (Distorter(gaussian, NOBODY)(wave, 0, rng()) - wave).numpy()
    assert db(wave, added) == pytest.approx(7.0, abs=0.01)
    assert scipy.stats.kstest(added / added.std(), "norm").pvalue > 0.01
    everything = Distorter(Distortion.model_validate(DISTORT), Voices(speech(1), speech(2), speech(3)))
    assert torch.equal(everything(wave, 0, rng(9)), everything(wave, 0, rng(9)))


def mixing(**changes):
    return Mixing.model_validate({**MIX, **changes})


def test_a_mixed_row_keeps_its_speaker_for_more_than_half_and_has_the_energy_ratio_asked_for():
    waves = torch.stack([speech(seed) for seed in range(6)])
    before = waves.clone()
    mixed = Mixer(mixing(probability=1.0, ratio_db=[3.0, 3.0]), NOBODY)(waves, np.arange(6), rng(1))
    assert torch.equal(waves, before)  # the batch itself is untouched
    for row in range(6):
        changed = (mixed[row] != waves[row]).nonzero().flatten()
        first, last = int(changed.min()), int(changed.max()) + 1
        assert last - first <= 8_000
        added = (mixed[row] - waves[row])[first:last].double()
        # a stretch of one of the other rows, scaled so that the energies of the two whole rows are 3 dB apart
        matches = []
        for other in set(range(6)) - {row}:
            energies = [float(waves[u].double().square().sum()) for u in (row, other)]
            wanted = waves[other].double().numpy() * np.sqrt(energies[0] / energies[1] / 10**0.3)
            there = scipy.signal.correlate(wanted, added.numpy(), "valid").argmax()
            matches.append(np.abs(wanted[there : there + len(added)] - added.numpy()).max())
        assert min(matches) < 1e-5


def test_as_many_rows_are_mixed_as_asked_and_stretches_lie_anywhere():
    waves = torch.stack([speech(seed, 2_000) for seed in range(8)])
    mixer, draw = Mixer(mixing(probability=0.2), NOBODY), rng(2)
    changed = torch.cat([mixer(waves, np.arange(8), draw) != waves for _ in range(250)])
    assert changed.any(1).float().mean() == pytest.approx(0.2, abs=0.036)  # four standard deviations of 2000 rows
    lengths = changed.sum(1)[changed.any(1)].float()
    assert lengths.max() <= 1_000
    assert lengths.mean() == pytest.approx(500, abs=60)  # uniform from 1 to half
    often = changed.float().mean(0)
    assert min(often[:100].mean(), often[-100:].mean()) > 0.002  # anywhere, also at the ends
    assert often[800:1_200].mean() > 0.05


def test_noise_may_be_mixed_instead_of_a_speaker_and_one_row_has_nobody_to_mix_with():
    waves = torch.stack([speech(seed) for seed in range(2)])
    noise = {"probability": 1.0, "sources": [{"kind": "coloured", "exponents": [0.0, 0.0]}], "ratio_db": [10.0, 10.0]}
    mixed = Mixer(mixing(probability=1.0, noise=noise), NOBODY)(waves, np.arange(2), rng(3))
    added = (mixed[0] - waves[0]).double()
    stretch = added[added != 0]
    assert db(waves[0], stretch * np.sqrt(len(added) / len(stretch))) == pytest.approx(10.0, abs=0.5)
    alone = Mixer(mixing(probability=1.0), NOBODY)
    assert torch.equal(alone(waves[:1], np.arange(1), rng()), waves[:1])
    assert scale(waves[0], torch.zeros(16_000), 0.0) == 0
