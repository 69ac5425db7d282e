"""Every kind of file that people call audio: what is decoded, and why the rest is not."""

import os
import struct

import numpy as np
import pytest
import soundfile

from pipeline.audio import AudioParams, Decoded, Part, Quarantine, decode, to_int16

PARAMS = AudioParams(max_sec=5.0, channels="mean", rate="resample")


@pytest.fixture
def speech() -> np.ndarray:
    """A second of noise as int16 at 16 kHz."""
    return (np.random.default_rng(0).normal(size=16_000) * 3_000).astype(np.int16)


def reason(path, params=PARAMS) -> str:
    result = decode(path, params)
    assert isinstance(result, Quarantine), result
    return result.reason


def decoded(path, params=PARAMS) -> Decoded:
    result = decode(path, params)
    assert isinstance(result, Decoded), result
    return result


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_16_bit_audio_at_16_khz_comes_back_bit_for_bit(tmp_path, speech, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, speech, 16_000, subtype="PCM_16")
    result = decoded(path)
    assert np.array_equal(result.wave, speech)
    assert (result.rate_hz, result.file_samples, result.file_bytes) == (16_000, 16_000, path.stat().st_size)


@pytest.mark.parametrize("suffix", ["ogg", "mp3"])
def test_lossy_formats_are_read(tmp_path, suffix):
    tone = 0.5 * np.sin(np.arange(16_000) * 2 * np.pi * 440 / 16_000)
    soundfile.write(tmp_path / f"a.{suffix}", tone, 16_000)
    wave = decoded(tmp_path / f"a.{suffix}").wave
    assert abs(int(np.abs(np.fft.rfft(wave[:16_000])).argmax()) * 16_000 / min(len(wave), 16_000) - 440) < 2


@pytest.mark.parametrize("subtype", ["PCM_24", "PCM_32", "FLOAT", "DOUBLE", "PCM_U8"])
def test_other_sample_formats_give_the_same_sound(tmp_path, speech, subtype):
    soundfile.write(tmp_path / "a.wav", speech / 32_768, 16_000, subtype=subtype)
    tolerance = 256 if subtype == "PCM_U8" else 1
    assert np.abs(decoded(tmp_path / "a.wav").wave.astype(int) - speech).max() <= tolerance


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000])
def test_a_tone_is_the_same_tone_at_16_khz(tmp_path, rate):
    time = np.arange(rate + 123) / rate
    soundfile.write(tmp_path / "a.wav", 0.5 * np.sin(2 * np.pi * 440 * time), rate, subtype="DOUBLE")
    result = decoded(tmp_path / "a.wav")
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(result.wave)) / 16_000) * 32_768
    assert len(result.wave) == -(-(rate + 123) * 16_000 // rate)
    assert np.abs(result.wave - expected)[50:-50].max() < 20  # a thousandth
    assert (result.rate_hz, result.file_samples) == (rate, rate + 123)


def test_a_rate_with_no_small_ratio_is_quarantined_before_its_filters_are_made(tmp_path, speech):
    soundfile.write(tmp_path / "a.wav", speech, 44_099)
    assert "44099 Hz has no small ratio to 16000 Hz" in reason(tmp_path / "a.wav")


def test_another_rate_can_be_refused(tmp_path, speech):
    soundfile.write(tmp_path / "a.wav", speech, 8_000)
    refusing = PARAMS.model_copy(update={"rate": "refuse"})
    assert "8000 Hz, and the setting rate is refuse" in reason(tmp_path / "a.wav", refusing)


@pytest.mark.parametrize("rate", [100, 1_000_000])
def test_a_rate_no_recorder_has_is_quarantined(tmp_path, speech, rate):
    soundfile.write(tmp_path / "a.wav", speech[:500], rate)
    assert f"{rate} Hz is outside" in reason(tmp_path / "a.wav")


def test_stereo_follows_the_setting(tmp_path, speech):
    both = np.stack([speech, speech[::-1]], axis=1)
    soundfile.write(tmp_path / "a.wav", both, 16_000)
    mean = decoded(tmp_path / "a.wav").wave
    np.testing.assert_array_equal(mean, np.rint(both.astype(float).mean(1)))
    first = decoded(tmp_path / "a.wav", PARAMS.model_copy(update={"channels": "first"})).wave
    np.testing.assert_array_equal(first, speech)
    assert "2 channels" in reason(tmp_path / "a.wav", PARAMS.model_copy(update={"channels": "refuse"}))


def test_a_microphone_array_is_quarantined(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros((1_000, 9)), 16_000)
    assert "9 channels, at most 8" in reason(tmp_path / "a.wav")


def test_loud_samples_are_clipped_and_never_wrap_around(tmp_path):
    wave = np.linspace(-2, 2, 4_001)
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    result = decoded(tmp_path / "a.wav").wave
    assert (np.diff(result.astype(int)) >= 0).all()
    assert (result[0], result[-1]) == (-32_768, 32_767)
    assert to_int16(np.array([1.0, -1.0, 1e9, 0.0])).tolist() == [32_767, -32_768, 32_767, 0]


def test_silence_is_kept(tmp_path):
    soundfile.write(tmp_path / "a.flac", np.zeros(16_000), 16_000)
    assert not decoded(tmp_path / "a.flac").wave.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_no_number_is_quarantined(tmp_path, bad):
    wave = np.zeros(1_000)
    wave[7] = bad
    soundfile.write(tmp_path / "a.wav", wave, 16_000, subtype="FLOAT")
    assert reason(tmp_path / "a.wav") == "1 samples are NaN or infinite"


def test_files_that_are_no_audio_are_quarantined(tmp_path):
    (tmp_path / "zero.wav").touch()
    assert "0 bytes" in reason(tmp_path / "zero.wav")
    (tmp_path / "page.wav").write_text("\n<!DOCTYPE html><html>404</html>")
    assert "web page" in reason(tmp_path / "page.wav")
    (tmp_path / "noise.flac").write_bytes(b"fLaC" + bytes(range(256)))
    assert "cannot be decoded" in reason(tmp_path / "noise.flac")
    assert reason(tmp_path / "nothing.wav") == "the file does not exist"
    (tmp_path / "folder.wav").mkdir()
    assert "cannot be" in reason(tmp_path / "folder.wav")
    (tmp_path / "loop.wav").symlink_to(tmp_path / "loop.wav")
    assert "cannot be read: Too many levels" in reason(tmp_path / "loop.wav")


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.999])
def test_a_truncated_flac_is_quarantined(tmp_path, speech, part):
    soundfile.write(tmp_path / "a.flac", speech, 16_000)
    data = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(data[: int(len(data) * part)])
    assert "cannot be decoded" in reason(tmp_path / "a.flac") or "damaged" in reason(tmp_path / "a.flac")


