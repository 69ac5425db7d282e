"""LibriSpeech's folders: a miniature made here, and the real ones where they are at hand."""

import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from cache.errors import DataError, SettingsError
from pipeline.audio import Quarantine
from pipeline.corpora.drawn import DrawnTrials, TrialCounts, draw_trials
from pipeline.corpora.lexicon import LexiconParams, pronounced, read_lexicon
from pipeline.corpora.librispeech import LibriSpeechParams, librispeech_items
from pipeline.corpora.splits import Fractions, WithinSpeakers
from tests.leak_fixtures import apart

SPEECH = Path(os.environ.get("DECANT_SPEECH", "../shared/speech"))
SID = WithinSpeakers(min_utterances=3, held_back=Fractions(dev=0.2, test=0.2))


def params(
    root, subsets=("train-clean-100", "test-clean"), dev_speakers=0.0, sid=SID, lexicon=None, asr=False, sv=None
):
    return LibriSpeechParams(
        kind="librispeech",
        root=str(root),
        subsets=subsets,
        dev_speakers=dev_speakers,
        sid=sid,
        lexicon=lexicon,
        asr=asr,
        sv=sv,
    )


def add_chapter(root: Path, subset: str, speaker: str, chapter: str, count: int, suffix: str = "flac") -> Path:
    folder = root / subset / speaker / chapter
    folder.mkdir(parents=True)
    lines = []
    for i in range(count):
        name = f"{speaker}-{chapter}-{i:04d}"
        soundfile.write(folder / f"{name}.{suffix}", np.zeros(1_600), 16_000)
        lines.append(f"{name} WORDS OF {name}")
    (folder / f"{speaker}-{chapter}.trans.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    add_chapter(tmp_path, "train-clean-100", "19", "198", 4)
    add_chapter(tmp_path, "train-clean-100", "19", "227", 2, "wav")
    add_chapter(tmp_path, "train-clean-100", "26", "495", 1)
    add_chapter(tmp_path, "test-clean", "1089", "134686", 5)
    (tmp_path / "SPEAKERS.TXT").write_text(";ID |SEX\n")
    return tmp_path


def test_a_miniature_gives_transcripts_speakers_and_official_splits(root):
    items = list(librispeech_items("ls", params(root)))
    assert [i.id for i in items][:5] == [f"ls/train-clean-100/19-198-000{i}" for i in range(4)] + [
        "ls/train-clean-100/19-227-0000"
    ]
    assert items[0].path == "train-clean-100/19/198/19-198-0000.flac"
    assert (items[4].path, items[4].text) == ("train-clean-100/19/227/19-227-0000.wav", "WORDS OF 19-227-0000")
    assert items[0].audio == root / items[0].path
    assert {i.speaker: i.split for i in items} == {"19": "train", "26": "train", "1089": "test"}
    assert len(items) == 12


def test_speaker_identification_shares_out_the_utterances_of_speakers_who_have_enough(root):
    items = list(librispeech_items("ls", params(root)))
    of = {s: sorted(i.tasks.get("sid", "-") for i in items if i.speaker == s) for s in ("19", "26", "1089")}
    assert of == {
        "19": ["dev", "test", *["train"] * 4],
        "26": ["-"],
        "1089": ["dev", "test", "train", "train", "train"],
    }
    assert not any(i.tasks for i in librispeech_items("ls", params(root, sid=None)))


def test_dev_speakers_are_held_out_whole(tmp_path):
    for speaker in range(60):
        add_chapter(tmp_path, "train-clean-100", str(speaker), "1", 2)
    items = list(librispeech_items("ls", params(tmp_path, ("train-clean-100",), dev_speakers=0.3)))
    splits = {speaker: {i.split for i in items if i.speaker == speaker} for speaker in {i.speaker for i in items}}
    assert all(len(s) == 1 for s in splits.values())
    assert 8 <= sum(s == {"dev"} for s in splits.values()) <= 28


def test_what_does_not_fit_is_quarantined_by_name(root):
    chapter = root / "test-clean" / "1089" / "134686"
    (chapter / "1089-134686-0000.flac").unlink()
    soundfile.write(chapter / "1089-134686-0099.flac", np.zeros(1_600), 16_000)
    outside = root.parent / f"{root.name}-outside.flac"
    soundfile.write(outside, np.zeros(1_600), 16_000)
    (chapter / "1089-134686-0001.flac").unlink()
    (chapter / "1089-134686-0001.flac").symlink_to(outside)
    (root / "test-clean" / "7" / "8").mkdir(parents=True)
    soundfile.write(root / "test-clean" / "7" / "8" / "7-8-0000.wav", np.zeros(1_600), 16_000)
    found = {i.id.split("/")[-1]: i.audio for i in librispeech_items("ls", params(root, ("test-clean",)))}
    reasons = {name: audio.reason for name, audio in found.items() if isinstance(audio, Quarantine)}
    assert reasons == {
        "1089-134686-0000": "it stands in 1089-134686.trans.txt, but there is no such file",
        "1089-134686-0099": "no transcript: it has no line in 1089-134686.trans.txt",
        "1089-134686-0001": "a link that leads out of the corpus; copy the file, or take the folder it is in as root",
        "7-8-0000": "no transcript: there is no 7-8.trans.txt",
    }


def test_an_utterance_in_two_formats_is_refused(root):
    soundfile.write(root / "train-clean-100" / "19" / "198" / "19-198-0002.wav", np.zeros(1_600), 16_000)
    with pytest.raises(DataError, match=r"19-198-0002 is there twice: .*0002\.flac and .*0002\.wav; remove one"):
        list(librispeech_items("ls", params(root)))


def test_a_name_that_is_not_text_is_quarantined(root):
    chapter = root / "test-clean" / "1089" / "134686"
    (chapter / "1089-134686-0000.flac").rename(os.fsdecode(os.fsencode(chapter) + b"/1089-134686-\xff.flac"))
    item = next(i for i in librispeech_items("ls", params(root, ("test-clean",))) if "xff" in i.id)
    assert isinstance(item.audio, Quarantine)
    assert "not UTF-8" in item.audio.reason
    assert item.path == "test-clean/1089/134686/1089-134686-\\xff.flac"


def test_a_transcript_that_leads_out_of_the_corpus_is_not_read(root, tmp_path_factory):
    secret = tmp_path_factory.mktemp("elsewhere") / "secret"
    secret.write_text("a-secret\n")
    file = root / "test-clean" / "1089" / "134686" / "1089-134686.trans.txt"
    file.unlink()
    file.symlink_to(secret)
    with pytest.raises(DataError, match=r"trans\.txt is a link that leads out of the corpus"):
        list(librispeech_items("ls", params(root, ("test-clean",))))


def test_a_speaker_whose_folder_is_not_text_is_quarantined(root):
    (root / "test-clean" / "1089").rename(os.fsdecode(os.fsencode(root) + b"/test-clean/\xfe"))
    items = list(librispeech_items("ls", params(root, ("test-clean",))))
    assert len(items) == 5
    assert all(isinstance(i.audio, Quarantine) and i.path.startswith("test-clean/\\xfe/") for i in items)


def test_links_in_a_circle_end_and_links_inside_are_followed(root):
    (root / "test-clean" / "loop").symlink_to(root / "test-clean", target_is_directory=True)
    chapter = root / "test-clean" / "1089" / "134686"
    (chapter / "1089-134686-0000.flac").rename(chapter / "kept.bin")
    (chapter / "1089-134686-0000.flac").symlink_to(chapter / "kept.bin")
    items = list(librispeech_items("ls", params(root, ("test-clean",))))
    assert next(i for i in items if i.id.endswith("1089-134686-0000")).audio == chapter / "1089-134686-0000.flac"


def test_windows_line_ends_are_read(root):
    file = root / "test-clean" / "1089" / "134686" / "1089-134686.trans.txt"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert next(librispeech_items("ls", params(root, ("test-clean",)))).text == "WORDS OF 1089-134686-0000"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1089-134686-0000", "line 2: '1089-134686-0000' is not a name and words"),
        ("../../../etc/x WORDS", "is not a name and words"),
        ("1089-134686-0001 AGAIN", "1089-134686-0001 is there twice"),
    ],
)
def test_a_transcript_that_cannot_be_read_is_named_with_its_line(root, line, message):
    file = root / "test-clean" / "1089" / "134686" / "1089-134686.trans.txt"
    file.write_text(f"1089-134686-0001 WORDS\n{line}\n")
    with pytest.raises(DataError, match=message):
        list(librispeech_items("ls", params(root, ("test-clean",))))


