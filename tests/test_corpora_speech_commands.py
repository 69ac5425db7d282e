"""Speech Commands' folders: a miniature made here, and the real ones where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cache.errors import DataError
from pipeline.audio import Quarantine
from pipeline.corpora.drawn import DrawnTrials, TrialCounts, draw_trials
from pipeline.corpora.speech_commands import SpeechCommandsParams, speech_commands_items, which_set
from tests.leak_fixtures import apart, manifest_of

SPEECH = Path(os.environ.get("DECANT_SPEECH", "../shared/speech")) / "SpeechCommands" / "speech_commands_v0.01"

# from testing_list.txt and validation_list.txt of the data set
OFFICIAL_TEST = [
    "2aa787cf",
    "ffa76c4a",
    "24ad3ebe",
    "d7467392",
    "5828dfa2",
    "91223b83",
    "f0ae7203",
    "95ba4996",
    "94de6a6a",
    "caf9fceb",
]
OFFICIAL_DEV = [
    "8b775397",
    "2643992f",
    "060cd039",
    "f5e5e8b0",
    "dbb40d24",
    "d57febf0",
    "16db1582",
    "171b56dc",
    "66cff190",
    "22aa3665",
]


def params(root, words=None, validation=10.0, testing=10.0, sv=None) -> SpeechCommandsParams:
    return SpeechCommandsParams(
        kind="speech_commands",
        root=str(root),
        words=words,
        validation_percentage=validation,
        testing_percentage=testing,
        sv=sv,
    )


@pytest.fixture
def root(tmp_path) -> Path:
    for word in ("up", "down", "_background_noise_"):
        (tmp_path / word).mkdir()
        for speaker in (OFFICIAL_TEST[0], OFFICIAL_DEV[0], "0a7c2a8d"):
            for number in (0, 1):
                suffix = "wav" if number else "flac"
                soundfile.write(tmp_path / word / f"{speaker}_nohash_{number}.{suffix}", np.zeros(1_600), 16_000)
    (tmp_path / "testing_list.txt").write_text("up/x\n")
    return tmp_path


def test_speakers_fall_into_the_official_splits():
    assert {which_set(s, 10.0, 10.0) for s in OFFICIAL_TEST} == {"test"}
    assert {which_set(s, 10.0, 10.0) for s in OFFICIAL_DEV} == {"dev"}


def test_the_percentages_hold_on_average():
    splits = [which_set(f"{i:08x}", 20.0, 30.0) for i in range(4_000)]
    assert splits.count("dev") / 4_000 == pytest.approx(0.2, abs=0.02)
    assert splits.count("test") / 4_000 == pytest.approx(0.3, abs=0.02)


def test_a_miniature_gives_keywords_speakers_and_splits(root):
    items = list(speech_commands_items("sc", params(root)))
    assert [i.id for i in items[:2]] == ["sc/down/0a7c2a8d_nohash_0", "sc/down/0a7c2a8d_nohash_1"]
    assert {i.keyword for i in items} == {"down", "up"}
    assert all(i.text == i.keyword and i.tasks == {"kws": i.split} for i in items)
    assert {i.speaker: i.split for i in items} == {
        OFFICIAL_TEST[0]: "test",
        OFFICIAL_DEV[0]: "dev",
        "0a7c2a8d": "train",
    }
    assert len(items) == 12
    assert {i.keyword for i in speech_commands_items("sc", params(root, words=("up",)))} == {"up"}


def test_names_and_links_that_do_not_fit_are_quarantined(root):
    soundfile.write(root / "up" / "recording.wav", np.zeros(1_600), 16_000)
    (root / "up" / "aaaaaaaa_nohash_0.wav").symlink_to("/dev/null")
    bad = {i.id: i.audio.reason for i in speech_commands_items("sc", params(root)) if isinstance(i.audio, Quarantine)}
    assert "not SPEAKER_nohash_NUMBER" in bad["sc/up/recording"]
    assert "leads out of the corpus" in bad["sc/up/aaaaaaaa_nohash_0"]
    assert len(bad) == 2


def test_folders_that_are_missing_are_named_with_the_way_out(root, tmp_path_factory):
    with pytest.raises(DataError, match="no word 'left', but down, up; correct prepare.sources.sc.words"):
        list(speech_commands_items("sc", params(root, words=("up", "left"))))
    with pytest.raises(DataError, match="no recordings in folders named by their word"):
        list(speech_commands_items("sc", params(tmp_path_factory.mktemp("empty"))))


@pytest.mark.skipif(not SPEECH.is_dir(), reason="no real Speech Commands; set DECANT_SPEECH")
def test_the_real_corpus_reads_whole_and_keeps_speakers_apart():
    items = list(speech_commands_items("sc", params(SPEECH, validation=20, testing=25)))
    assert not [i for i in items if isinstance(i.audio, Quarantine)]
    assert len({i.id for i in items}) == len(items) >= 500
    speakers = [{i.speaker for i in items if i.split == split} for split in ("train", "dev", "test")]
    assert all(speakers)
    assert len(set.union(*speakers)) == sum(map(len, speakers))


def some(same: int, different: int) -> DrawnTrials:
    counts = TrialCounts(same=same, different=different)
    return DrawnTrials(dev=counts, test=counts)


def test_verification_compares_different_words_of_speakers_nobody_trained_on(root):
    for speaker in (OFFICIAL_TEST[1], OFFICIAL_DEV[1]):
        for word in ("up", "down"):
            soundfile.write(root / word / f"{speaker}_nohash_0.wav", np.zeros(1_600), 16_000)
    trials = some(4, 2)
    manifest, leaks = apart(speech_commands_items("sc", params(root, sv=trials)), {"kws", "sv"})
    assert leaks == []
    drawn = draw_trials("sc", manifest, trials)
    assert [t.list for t in drawn] == ["sc/dev"] * 6 + ["sc/test"] * 6
    for trial in drawn:
        first, second = manifest.by_id[trial.first], manifest.by_id[trial.second]
        assert first.text != second.text
        assert first.tasks["sv"] == second.tasks["sv"] == trial.list.split("/")[1]
    with pytest.raises(DataError, match=r"sc/dev: 6 utterances of 2 speakers give 5 trials, and .*sv\.dev\.same is 6"):
        draw_trials("sc", manifest_of(speech_commands_items("sc", params(root, sv=trials))), some(6, 1))


@pytest.mark.skipif(not SPEECH.is_dir(), reason="no real Speech Commands; set DECANT_SPEECH")
def test_the_real_corpus_leaks_nothing_and_gives_trials():
    settings = params(SPEECH, validation=20, testing=25, sv=some(150, 300))
    manifest, leaks = apart(speech_commands_items("sc", settings), {"kws", "sv"}, decoded=True)
    assert leaks == []
    assert len(draw_trials("sc", manifest, settings.sv)) == 900
