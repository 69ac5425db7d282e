"""Units of pretraining: MFCCs on the frame grid, clusters that find what was planted, and their file."""

import numpy as np
import pytest
import torch
import torchaudio

from cache.errors import SettingsError
from cache.frames import num_frames
from pipeline.teachers.units import UnitFile, fit_clusters, mfcc, write_units
from tests.pretrain_fixtures import tones


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
        name = fit_clusters(waves, blocks, centre, clusters=2, fit_frames=10_000, seed=0)
        units = [name(wave) for wave in waves]
        for found in units:
            assert len({*zip(found.tolist(), truth.tolist(), strict=True)}) == 2
        assert all(np.array_equal(found, units[0]) for found in units)
    apart = fit_clusters(shifted, blocks, False, clusters=2, fit_frames=10_000, seed=0)(shifted[0])
    assert len(np.unique(apart)) == 1  # uncentred, the voice is the unit


def test_more_units_than_frames_are_refused():
    with pytest.raises(SettingsError, match="37 frames cannot make clusters: 100.*more audio"):
        fit_clusters([tones(0, 12_000)], mfcc, False, clusters=100, fit_frames=1_000, seed=0)
    with pytest.raises(SettingsError, match="37 frames cannot make clusters: 100.*raise fit_frames"):
        fit_clusters([tones(seed, 12_000) for seed in range(9)], mfcc, False, clusters=100, fit_frames=30, seed=0)


def test_the_file_gives_each_recording_its_units_and_no_more_than_was_asked_is_fitted_on(tmp_path):
    waves = [tones(seed, 4_000 + 700 * seed) for seed in range(8)]
    read = []

    def counted(wave):
        read.append(len(wave))
        return mfcc(wave)

    name = fit_clusters(waves, counted, True, clusters=5, fit_frames=30, seed=0)
    assert sum(map(num_frames, read[:-1])) < 30 <= sum(map(num_frames, read))  # stops at the recording that reaches 30
    write_units(tmp_path / "units.u16", waves, name)
    units = UnitFile(tmp_path / "units.u16", np.array([num_frames(len(wave)) for wave in waves]))
    assert len(units) == 8
    assert (tmp_path / "units.u16").stat().st_size == 2 * sum(num_frames(len(wave)) for wave in waves)
    for u in (7, 0, 3):
        assert np.array_equal(units[u], name(waves[u]))


def test_as_many_units_as_the_settings_allow_fit_into_the_file(tmp_path):
    wave = np.zeros(320 * 65_535 + 400, dtype=np.int16)
    write_units(tmp_path / "units.u16", [wave], lambda w: np.arange(num_frames(len(w)), dtype=np.uint16))
    assert UnitFile(tmp_path / "units.u16", np.array([65_536]))[0][-1] == 65_535