def test_a_transcript_that_is_not_utf_8_is_named(root):
    file = root / "test-clean" / "1089" / "134686" / "1089-134686.trans.txt"
    file.write_bytes(b"1089-134686-0001 CAF\xc9\n")
    with pytest.raises(DataError, match=r"trans\.txt is not UTF-8"):
        list(librispeech_items("ls", params(root, ("test-clean",))))


def test_folders_that_are_missing_are_named_with_the_way_out(root, monkeypatch):
    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    with pytest.raises(DataError, match=r"sources\.ls\.root .* NO_SUCH_VARIABLE is not set; .*export"):
        list(librispeech_items("ls", params("$NO_SUCH_VARIABLE/LibriSpeech")))
    with pytest.raises(SettingsError, match=r"write the variable without braces, \$NAME/folder"):
        list(librispeech_items("ls", params("${NO_SUCH_VARIABLE}/LibriSpeech")))
    with pytest.raises(DataError, match="there is no folder .*nowhere"):
        list(librispeech_items("ls", params(root / "nowhere")))
    with pytest.raises(DataError, match="no subset 'dev-clean', but test-clean, train-clean-100"):
        list(librispeech_items("ls", params(root, ("test-clean", "dev-clean"))))
    with pytest.raises(DataError, match="'clean' does not begin with train-, dev- or test-"):
        list(librispeech_items("ls", params(root, ("clean",))))
    (root / "dev-clean").mkdir()
    with pytest.raises(DataError, match="dev-clean has no recordings"):
        list(librispeech_items("ls", params(root, ("dev-clean",))))