def test_a_flipped_bit_in_a_flac_is_quarantined(tmp_path, speech):
    soundfile.write(tmp_path / "a.flac", speech, 16_000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[len(data) // 2] ^= 0x10
    (tmp_path / "a.flac").write_bytes(data)
    assert "cannot be decoded" in reason(tmp_path / "a.flac") or "damaged" in reason(tmp_path / "a.flac")


@pytest.mark.parametrize("form", ["WAV", "WAVEX", "RF64"])
@pytest.mark.parametrize("missing", [1, 2, 15_000])
def test_a_truncated_wav_is_quarantined_although_libsndfile_is_silent(tmp_path, speech, form, missing):
    path = tmp_path / "a.wav"
    soundfile.write(path, speech, 16_000, format=form)
    assert np.array_equal(decoded(path).wave, speech)
    path.write_bytes(path.read_bytes()[:-missing])
    assert len(soundfile.read(path)[0]) < 16_000  # no error
    assert "truncated" in reason(path)


def test_chunks_before_the_audio_are_walked_over(tmp_path, speech):
    soundfile.write(tmp_path / "a.wav", speech, 16_000)
    data = (tmp_path / "a.wav").read_bytes()
    odd = b"junk" + struct.pack("<I", 3) + b"abc\0"  # padded to an even size
    path = tmp_path / "b.wav"
    path.write_bytes(data[:4] + struct.pack("<I", len(data) - 8 + len(odd)) + data[8:12] + odd + data[12:])
    assert np.array_equal(decoded(path).wave, speech)


def test_a_big_endian_wav_is_read(tmp_path, speech):
    soundfile.write(tmp_path / "a.wav", speech, 16_000, endian="BIG")
    assert (tmp_path / "a.wav").read_bytes()[:4] == b"RIFX"
    assert np.array_equal(decoded(tmp_path / "a.wav").wave, speech)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_a_wav_that_was_piped_is_quarantined(tmp_path, speech, size):
    soundfile.write(tmp_path / "a.wav", speech, 16_000)
    data = bytearray((tmp_path / "a.wav").read_bytes())
    at = data.index(b"data") + 4
    data[at : at + 4] = struct.pack("<I", size)
    (tmp_path / "a.wav").write_bytes(data)
    assert "does not say how long it is" in reason(tmp_path / "a.wav")


def test_a_wav_without_audio_is_quarantined(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16_000)
    assert reason(tmp_path / "a.wav") == "the file holds no samples"
    (tmp_path / "b.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:36])
    assert reason(tmp_path / "b.wav") == "a WAV file without a data chunk"


@pytest.mark.parametrize(("samples", "rate", "fits"), [(399, 16_000, False), (400, 16_000, True), (199, 8_000, False)])
def test_what_is_shorter_than_a_frame_is_quarantined(tmp_path, samples, rate, fits):
    soundfile.write(tmp_path / "a.wav", np.zeros(samples), rate)
    assert isinstance(decode(tmp_path / "a.wav", PARAMS), Decoded if fits else Quarantine)


def test_a_long_recording_is_refused_by_its_header_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "bomb.flac"
    with soundfile.SoundFile(path, "w", 16_000, 1) as file:
        for _ in range(60):
            file.write(np.zeros(160_000, dtype=np.int16))
    assert path.stat().st_size < 100_000  # ten minutes
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("it was decoded"))
    assert reason(path) == "too long: 600.0 s, the setting max_sec is 5"


def test_decoding_that_ends_early_is_held_against_the_header(tmp_path, speech, monkeypatch):
    soundfile.write(tmp_path / "a.ogg", speech, 16_000)
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *a, **k: read(*a, **k)[:-5])
    assert "damaged: 15995 of the 16000 samples" in reason(tmp_path / "a.ogg")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_quarantined(tmp_path, speech):
    soundfile.write(tmp_path / "a.wav", speech, 16_000)
    (tmp_path / "a.wav").chmod(0)
    assert "Permission denied" in reason(tmp_path / "a.wav")


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "mp3"])
def test_a_part_of_a_file_is_what_slicing_the_whole_gives(tmp_path, suffix):
    path = tmp_path / f"long.{suffix}"
    soundfile.write(path, np.random.default_rng(0).normal(size=9 * 16_000) * 0.1, 16_000)  # longer than max_sec
    whole = to_int16(soundfile.read(path)[0])
    for start, end in ((0.0, 1.0), (2.0005, 3.25), (7.5, None)):
        result = decode(path, PARAMS, Part(start, end, None))
        assert isinstance(result, Decoded), result
        expected = whole[round(start * 16_000) : None if end is None else round(end * 16_000)]
        # MP3 is decoded from the frames before the part, which is exact to the last bit or two
        assert np.abs(result.wave.astype(int) - expected).max() <= (2 if suffix == "mp3" else 0)
        assert result.file_samples == 9 * 16_000


