"""VoxCeleb1's folders and lists, in miniature; and trials from a list to a file and back."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from typer.testing import CliRunner

from cache.errors import DataError
from cache.manifest import read_manifest
from pipeline.audio import Quarantine
from pipeline.corpora.drawn import DrawnTrials, TrialCounts, draw_trials
from pipeline.corpora.trials import Trial, keep_known, read_list, read_trials, write_trials
from pipeline.corpora.voxceleb import VoxCeleb1Params, video_of, voxceleb1_items, voxceleb1_trials
from stages.prepare import app
from tests.leak_fixtures import apart

DEV, TEST = ("id10001", "id10002", "id11251"), ("id10270", "id10309")
TRIALS = """1 id10270/aaa/00001.wav id10270/bbb/00001.wav
0 id10270/aaa/00001.wav id10309/aaa/00001.wav
1 id10309/aaa/00001.wav id10309/bbb/00002.wav
0 id10309/bbb/00002.wav id10270/bbb/00001.wav
"""


def params(root, **changes) -> VoxCeleb1Params:
    values = {
        "kind": "voxceleb1",
        "root": str(root),
        "folders": ("dev/wav", "test/wav"),
        "iden_split": "iden_split.txt",
        "trials": {"o": "veri_test.txt"},
        "dev_speakers": 0.0,
        "sv": None,
    }
    return VoxCeleb1Params.model_validate({**values, **changes})


@pytest.fixture
def root(tmp_path) -> Path:
    """Five speakers in two folders, two videos each of two recordings; one in four is test of identification."""
    rng = np.random.default_rng(0)
    lines = []
    for folder, speakers in (("dev/wav", DEV), ("test/wav", TEST)):
        for speaker in speakers:
            for video in ("aaa", "bbb"):
                for number, code in (("00001", 1), ("00002", 3 if video == "bbb" else 2)):
                    file = tmp_path / "vox" / folder / speaker / video / f"{number}.wav"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    soundfile.write(file, rng.normal(size=1_600) * 0.1, 16_000)
                    lines.append(f"{code} {speaker}/{video}/{number}.wav\n")
    (tmp_path / "vox" / "iden_split.txt").write_text("".join(lines))
    (tmp_path / "vox" / "veri_test.txt").write_text(TRIALS)
    return tmp_path / "vox"


def by_id(root, **changes):
    return {i.id: i for i in voxceleb1_items("v", params(root, **changes))}


def test_identification_knows_every_speaker_in_every_split_as_the_list_says(root):
    items = by_id(root)
    assert items["v/id10001/aaa/00001"].tasks["sid"] == "train"
    assert items["v/id10001/aaa/00002"].tasks["sid"] == "dev"
    assert items["v/id10309/bbb/00002"].tasks["sid"] == "test"
    assert items["v/id10309/bbb/00002"].path == "test/wav/id10309/bbb/00002.wav"
    for split in ("train", "dev", "test"):
        assert {i.speaker for i in items.values() if i.tasks["sid"] == split} == {*DEV, *TEST}
    assert len(items) == 20


@pytest.mark.parametrize("suffix", [".flac", ".WAV", ".ogg"])
def test_recordings_in_another_format_are_those_of_the_lists(root, suffix):
    before = by_id(root)
    for file in root.glob("*/wav/*/*/*.wav"):
        samples, rate_hz = soundfile.read(file)
        file.unlink()
        soundfile.write(file.with_suffix(suffix), samples, rate_hz)
    items = by_id(root)
    assert {i.path for i in items.values()} == {i.path.replace(".wav", suffix) for i in before.values()}
    assert all(i.audio == root / i.path for i in items.values())
    assert {name: (i.split, i.tasks) for name, i in items.items()} == {n: (i.split, i.tasks) for n, i in before.items()}


def test_a_recording_in_two_formats_is_refused(root):
    file = root / "dev/wav/id10001/aaa/00001.flac"
    soundfile.write(file, np.zeros(1_600), 16_000)
    with pytest.raises(DataError, match=r"id10001/aaa/00001 is there twice: .*00001.flac and .*00001.wav; remove one"):
        by_id(root)


def test_verification_is_tested_on_the_recordings_of_the_trials_by_speakers_never_heard(root):
    items = by_id(root).values()
    assert {i.speaker for i in items if i.split == "test"} == set(TEST)
    assert {i.speaker for i in items if i.tasks.get("sv") == "train"} == set(DEV)
    assert {i.id for i in items if i.tasks.get("sv") == "test"} == {
        "v/id10270/aaa/00001",
        "v/id10270/bbb/00001",
        "v/id10309/aaa/00001",
        "v/id10309/bbb/00002",
    }


def test_dev_speakers_are_held_out_whole_and_a_source_may_have_no_lists(root):
    items = by_id(root, dev_speakers=0.5, trials={}, iden_split=None).values()
    of = {speaker: {i.split for i in items if i.speaker == speaker} for speaker in (*DEV, *TEST)}
    assert all(len(splits) == 1 for splits in of.values())
    assert set.union(*of.values()) == {"train", "dev"}
    assert not any(i.tasks for i in items)


def test_recordings_that_do_not_fit_are_quarantined(root):
    (root / "test/wav/id10309/aaa/00001.wav").unlink()
    soundfile.write(root / "dev/wav/id10001/aaa/extra.wav", np.zeros(1_600), 16_000)
    (root / "dev/wav/id10001/aaa/00009.wav").symlink_to("/dev/null")
    reasons = {i.id: i.audio.reason for i in by_id(root).values() if isinstance(i.audio, Quarantine)}
    assert reasons == {
        "v/id10309/aaa/00001": "a list names it, but there is no such file in the folders",
        "v/id10001/aaa/extra": "its path is not idNNNNN/VIDEO/NUMBER, so its speaker is not known",
        "v/id10001/aaa/00009": "a link that leads out of the corpus; copy the file, or take the folder it is in as root",
    }


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("iden_split.txt", "4 id10001/aaa/00001.wav", r"iden_split.txt, line 21: '4 id.*' is not 1, 2 or 3 and"),
        ("iden_split.txt", "1 ../id10001/aaa/00001.wav", r"line 21: .* is not 1, 2 or 3 and"),
        ("iden_split.txt", "1 id10001/aaa/00001.wav", r"line 21: id10001/aaa/00001.wav is there twice"),
        ("veri_test.txt", "1 id10270/aaa/00001.wav", r"line 5: .* is not `0` or `1` and two paths"),
        ("veri_test.txt", "2 id10270/aaa/00001.wav id10270/aaa/00001.wav", r"line 5: .* is not `0` or `1`"),
        ("veri_test.txt", "1 id10270/aaa/00001.wav ../../secret.wav", r"line 5: .*'../../secret.wav' leads outside"),
        ("veri_test.txt", "1 id10270/aaa/00001.wav /etc/secret.wav", r"line 5: .*'/etc/secret.wav' leads outside"),
        ("veri_test.txt", "1 id10270/aaa/00001.wav id10270/00001.wav", r"line 5: 'id10270/00001.wav' is not idNNNNN"),
        ("veri_test.txt", "1 id10270/aaa/00001.wav id10309/aaa/00001.wav", r"line 5: its answer 1 contradicts"),
        ("veri_test.txt", "1 id10270/aaa/00001.wav id10270/aaa/00001.wav", r"line 5: .* compared with itself"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(root, file, line, message):
    with open(root / file, "a") as lines:
        lines.write(line + "\n")
    with pytest.raises(DataError, match=message):
        by_id(root)


def test_lists_and_folders_that_are_missing_are_named(root):
    with pytest.raises(DataError, match=r"sources\.v\.trials\.o: there is no file .*veri_test2.txt"):
        by_id(root, trials={"o": "veri_test2.txt"})
    with pytest.raises(DataError, match=r"sources\.v\.iden_split: the path '../iden_split.txt' leads outside"):
        by_id(root, iden_split="../iden_split.txt")
    with pytest.raises(DataError, match=r"has no folder 'wav', but dev, test"):
        by_id(root, folders=("wav",))
    with pytest.raises(DataError, match=r"id10001/aaa/00001 is there twice: .*; remove one"):
        by_id(root, folders=("dev/wav", "dev/wav"))
    (root / "veri_test.txt").write_text(TRIALS.splitlines()[0])
    with pytest.raises(DataError, match=r"veri_test.txt needs trials of both kinds"):
        by_id(root)


def test_trials_speak_the_words_of_the_manifest(root):
    trials = list(voxceleb1_trials("v", params(root)))
    assert trials[1] == Trial("v/o", False, "v/id10270/aaa/00001", "v/id10309/aaa/00001")
    assert [t.same for t in trials] == [True, False, True, False]
    assert {u for t in trials for u in t[2:]} <= set(by_id(root))


def test_trials_of_quarantined_recordings_are_left_out_and_counted(root):
    trials = list(voxceleb1_trials("v", params(root)))
    ids = set(by_id(root)) - {"v/id10309/aaa/00001"}
    kept = keep_known(trials, ids)
    assert (len(kept.trials), kept.left_out) == (2, 2)
    with pytest.raises(DataError, match=r"trials of v/o cannot be scored"):
        keep_known(trials, ids - {"v/id10309/bbb/00002"})


def test_trials_come_back_as_they_were_written_or_are_refused(tmp_path):
    trials = (Trial("v/ö", True, "v/a", "v/b"), Trial("v/ö", False, "v/a", "v/c"))
    file = tmp_path / "trials.jsonl"
    write_trials(file, trials)
    assert read_trials(file, {"v/a", "v/b", "v/c"}) == trials
    with pytest.raises(DataError, match=r"line 2: v/c is not in the manifest"):
        read_trials(file, {"v/a", "v/b"})
    write_trials(file, ())
    assert read_trials(file, set()) == ()
    for text, message in (
        ("{", "not a JSON object"),
        ('{"same": 1}', "a trial has the keys list, same, first, second"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=message):
            read_trials(file, set())
    with pytest.raises(DataError, match="write it with `decant prepare --trials"):
        read_trials(tmp_path / "none", set())


def test_the_command_writes_the_trials_beside_the_manifest(root, tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    (root / "test/wav/id10309/aaa/00001.wav").write_bytes(b"")
    audio = {"max_sec": 10, "channels": "mean", "rate": "resample"}
    values = {
        "sources": {"v": params(root).model_dump(mode="json")},
        "audio": audio,
        "max_bad_fraction": 0.1,
        "workers": 1,
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"prepare": values}))
    places = {"out": "m.jsonl", "waves": "w.json", "quarantine": "q.json", "trials": "t.jsonl", "params": "params.yaml"}
    options = [f"--{name}={tmp_path / place}" for name, place in places.items()]
    done = CliRunner().invoke(app, options, catch_exceptions=False)
    manifest = read_manifest(tmp_path / "m.jsonl")
    assert [t.same for t in read_trials(tmp_path / "t.jsonl", manifest.by_id)] == [True, False]
    assert "trials: 2, 2 left out for a quarantined recording; " in done.stdout


REAL = Path(os.environ.get("DECANT_SPEECH", "../shared/speech")) / "LibriSpeech" / "sv_trials.txt"


@pytest.mark.skipif(not REAL.is_file(), reason="no real list of trials; set DECANT_SPEECH")
def test_a_real_list_of_trials_reads_whole():
    trials = read_list(REAL)
    assert [sum(t.same == same for t in trials) for same in (True, False)] == [1_000, 1_000]
    assert all((t.first.split("/")[2] == t.second.split("/")[2]) == t.same for t in trials)


def test_dev_trials_are_drawn_from_dev_speakers_of_different_videos_and_the_official_test_stays(root):
    dev = DrawnTrials(dev=TrialCounts(same=8, different=4), test=None)
    settings = params(root, dev_speakers=0.5, sv=dev)
    manifest, leaks = apart(voxceleb1_items("v", settings), {"sv", "sid"})
    assert leaks == []
    split = {u.speaker: u.tasks["sv"] for u in manifest if "sv" in u.tasks}
    assert {s for s, side in split.items() if side == "test"} == set(TEST)
    of = Counter(split.values())
    assert of["train"] >= 1
    assert of["dev"] == 2, "speakers fall by their hash"
    drawn = draw_trials("v", manifest, dev, scene=video_of)
    official = list(voxceleb1_trials("v", settings))
    for name, rows, side in (("v/dev", drawn, "dev"), ("v/o", official, "test")):
        assert {t.list for t in rows} == {name}
        assert {manifest.by_id[u].tasks["sv"] for t in rows for u in (t.first, t.second)} == {side}
    same = [t for t in drawn if t.same]
    assert len(same) == 8
    assert all(t.first.split("/")[1] == t.second.split("/")[1] for t in same)
    assert all(t.first.split("/")[2] != t.second.split("/")[2] for t in same)