def test_a_variable_of_the_environment_is_filled_in(root, monkeypatch):
    monkeypatch.setenv("SOME_CORPORA", str(root.parent))
    assert len(list(librispeech_items("ls", params(f"$SOME_CORPORA/{root.name}")))) == 12


CMUDICT = """;;; after CMUdict
WORDS W ER1 D Z
of AH1 V
of(2) AH0 V
two T UW1 # the number
# nothing
"""


def lexicon_of(tmp_path, text=CMUDICT, stress="keep") -> LexiconParams:
    (tmp_path / "words.dict").write_text(text)
    return LexiconParams(path=str(tmp_path / "words.dict"), stress=stress)


def test_a_lexicon_gives_the_first_pronunciation_in_any_case(tmp_path):
    assert read_lexicon("ls", lexicon_of(tmp_path)) == {"WORDS": "W ER1 D Z", "OF": "AH1 V", "TWO": "T UW1"}
    assert read_lexicon("ls", lexicon_of(tmp_path, stress="drop"))["TWO"] == "T UW"
    openslr = "A\tAH0\nA\tEY1\nA''S\tEY1 Z\n"
    assert read_lexicon("ls", lexicon_of(tmp_path, openslr)) == {"A": "AH0", "A''S": "EY1 Z"}


@pytest.mark.parametrize(
    ("text", "phones"), [("WORDS OF", "W ER1 D Z AH1 V"), ("words UNKNOWN", None), ("", None), (None, None)]
)
def test_a_transcript_is_pronounced_whole_or_not_at_all(tmp_path, text, phones):
    assert pronounced(text, read_lexicon("ls", lexicon_of(tmp_path))) == phones


def test_utterances_of_known_words_take_part_in_phone_recognition_in_the_official_splits(root, tmp_path_factory):
    file = root / "test-clean" / "1089" / "134686" / "1089-134686.trans.txt"
    file.write_text("1089-134686-0000 TWO WORDS\n1089-134686-0001 TWO NAMES\n")
    lexicon = lexicon_of(tmp_path_factory.mktemp("lexicon"), CMUDICT + "19-198-0001 AA1\n")
    items = {i.id.split("/")[-1]: i for i in librispeech_items("ls", params(root, lexicon=lexicon))}
    assert {name: i.tasks["pr"] for name, i in items.items() if "pr" in i.tasks} == {
        "19-198-0001": "train",
        "1089-134686-0000": "test",
    }
    assert items["1089-134686-0000"].pronunciation == "T UW1 W ER1 D Z"
    assert items["1089-134686-0001"].pronunciation is None


@pytest.mark.parametrize(
    ("text", "message"), [("TWO", "'TWO' is not a word and its phones"), (None, "there is no file .*words.dict")]
)
def test_a_lexicon_that_cannot_be_read_is_named(root, tmp_path, text, message):
    lexicon = lexicon_of(tmp_path, text or "")
    if text is None:
        (tmp_path / "words.dict").unlink()
    with pytest.raises(DataError, match=message):
        list(librispeech_items("ls", params(root, lexicon=lexicon)))


