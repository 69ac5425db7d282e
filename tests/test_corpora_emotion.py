"""RAVDESS and IEMOCAP: miniatures in their own layouts, and the real RAVDESS where it is at hand."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cache.errors import DataError, SettingsError
from pipeline.audio import Quarantine
from pipeline.corpora.iemocap import IemocapParams, iemocap_items
from pipeline.corpora.ravdess import RavdessParams, ravdess_items
from tests.leak_fixtures import apart

SPEECH = Path(os.environ.get("DECANT_SPEECH", "../shared/speech")) / "RAVDESS"
FOUR = {"neu": "neutral", "hap": "happy", "exc": "happy", "ang": "angry", "sad": "sad"}


def ravdess(root, **changes) -> RavdessParams:
    values = {
        "kind": "ravdess",
        "root": str(root),
        "classes": {"neutral": "neutral", "calm": "neutral", "happy": "happy"},
        "folds": ((1, 2), (3,)),
        "dev": 0.2,
        "split": "test",
    }
    return RavdessParams.model_validate({**values, **changes})


def iemocap(root, **changes) -> IemocapParams:
    values = {"kind": "iemocap", "root": str(root), "classes": FOUR, "dev": 0.2, "split": "test"}
    return IemocapParams.model_validate({**values, **changes})


def write_wave(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.zeros(1_600), 16_000)


@pytest.fixture
def actors(tmp_path) -> Path:
    for actor in (1, 2, 3, 4):
        for emotion in ("01", "02", "03", "05"):
            write_wave(tmp_path / f"Actor_{actor:02d}" / f"03-01-{emotion}-01-02-01-{actor:02d}.wav")
    return tmp_path


@pytest.fixture
def sessions(tmp_path) -> Path:
    """A dialogue of six turns in each session; the fourth is frustrated, the sixth was said by the other speaker."""
    for session in range(1, 6):
        name = f"Ses0{session}F_impro01"
        turns = [f"{name}_F00{i}" for i in range(5)] + [f"{name}_M000"]
        codes = ["neu", "exc", "hap", "fru", "ang", "sad"]
        folder = tmp_path / f"Session{session}"
        labels = folder / "dialog" / "EmoEvaluation" / f"{name}.txt"
        words = folder / "dialog" / "transcriptions" / f"{name}.txt"
        labels.parent.mkdir(parents=True)
        words.parent.mkdir(parents=True)
        labels.write_text(
            "% [START_TIME - END_TIME] TURN_NAME EMOTION [V, A, D]\n\n"
            + "".join(
                f"[6.2901 - 8.2357]\t{t}\t{c}\t[2.5000, 2.5000, 2.5000]\nC-E2:\tNeutral;\t()\n\n"
                for t, c in zip(turns, codes, strict=True)
            )
        )
        words.write_text("".join(f"{t} [006.2901-008.2357]: Excuse me.\n" for t in turns) + "M: a note\n")
        for turn in turns:
            write_wave(folder / "sentences" / "wav" / name / f"{turn}.wav")
    return tmp_path


def reasons(items) -> dict[str, str]:
    return {i.id: i.audio.reason for i in items if isinstance(i.audio, Quarantine)}


def test_ravdess_labels_are_those_of_the_file_names(actors):
    items = {i.id: i for i in ravdess_items("r", ravdess(actors))}
    calm, angry = items["r/Actor_01/03-01-02-01-02-01-01"], items["r/Actor_01/03-01-05-01-02-01-01"]
    assert (calm.emotion, calm.speaker, calm.text) == ("neutral", "Actor_01", "DOGS ARE SITTING BY THE DOOR")
    assert (angry.emotion, angry.tasks, angry.split) == (None, {}, "test")
    assert calm.audio == actors / "Actor_01" / "03-01-02-01-02-01-01.wav"
    assert len(items) == 16


def test_ravdess_folds_keep_actors_apart_and_leave_out_those_of_no_fold(actors):
    items = [i for i in ravdess_items("r", ravdess(actors)) if i.tasks]
    test = {task: {i.speaker for i in items if i.tasks[task] == "test"} for task in ("er-1", "er-2")}
    assert test == {"er-1": {"Actor_01", "Actor_02"}, "er-2": {"Actor_03"}}
    for task, speakers in test.items():
        assert {i.tasks[task] for i in items if i.speaker in speakers} == {"test"}
    assert not {i.speaker for i in items} & {"Actor_04"}


def test_ravdess_names_that_do_not_fit_are_quarantined(actors):
    write_wave(actors / "Actor_01" / "03-02-01-01-01-01-01.wav")
    write_wave(actors / "Actor_01" / "03-01-01-01-01-01-02.wav")
    write_wave(actors / "Actor_01" / "03-01-09-01-01-01-01.wav")
    assert reasons(ravdess_items("r", ravdess(actors))) == {
        "r/Actor_01/03-02-01-01-01-01-01": "a song, by the second code of its name; only speech is read",
        "r/Actor_01/03-01-01-01-01-01-02": "its name says actor 02 and its folder Actor_01",
        "r/Actor_01/03-01-09-01-01-01-01": "its name is not seven codes of RAVDESS",
    }


def test_ravdess_settings_that_cannot_be_obeyed_are_named(actors, tmp_path_factory):
    with pytest.raises(SettingsError, match=r"sources\.r\.classes: 'joy' is no emotion of RAVDESS: neutral, calm"):
        list(ravdess_items("r", ravdess(actors, classes={"joy": "happy"})))
    with pytest.raises(SettingsError, match=r"sources\.r\.folds: actor 2 is there twice"):
        list(ravdess_items("r", ravdess(actors, folds=((1, 2), (2, 3)))))
    with pytest.raises(DataError, match="no recordings in Actor_NN/ folders"):
        list(ravdess_items("r", ravdess(tmp_path_factory.mktemp("empty"))))


def test_iemocap_has_four_classes_with_excitement_as_happiness(sessions):
    items = {i.id: i for i in iemocap_items("i", iemocap(sessions))}
    assert Counter(i.emotion for i in items.values()) == {"neutral": 5, "happy": 10, "angry": 5, "sad": 5, None: 5}
    first, frustrated = items["i/Ses02F_impro01_F001"], items["i/Ses02F_impro01_F003"]
    assert (first.text, first.speaker, first.emotion) == ("Excuse me.", "Ses02F", "happy")
    assert items["i/Ses02F_impro01_M000"].speaker == "Ses02M"
    assert first.path == "Session2/sentences/wav/Ses02F_impro01/Ses02F_impro01_F001.wav"
    assert (frustrated.tasks, frustrated.text) == ({}, "Excuse me.")


def test_iemocap_tests_each_session_once_on_speakers_never_heard(sessions):
    items = [i for i in iemocap_items("i", iemocap(sessions, dev=0.5)) if i.tasks]
    for fold in range(1, 6):
        task = f"er-{fold}"
        test = {i.speaker for i in items if i.tasks[task] == "test"}
        assert test == {f"Ses0{fold}F", f"Ses0{fold}M"}
        assert not test & {i.speaker for i in items if i.tasks[task] != "test"}
    assert {s for i in items for s in i.tasks.values()} == {"train", "dev", "test"}
    assert all(list(i.tasks.values()).count("test") == 1 for i in items)


def test_iemocap_turns_without_label_or_recording_are_quarantined(sessions):
    wavs = sessions / "Session1" / "sentences" / "wav" / "Ses01F_impro01"
    (wavs / "Ses01F_impro01_F000.wav").unlink()
    write_wave(wavs / "Ses01F_impro01_F009.wav")
    write_wave(wavs / "Ses01F_impro01_FXX0.wav")
    assert reasons(iemocap_items("i", iemocap(sessions))) == {
        "i/Ses01F_impro01_F000": "it stands in EmoEvaluation/Ses01F_impro01.txt, but there is no such file",
        "i/Ses01F_impro01_F009": "no label: it has no line in EmoEvaluation/Ses01F_impro01.txt",
        "i/Ses01F_impro01_FXX0": "its name is not that of a turn, so its speaker is not known",
    }


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1.0 - 2.0]\tSes01F_impro01_F001\tjoy\t[1, 1, 1]", r"line 1: the emotion of Ses01F_impro01_F001 is 'joy'"),
        ("[1.0 - 2.0] Ses01F_impro01_F001 neu", r"line 1: .* is not a time, a turn, an emotion and numbers"),
        ("\n".join(["[1.0 - 2.0]\tSes01F_impro01_F001\tneu\t[1, 1, 1]"] * 2), r"line 2: .*_F001 is there twice"),
    ],
)
def test_iemocap_labels_that_cannot_be_read_are_named_with_their_line(sessions, line, message):
    (sessions / "Session1" / "dialog" / "EmoEvaluation" / "Ses01F_impro01.txt").write_text(line)
    with pytest.raises(DataError, match=message):
        list(iemocap_items("i", iemocap(sessions)))


def test_iemocap_parts_that_are_missing_are_named(sessions, tmp_path_factory):
    with pytest.raises(SettingsError, match=r"classes: 'happy' is no code of IEMOCAP: neu, hap"):
        list(iemocap_items("i", iemocap(sessions, classes={"happy": "happy"})))
    labels = sessions / "Session5" / "dialog" / "EmoEvaluation" / "Ses05F_impro01.txt"
    labels.unlink()
    with pytest.raises(DataError, match=r"there is no .*Ses05F_impro01\.txt, so the emotions of its dialogue"):
        list(iemocap_items("i", iemocap(sessions)))
    labels.symlink_to(tmp_path_factory.mktemp("elsewhere"))
    with pytest.raises(DataError, match=r"a link that leads out of the corpus"):
        list(iemocap_items("i", iemocap(sessions)))
    (sessions / "Session5").rename(sessions / "Session6")
    with pytest.raises(DataError, match=r"has no Session5, but Session1, .*five sessions"):
        list(iemocap_items("i", iemocap(sessions)))


@pytest.mark.skipif(not SPEECH.is_dir(), reason="no real RAVDESS; set DECANT_SPEECH")
def test_the_real_ravdess_reads_whole_with_every_emotion_in_every_split():
    folds = ((1, 2, 3), (4, 5, 6), (7, 8, 9), (10, 11, 12), (13, 14, 15, 16))
    emotions = ("neutral", "calm", "happy", "sad", "angry", "fearful", "disgust", "surprised")
    items = list(ravdess_items("r", ravdess(SPEECH, folds=folds, classes={e: e for e in emotions})))
    assert not reasons(items)
    # 16 actors, 30 recordings each: two of neutral, four of each of the others
    assert Counter(i.emotion for i in items) == {e: 32 if e == "neutral" else 64 for e in emotions}
    for fold in range(1, 6):
        for split in ("train", "dev", "test"):
            assert {i.emotion for i in items if i.tasks[f"er-{fold}"] == split} == set(emotions)


def test_folds_of_both_corpora_leak_nothing_and_pretraining_hears_none_of_them(actors, sessions):
    for items in (ravdess_items("r", ravdess(actors)), iemocap_items("i", iemocap(sessions))):
        manifest, leaks = apart(items, {"er"})
        assert leaks == []
        assert {u.split for u in manifest} == {"test"}
    heard, leaks = apart(ravdess_items("r", ravdess(actors, split="train")), {"er"})
    assert {leak.task for leak in leaks} == {"pretraining"}
    in_a_fold = {u.speaker for u in heard if u.tasks}
    assert {u.split for u in heard if u.speaker in in_a_fold} == {"test"}
    assert {u.split for u in heard if u.speaker not in in_a_fold} == {"train"}


def test_a_session_of_iemocap_is_the_test_whole(sessions):
    manifest, _ = apart(iemocap_items("i", iemocap(sessions)), {"er"})
    for fold in range(1, 6):
        on_test = {u.path.split("/")[0] for u in manifest if u.tasks.get(f"er-{fold}") == "test"}
        assert on_test == {f"Session{fold}"}
        assert not on_test & {u.path.split("/")[0] for u in manifest if u.tasks.get(f"er-{fold}") in ("train", "dev")}


@pytest.mark.skipif(not SPEECH.is_dir(), reason="no real RAVDESS; set DECANT_SPEECH")
def test_the_real_ravdess_leaks_nothing():
    folds = ((1, 2, 3, 4), (5, 6, 7, 8), (9, 10, 11, 12), (13, 14, 15, 16))
    items = ravdess_items("r", ravdess(SPEECH, folds=folds, classes={"happy": "happy", "sad": "sad", "angry": "angry"}))
    _, leaks = apart(items, {"er"}, decoded=True)
    assert leaks == []
