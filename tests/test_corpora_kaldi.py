"""Kaldi data directories and speechocean762: miniatures made here, and the real corpus where it is at hand."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import soundfile
from xxhash import xxh3_128_hexdigest

from cache.errors import DataError
from pipeline.audio import AudioParams, Part, Quarantine
from pipeline.corpora.drawn import DrawnTrials, TrialCounts, draw_trials
from pipeline.corpora.kaldi import KaldiParams, kaldi_items
from pipeline.corpora.speechocean762 import Speechocean762Params, speechocean762_items
from pipeline.prepare import PrepareParams, prepare
from pipeline.tasks.leaks import without_leaks
from tests.leak_fixtures import apart, manifest_of

SPEECH = Path(os.environ.get("DECANT_SPEECH", "../shared/speech")) / "speechocean762"
ARPABET = set(
    re.findall(
        r"\w+",
        """AA AE AH AO AW AY B CH D DH EH ER EY F G HH IH IY JH K L M N NG OW OY P R S SH T TH UH
    UW V W Y Z ZH""",
    )
)
SHARED_OUT = {"min_utterances": 3, "held_back": {"dev": 0.3, "test": 0.3}}


def params(root, **changes) -> KaldiParams:
    data = {"train": ["data/train"], "dev": [], "test": ["data/test"]}
    values = {"kind": "kaldi", "root": str(root), "data": data, "tasks": ["asr"], "sid": None, "sv": None}
    return KaldiParams.model_validate({**values, **changes})


def ocean(root, **changes) -> Speechocean762Params:
    values = {
        "kind": "speechocean762",
        "root": str(root),
        "subsets": ["train", "test"],
        "dev_speakers": 0.0,
        "stress": "keep",
        "sid": None,
        "asr": False,
        "sv": None,
    }
    return Speechocean762Params.model_validate({**values, **changes})


def write(path: Path, text: str) -> None:
    assert not path.is_symlink()  # a test writes into its own folder only
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def root(tmp_path) -> Path:
    """A training directory of whole recordings, and a test directory of segments of one stereo file."""
    rng = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for name in ("a1", "a2", "b 1"):
        soundfile.write(tmp_path / "audio" / f"{name}.wav", (rng.normal(size=8_000) * 3_000).astype(np.int16), 16_000)
    soundfile.write(tmp_path / "audio" / "call.wav", (rng.normal(size=(32_000, 2)) * 3_000).astype(np.int16), 16_000)
    train, test = tmp_path / "data" / "train", tmp_path / "data" / "test"
    write(train / "wav.scp", f"a1 audio/a1.wav\na2\t{tmp_path}/audio/a2.wav\nb1 audio/b 1.wav\n")
    write(train / "utt2spk", "a1 A\na2 A\nb1 B\n")
    write(train / "text", "a1 HELLO  THERE\na2 YES\nb1 NO\n")
    write(test / "wav.scp", "call audio/call.wav\n")
    write(test / "segments", "c1 call 0.5 1.0 0\nc2 call 1.25 -1 1\n")
    write(test / "utt2spk", "c1 C\nc2 D\n")
    return tmp_path


def by_id(root, **changes):
    return {i.id: i for i in kaldi_items("k", params(root, **changes))}


def reasons(items) -> dict[str, str]:
    return {i.id: i.audio.reason for i in items if isinstance(i.audio, Quarantine)}


def test_directories_give_words_speakers_splits_and_segments(root):
    items = by_id(root)
    assert [(i.speaker, i.text, i.split, i.tasks) for i in items.values()] == [
        ("A", "HELLO THERE", "train", {"asr": "train"}),
        ("A", "YES", "train", {"asr": "train"}),
        ("B", "NO", "train", {"asr": "train"}),
        ("C", None, "test", {"asr": "test"}),
        ("D", None, "test", {"asr": "test"}),
    ]
    assert [i.path for i in items.values()] == ["audio/a1.wav", "audio/a2.wav", "audio/b 1.wav"] + [
        "audio/call.wav"
    ] * 2
    assert (items["k/c1"].part, items["k/c2"].part) == (Part(0.5, 1.0, 0), Part(1.25, None, 1))


def test_the_wave_store_holds_the_samples_of_the_segments(root):
    write(root / "data" / "test" / "segments", "c1 call 0.5 1.0 0\nc2 call 1.25 -1 1\nc3 call 1.5 2.1 0\n")
    write(root / "data" / "test" / "utt2spk", "c1 C\nc2 D\nc3 C\n")
    settings = PrepareParams(
        sources={"k": params(root)},
        audio=AudioParams(max_sec=1, channels="refuse", rate="refuse"),
        max_bad_fraction=0.2,
        workers=1,
    )
    prepared = prepare(settings, root / "store" / "waves", root / "quarantine.json")
    call, _ = soundfile.read(root / "audio" / "call.wav", dtype="int16")
    samples = {u.id: (u.samples, u.file_samples) for u in prepared.manifest}
    assert (samples["k/c1"], samples["k/c2"]) == ((8_000, 32_000), (12_000, 32_000))
    assert prepared.manifest.by_id["k/c2"].audio == xxh3_128_hexdigest(np.ascontiguousarray(call[20_000:, 1]).tobytes())
    assert [(q.id, q.reason) for q in prepared.quarantined] == [
        ("k/c3", "its segment from 1.5 s to 2.1 s is not inside the 2 s of the file")
    ]


def test_speaker_identification_shares_out_speakers_who_have_enough(root):
    train = root / "data" / "train"
    names = [f"a{i}" for i in range(6)]
    write(train / "wav.scp", "".join(f"{n} audio/a1.wav\n" for n in [*names, "b1"]))
    write(train / "utt2spk", "".join(f"{n} A\n" for n in names) + "b1 B\n")
    write(train / "text", "".join(f"{n} WORD\n" for n in [*names, "b1"]))
    items = by_id(root, sid=SHARED_OUT)
    assert (
        sorted(i.tasks["sid"] for i in items.values() if "sid" in i.tasks) == ["dev"] * 2 + ["test"] * 2 + ["train"] * 2
    )
    assert "sid" not in items["k/b1"].tasks


def test_utterances_that_a_list_forgot_are_quarantined(root):
    train = root / "data" / "train"
    write(train / "utt2spk", "a1 A\na2 A\nz9 Z\n")
    write(train / "text", "a1 HELLO\na2\nb1 NO\n")
    write(root / "data" / "test" / "segments", "c1 lost 0.5 1.0\nc2 call 1.0 2.0\n")
    assert reasons(by_id(root).values()) == {
        "k/a2": "no transcript: it has no words in text",
        "k/b1": "no speaker: it has no line in utt2spk",
        "k/z9": "it stands in utt2spk, but not in wav.scp",
        "k/c1": "its recording lost is not in wav.scp",
    }


@pytest.mark.parametrize(
    "command",
    [
        "flac -c -d -s a.flac |",
        "touch {marker} |",
        "| touch {marker}",
        "touch {marker}|",
        "sph2pipe -f wav $(touch {marker}) |",
    ],
)
def test_a_command_is_refused_by_its_line_and_never_run(root, command):
    marker = root / "was-run"
    write(root / "data" / "train" / "wav.scp", f"a1 audio/a1.wav\na2 {command.format(marker=marker)}\n")
    with pytest.raises(
        DataError, match=r"wav.scp, line 2: the audio of a2 is a command .* nothing that comes with data"
    ):
        by_id(root)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("train/wav.scp", "a1 ../secret.wav", r"line 1, a1: the path '../secret.wav' leads outside its corpus"),
        ("train/wav.scp", "a1 /etc/secret.wav", r"line 1, a1: the path '/etc/secret.wav' leads outside"),
        ("train/wav.scp", "a1", r"line 1, a1: the path '' leads outside"),
        ("train/wav.scp", "a1 raw.ark:17", r"line 1: the audio of a1 is 'raw.ark:17', not a file"),
        ("train/wav.scp", "a1 -", r"line 1: the audio of a1 is '-', not a file"),
        ("train/wav.scp", "a1 audio/a1.wav\na1 audio/a2.wav", r"line 2: a1 is there twice"),
        ("train/utt2spk", "a1 A\na1 B", r"utt2spk, line 2: a1 is there twice"),
        ("test/segments", "c1 call 0.5", r"line 1: 'c1 call 0.5' is not an utterance, a recording, start and end"),
        ("test/segments", "c1 call 1.0 0.5", r"is not an utterance"),
        ("test/segments", "c1 call -0.5 0.5", r"is not an utterance"),
        ("test/segments", "c1 call nan 0.5", r"is not an utterance"),
        ("test/segments", "c1 call 0 inf", r"is not an utterance"),
        ("test/segments", "c1 call 0 1 left", r"is not an utterance"),
        ("test/segments", "c1 call 0 1 0 0", r"is not an utterance"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(root, file, text, message):
    write(root / "data" / file, text + "\n")
    with pytest.raises(DataError, match=message):
        by_id(root)


def test_files_that_are_missing_and_links_that_leave_are_named(root, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "secret"
    elsewhere.write_text("a1 A\n")
    (root / "audio" / "call.wav").unlink()
    (root / "audio" / "call.wav").symlink_to(elsewhere)
    assert set(reasons(by_id(root).values())) == {"k/c1", "k/c2"}
    (root / "data" / "train" / "utt2spk").unlink()
    with pytest.raises(DataError, match=r"sources\.k: there is no file .*utt2spk"):
        by_id(root)
    (root / "data" / "train" / "utt2spk").symlink_to(elsewhere)
    with pytest.raises(DataError, match="a link that leads out of the corpus"):
        by_id(root)


@pytest.fixture
def little_ocean(tmp_path) -> Path:
    """Two utterances in train and one in test, as the archive has them, with its capital WAV."""
    for subset, names in (("train", ("0001001", "0001002")), ("test", ("0003001",))):
        for name in names:
            file = tmp_path / "WAVE" / f"SPEAKER{name[:4]}" / f"{name}.WAV"
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(file, np.zeros(8_000), 16_000, format="WAV")
        write(tmp_path / subset / "wav.scp", "".join(f"{n}\tWAVE/SPEAKER{n[:4]}/{n}.WAV\n" for n in names))
        write(tmp_path / subset / "utt2spk", "".join(f"{n}\t{n[:4]}\n" for n in names))
        write(tmp_path / subset / "text", "".join(f"{n}\tBUT I\n" for n in names))
    phones = "".join(f"{n}.0\tB_B AH0_I T_E\n{n}.1\tAY1_S\n" for n in ("0001001", "0001002", "0003001"))
    write(tmp_path / "resource" / "text-phone", phones)
    return tmp_path


def test_phones_of_speechocean_lose_their_place_in_the_word_and_at_wish_their_stress(little_ocean):
    items = {i.id: i for i in speechocean762_items("o", ocean(little_ocean))}
    assert [i.pronunciation for i in items.values()] == ["B AH0 T AY1"] * 3
    assert items["o/0001001"].path == "WAVE/SPEAKER0001/0001001.WAV"
    assert {i.speaker: (i.split, i.tasks) for i in items.values()} == {
        "0001": ("train", {"pr": "train"}),
        "0003": ("test", {"pr": "test"}),
    }
    assert {i.pronunciation for i in speechocean762_items("o", ocean(little_ocean, stress="drop"))} == {"B AH T AY"}
    assert not reasons(items.values())


def test_words_without_phones_are_quarantined_and_lines_that_cannot_be_read_are_named(little_ocean):
    file = little_ocean / "resource" / "text-phone"
    file.write_text("0001001.0\tB_B AH0_I T_E\n0003001.0\tB_B AH0_I T_E\n0003001.1\tAY1_S\n")
    assert reasons(speechocean762_items("o", ocean(little_ocean))) == {
        "o/0001001": "no phones: resource/text-phone has 1 of its 2 words",
        "o/0001002": "no phones: resource/text-phone has 0 of its 2 words",
    }
    for line, message in (
        ("0001001.1\tAY1_S", "line 1: word 1 of 0001001 where word 0 is due"),
        ("0001001\tAY1_S", "is not UTTERANCE.WORD and phones"),
        ("0001001.0\tAY1", "is not UTTERANCE.WORD and phones"),
        ("0001001.0\tAY1_S\n0001001.0\tAY1_S", "line 2: 0001001.0 is there twice"),
    ):
        file.write_text(line)
        with pytest.raises(DataError, match=message):
            list(speechocean762_items("o", ocean(little_ocean)))


def test_parts_of_speechocean_that_are_missing_are_named(little_ocean):
    (little_ocean / "test").rename(little_ocean / "tests")
    with pytest.raises(DataError, match="has no subset 'test', but WAVE, resource, tests, train"):
        list(speechocean762_items("o", ocean(little_ocean)))
    (little_ocean / "resource" / "text-phone").unlink()
    with pytest.raises(DataError, match="there is no file .*text-phone"):
        list(speechocean762_items("o", ocean(little_ocean)))


@pytest.mark.skipif(not SPEECH.is_dir(), reason="no real speechocean762; set DECANT_SPEECH")
def test_the_real_speechocean_reads_whole():
    settings = ocean(SPEECH, subsets=["train"], dev_speakers=0.3, sid=SHARED_OUT)
    items = list(speechocean762_items("o", settings))
    assert not reasons(items)
    assert len({i.id for i in items}) == len(items) == 184
    first = next(i for i in items if i.id == "o/004820041")
    assert first.text == "BUT AGAIN HE HAS MADE A VERY CLEAR STATEMENT"
    assert first.pronunciation.startswith("B AH0 T AH0 G EH0 N HH IY0 HH AE0 Z M EY0 D")
    assert {p.rstrip("012") for i in items for p in i.pronunciation.split()} <= ARPABET
    speakers = {split: {i.speaker for i in items if i.tasks["pr"] == split} for split in ("train", "dev")}
    assert speakers["train"]
    assert speakers["dev"]
    assert not speakers["train"] & speakers["dev"]
    assert len({i.speaker for i in items if i.tasks.get("sid") == "test"}) == 24


def test_splits_of_data_directories_are_apart_where_they_hold_the_same_speaker(root):
    settings = params(root, tasks=["asr", "sv"], sid=None)
    manifest, leaks = apart(kaldi_items("k", settings), {"asr", "sv"})
    assert leaks == []
    utt2spk = root / "data" / "test" / "utt2spk"
    train = (root / "data" / "train" / "utt2spk").read_text().split()[1]
    utt2spk.write_text("".join(f"{line.split()[0]} {train}\n" for line in utt2spk.read_text().splitlines()))
    manifest, leaks = without_leaks(manifest_of(kaldi_items("k", settings)))
    assert {leak.task for leak in leaks} == {"asr", "sv", "pretraining"}
    assert not [u for u in manifest if u.person == f"k/{train}" and "train" in (*u.tasks.values(), u.split)]


def test_speechocean_has_its_readers_apart_and_what_it_is_asked_for(little_ocean):
    for name, words in (("0001001", "BUT I"), ("0001002", "I BUT"), ("0003001", "BUT BUT")):
        subset = "test" if name == "0003001" else "train"
        text = little_ocean / subset / "text"
        text.write_text(re.sub(rf"{name}\t.*", f"{name}\t{words}", text.read_text()))
    manifest, leaks = apart(speechocean762_items("o", ocean(little_ocean)), {"pr"})
    assert leaks == []
    two = DrawnTrials(dev=None, test=None)
    manifest, leaks = apart(speechocean762_items("o", ocean(little_ocean, asr=True, sv=two)), {"pr", "asr", "sv"})
    assert leaks == []
    assert draw_trials("o", manifest, two) == []


def test_a_sentence_that_the_test_reads_is_not_trained_on(little_ocean):
    manifest, leaks = without_leaks(manifest_of(speechocean762_items("o", ocean(little_ocean))))
    assert [(leak.task, leak.leaves.id, leak.kept.id) for leak in leaks] == [
        ("pr", "o/0001001", "o/0003001"),
        ("pr", "o/0001002", "o/0003001"),
    ]
    assert [u.tasks for u in manifest] == [{}, {}, {"pr": "test"}]


@pytest.mark.skipif(not SPEECH.is_dir(), reason="no real speechocean762; set DECANT_SPEECH")
def test_the_real_speechocean_loses_the_sentences_that_its_dev_speakers_read():
    trials = DrawnTrials(dev=TrialCounts(same=50, different=50), test=None)
    settings = ocean(SPEECH, subsets=["train"], dev_speakers=0.3, asr=True, sv=trials)
    rows = manifest_of(speechocean762_items("o", settings), decoded=True)
    manifest, leaks = without_leaks(rows)
    assert {leak.trait for leak in leaks} <= {"sentence"}
    said = {s: {u.text for u in rows if u.split == s} for s in ("train", "dev")}
    repeated = sum(u.split == "train" and u.text in said["dev"] for u in rows)
    assert sum(leak.task == "pr" for leak in leaks) == sum(leak.task == "asr" for leak in leaks) == repeated
    assert len(draw_trials("o", manifest, trials)) == 100