def test_a_part_may_be_one_channel_whatever_the_settings_do_with_channels(tmp_path, speech):
    path = tmp_path / "stereo.wav"
    soundfile.write(path, np.stack([speech, -speech], axis=1), 16_000)
    for channel, sign in ((0, 1), (1, -1)):
        result = decode(path, PARAMS.model_copy(update={"channels": "refuse"}), Part(0.0, None, channel))
        assert isinstance(result, Decoded)
        assert np.array_equal(result.wave, sign * speech)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (Part(0.5, 1.01, None), "its segment from 0.5 s to 1.01 s is not inside the 1 s of the file"),
        (Part(1.0, None, None), "its segment from 1 s to 1 s is not inside the 1 s of the file"),
        (Part(0.0, 1e308, None), "is not inside the 1 s of the file"),
        (Part(-0.5, 0.5, None), "its segment from -0.5 s to 0.5 s is not inside"),
        (Part(0.1, 0.12, None), "too short: 320 samples"),
        (Part(0.0, 1.0, 1), "its channel 1 is not among the 1 of the file, counted from 0"),
    ],
)
def test_a_part_that_the_file_does_not_have_is_quarantined(tmp_path, speech, part, message):
    soundfile.write(tmp_path / "a.wav", speech, 16_000)
    result = decode(tmp_path / "a.wav", PARAMS, part)
    assert isinstance(result, Quarantine)
    assert message in result.reason