@pytest.mark.skipif(not (SPEECH / "lexicon").is_dir(), reason="no real LibriSpeech and lexicon; set DECANT_SPEECH")
def test_the_real_lexicon_knows_every_word_of_the_real_corpus():
    lexicon = LexiconParams(path=str(SPEECH / "lexicon" / "cmudict-subset.dict"), stress="drop")
    items = list(librispeech_items("ls", params(SPEECH / "LibriSpeech", dev_speakers=0.2, lexicon=lexicon)))
    assert all(i.tasks["pr"] == i.split for i in items)
    assert {i.split for i in items} == {"train", "dev", "test"}
    assert len({phone for i in items for phone in i.pronunciation.split()}) == 39  # ARPAbet without stress


@pytest.mark.skipif(not (SPEECH / "LibriSpeech").is_dir(), reason="no real LibriSpeech; set DECANT_SPEECH")
def test_the_real_corpus_reads_whole():
    sid = WithinSpeakers(min_utterances=10, held_back=Fractions(dev=0.15, test=0.25))
    items = list(librispeech_items("ls", params(SPEECH / "LibriSpeech", sid=sid)))
    assert not [i for i in items if isinstance(i.audio, Quarantine) or not i.text]
    assert len({i.id for i in items}) == len(items) >= 500
    speakers = {split: {i.speaker for i in items if i.split == split} for split in ("train", "test")}
    assert not speakers["train"] & speakers["test"]
    by_sid = {split: {i.speaker for i in items if i.tasks.get("sid") == split} for split in ("train", "dev", "test")}
    assert by_sid["train"] == by_sid["dev"] == by_sid["test"]
    assert len(by_sid["train"]) >= 20


TRIALS = DrawnTrials(dev=None, test=TrialCounts(same=1_000, different=1_000))


def test_every_task_of_a_miniature_has_its_speakers_sentences_and_recordings_apart(root, tmp_path_factory):
    add_chapter(root, "dev-clean", "84", "121123", 3)
    stems = ("19-198-000", "1089-134686-000", "84-121123-000")
    words = "".join(f"{stem}{n} AA1\n" for stem in stems for n in range(5))
    lexicon = lexicon_of(tmp_path_factory.mktemp("lexicon"), CMUDICT + words)
    settings = params(root, ("train-clean-100", "dev-clean", "test-clean"), lexicon=lexicon, asr=True, sv=TRIALS)
    manifest, leaks = apart(librispeech_items("ls", settings), {"pr", "asr", "sv", "sid"})
    assert leaks == []
    assert all(u.tasks["asr"] == u.tasks["sv"] == u.split for u in manifest)


def test_a_sentence_of_the_test_is_not_trained_on(root):
    file = root / "test-clean" / "1089" / "134686" / "1089-134686.trans.txt"
    file.write_text(file.read_text().replace("WORDS OF 1089-134686-0000", "WORDS OF 19-198-0002"))
    settings = params(root, asr=True)
    manifest, (leak,) = apart(librispeech_items("ls", settings), {"asr", "sid"})
    assert (leak.task, leak.leaves.id, leak.trait) == ("asr", "ls/train-clean-100/19-198-0002", "sentence")
    assert set(manifest.by_id[leak.leaves.id].tasks) <= {"sid"}


@pytest.mark.skipif(not (SPEECH / "LibriSpeech").is_dir(), reason="no real LibriSpeech; set DECANT_SPEECH")
def test_the_real_corpus_has_its_speakers_sentences_and_samples_apart_and_gives_trials():
    sid = WithinSpeakers(min_utterances=10, held_back=Fractions(dev=0.15, test=0.25))
    lexicon = LexiconParams(path=str(SPEECH / "lexicon" / "cmudict-subset.dict"), stress="drop")
    settings = params(SPEECH / "LibriSpeech", dev_speakers=0.1, sid=sid, lexicon=lexicon, asr=True, sv=TRIALS)
    manifest, leaks = apart(librispeech_items("ls", settings), {"pr", "asr", "sv", "sid"}, decoded=True)
    assert leaks == []
    trials = draw_trials("ls", manifest, TRIALS)
    who = {u.id: u.speaker for u in manifest}
    assert all((who[t.first] == who[t.second]) == t.same for t in trials)
    assert len({who[t.first] for t in trials if t.same}) == 20
    assert len({frozenset((t.first, t.second)) for t in trials}) == 2_000
