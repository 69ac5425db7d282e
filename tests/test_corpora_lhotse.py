"""Manifests that lhotse writes are read here, and manifests written here are read by lhotse."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import lhotse
import numpy as np
import pytest
import soundfile
from lhotse.audio.source import AudioSource
from lhotse.supervision import AlignmentItem
from typer.testing import CliRunner

from cache.errors import DataError, SettingsError, StoreError
from cache.manifest import Manifest, Utterance, write_manifest
from cache.publish import write_json
from cache.receipts import make_receipt, open_receipt, store_key
from cache.waves import WaveWriter
from pipeline.audio import AudioParams, Part, Quarantine
from pipeline.corpora.item import Declared
from pipeline.corpora.lhotse_export import export_lhotse
from pipeline.corpora.lhotse_manifests import LhotseParams, lhotse_items
from pipeline.prepare import PrepareParams, prepare
from stages.lhotse import app

SEGMENTS = {
    "kind": "recordings",
    "recordings": "recordings.jsonl.gz",
    "supervisions": "supervisions.jsonl.gz",
    "split": "train",
}
CUTS = {"kind": "cuts", "cuts": "cuts.jsonl.gz", "split": "test"}


def params(root, *parts, **changes) -> LhotseParams:
    values = {
        "kind": "lhotse",
        "root": str(root),
        "parts": parts or (SEGMENTS,),
        "keyword": None,
        "emotion": "emotion",
        "pronunciation": None,
        "phones": "phone",
        "tasks": ("asr",),
        "sid": None,
        "sv": None,
    }
    return LhotseParams.model_validate({**values, **changes})


def items(root, *parts, **changes):
    return {i.id: i for i in lhotse_items("l", params(root, *parts, **changes))}


@pytest.fixture(autouse=True)
def store_beside(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))


@pytest.fixture
def root(tmp_path) -> Path:
    """A stereo file at 8 kHz and a mono file at 16 kHz, described by lhotse itself."""
    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "talk.wav", (rng.normal(size=(16_000, 2)) * 3_000).astype(np.int16), 8_000)
    soundfile.write(tmp_path / "word.flac", (rng.normal(size=12_345) * 3_000).astype(np.int16), 16_000)
    recordings = lhotse.RecordingSet.from_recordings(
        lhotse.Recording.from_file(tmp_path / name, recording_id=name.split(".")[0])
        for name in ("talk.wav", "word.flac")
    )
    supervisions = lhotse.SupervisionSet.from_segments(
        [
            lhotse.SupervisionSegment(
                id="t1",
                recording_id="talk",
                start=0.25,
                duration=0.5,
                channel=1,
                text="HI",
                speaker="A",
                custom={"emotion": "happy"},
                alignment={"phone": [AlignmentItem("HH", 0.25, 0.125), AlignmentItem("AY", 0.375, 0.375)]},
            ),
            lhotse.SupervisionSegment("t2", "talk", start=1.0, duration=1.0, channel=0, text="BYE", speaker="B"),
            lhotse.SupervisionSegment(
                "w1", "word", start=0, duration=recordings["word"].duration, text="GO", speaker="A"
            ),
        ]
    )
    recordings.to_file(tmp_path / "recordings.jsonl.gz")
    supervisions.to_file(tmp_path / "supervisions.jsonl.gz")
    cuts = lhotse.CutSet.from_manifests(recordings=recordings, supervisions=supervisions)
    cuts.trim_to_supervisions(keep_overlapping=False, keep_all_channels=False).to_file(tmp_path / "cuts.jsonl.gz")
    return tmp_path


def test_supervisions_are_utterances_with_their_labels(root):
    found = items(root)
    assert list(found) == ["l/t1", "l/t2", "l/w1"]
    first = found["l/t1"]
    assert (first.path, first.audio, first.part) == ("talk.wav", root / "talk.wav", Part(0.25, 0.75, 1))
    assert (first.text, first.speaker, first.emotion, first.split) == ("HI", "A", "happy", "train")
    assert first.tasks == {"asr": "train"}
    assert first.phones == (("HH", 0, 2_000), ("AY", 2_000, 8_000))
    assert (found["l/t2"].phones, found["l/t2"].emotion) == (None, None)
    assert found["l/w1"].declared == Declared(16_000, 12_345)
    assert items(root, keyword="text")["l/w1"].keyword == "GO"


def test_cuts_give_the_same_utterances(root):
    by_text = {i.text: i for i in items(root, CUTS).values()}
    for wanted in items(root).values():
        cut = by_text[wanted.text]
        assert (cut.path, cut.part, cut.speaker, cut.emotion, cut.phones, cut.declared, cut.split) == (
            *(wanted.path, wanted.part, wanted.speaker, wanted.emotion, wanted.phones, wanted.declared),
            "test",
        )


def test_recordings_alone_are_utterances_without_labels(root):
    found = items(root, {**SEGMENTS, "supervisions": None})
    assert [(i.id, i.part, i.text, i.speaker) for i in found.values()] == [
        ("l/talk", None, None, None),
        ("l/word", None, None, None),
    ]


def test_the_samples_are_those_that_lhotse_loads(root):
    settings = PrepareParams(
        sources={"l": params(root)},
        audio=AudioParams(max_sec=5, channels="refuse", rate="resample"),
        max_bad_fraction=0,
        workers=1,
    )
    prepared = prepare(settings, root / "store" / "waves", root / "quarantine.json")
    cut = next(c for c in lhotse.load_manifest(root / "cuts.jsonl.gz") if c.supervisions[0].id == "w1")
    write_json(root / "waves.json", prepared.receipt)
    waves = open_receipt(root / "waves.json")
    assert np.array_equal(waves.read("wave", "l/w1"), np.round(cut.load_audio()[0] * 32_768).astype(np.int16))
    sizes = {u.id: (u.samples, u.rate_hz, u.file_samples) for u in prepared.manifest}
    assert sizes == {"l/t1": (8_000, 8_000, 16_000), "l/t2": (16_000, 8_000, 16_000), "l/w1": (12_345, 16_000, 12_345)}


def test_a_file_that_is_not_what_its_manifest_says_is_quarantined(root):
    soundfile.write(root / "word.flac", np.zeros(9_000), 16_000)
    settings = PrepareParams(
        sources={"l": params(root)},
        audio=AudioParams(max_sec=5, channels="refuse", rate="resample"),
        max_bad_fraction=0.5,
        workers=1,
    )
    prepared = prepare(settings, root / "store" / "waves", root / "quarantine.json")
    assert [q.id for q in prepared.quarantined] == ["l/w1"]


def rewrite(root, name: str, change) -> None:
    """Change the first line of a manifest."""
    with gzip.open(root / name, "rt") as file:
        rows = [json.loads(line) for line in file]
    change(rows[0])
    with gzip.open(root / name, "wt") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("command", "touch {marker}"),
        ("url", "https://example.org/a.wav"),
        ("file", "s3://bucket/a.wav"),
        ("memory", "UklGRg=="),
    ],
)
def test_sources_that_would_run_or_fetch_something_are_refused(root, kind, source):
    marker = root / "was-run"
    changed = [AudioSource(kind, [0, 1], source.format(marker=marker)).to_dict()]
    rewrite(root, "recordings.jsonl.gz", lambda row: row.update(sources=changed))
    rewrite(root, "cuts.jsonl.gz", lambda row: row["recording"].update(sources=changed))
    for part in (SEGMENTS, CUTS):
        with pytest.raises(
            DataError, match=rf"line 1: the audio of talk is of type '{kind}' .* nothing that comes with"
        ):
            items(root, part)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["sources"][0].update(source="../x.wav"), r"line 1, talk: the path '../x.wav' leads outside"),
        (lambda r: r["sources"][0].update(source="/etc/x.wav"), r"line 1, talk: the path '/etc/x.wav' leads outside"),
        (lambda r: r.update(sources=r["sources"] * 2), r"line 1: talk has 2 sources"),
        (lambda r: r.update(sources=[]), r"line 1: talk has 0 sources"),
        (lambda r: r.update(transforms=[{"name": "Speed"}]), r"line 1: talk is to be changed while it is read"),
        (lambda r: r.pop("num_samples"), r"line 1: no recording of lhotse: num_samples: field required"),
        (lambda r: r.update(id="word"), r"line 2: the recording word is there twice"),
        (lambda r: r.update(id="other"), r"line 1: t1 is of the recording talk, which recordings.jsonl.gz has not"),
    ],
)
def test_recordings_that_cannot_be_used_are_named(root, change, message):
    rewrite(root, "recordings.jsonl.gz", change)
    with pytest.raises(DataError, match=message):
        items(root)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(channel=7), r"line 1: t1 is of the channels \(7,\); choose one of those of its file: 0, 1"),
        (lambda r: r.update(channel=[0, 1]), r"line 1: t1 is of the channels \(0, 1\)"),
        (lambda r: r.update(duration=float("nan")), r"line 1: no supervision of lhotse: duration"),
        (lambda r: r.update(start=1e300), r"line 1: no supervision of lhotse: start"),
        (
            lambda r: r["alignment"]["phone"][1].__setitem__(2, 0.6),
            r"the phone 'AY' at 0.375 s lies outside its utterance",
        ),
        (lambda r: r["alignment"]["phone"].reverse(), r"the phone 'HH' at 0.25 s lies outside its utterance or before"),
    ],
)
def test_supervisions_that_cannot_be_used_are_named(root, change, message):
    rewrite(root, "supervisions.jsonl.gz", change)
    with pytest.raises(DataError, match=message):
        items(root)


def test_cuts_that_are_no_utterance_are_named(root):
    cuts = lhotse.load_manifest(root / "cuts.jsonl.gz")
    whole = lhotse.CutSet.from_manifests(
        recordings=lhotse.load_manifest(root / "recordings.jsonl.gz"),
        supervisions=lhotse.load_manifest(root / "supervisions.jsonl.gz"),
    )
    for made, message in (
        (cuts.pad(duration=9), r"line 1: .* is a MixedCut; only a MonoCut with a recording is read"),
        (whole.filter(lambda c: c.recording_id == "talk"), r"is a MultiCut|has 2 supervisions"),
        (cuts.resample(4_000), r"is to be changed while it is read \(transforms\)"),
    ):
        made.to_file(root / "other.jsonl.gz")
        with pytest.raises(DataError, match=message):
            items(root, {**CUTS, "cuts": "other.jsonl.gz"})
    rewrite(root, "cuts.jsonl.gz", lambda row: row.pop("recording"))
    with pytest.raises(DataError, match=r"line 1: .* is a cut without a recording"):
        items(root, CUTS)


def test_files_that_are_no_manifest_are_named(root):
    file = root / "cuts.jsonl.gz"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cuts.jsonl.gz is damaged"):
        items(root, CUTS)
    file.write_bytes(b"{}")
    with pytest.raises(DataError, match=r"cuts.jsonl.gz is damaged \(Not a gzipped file"):
        items(root, CUTS)
    file.write_bytes(gzip.compress(b"{\n"))
    with pytest.raises(DataError, match=r"line 1: not a JSON object"):
        items(root, CUTS)
    file.write_bytes(gzip.compress(b'"' + b"x" * 17 * 2**20))
    with pytest.raises(DataError, match=r"line 1: longer than 16777216 characters"):
        items(root, CUTS)
    (root / "cuts.json").write_text("[]")
    with pytest.raises(DataError, match=r"neither .jsonl nor .jsonl.gz; convert it: lhotse copy cuts.json"):
        items(root, {**CUTS, "cuts": "cuts.json"})
    with pytest.raises(DataError, match=r"sources.l.parts.0.cuts: there is no file"):
        items(root, {**CUTS, "cuts": "lost.jsonl"})


def test_links_that_leave_are_quarantined(root, tmp_path_factory):
    (root / "word.flac").unlink()
    (root / "word.flac").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    assert isinstance(items(root)["l/w1"].audio, Quarantine)


@pytest.fixture
def prepared(tmp_path) -> Manifest:
    """Three utterances in a wave store, one with every label there is."""
    rng = np.random.default_rng(1)
    rows = []
    with WaveWriter(tmp_path / "store" / "waves") as writer:
        for number, samples in enumerate((4_001, 16_000, 777)):
            name = f"c/../{number}" if number == 2 else f"c/{number}"
            wave = (rng.normal(size=samples) * 3_000).astype(np.int16)
            rows.append(
                Utterance(
                    id=name,
                    corpus="c",
                    path=f"{number}.wav",
                    samples=samples,
                    rate_hz=8_000,
                    file_samples=samples // 2,
                    file_bytes=10,
                    audio=writer.add(name, wave),
                    split="dev",
                    tasks={"er-1": "test"},
                    speaker="S",
                    text="naïve",
                    phones=(("sil", 0, 301), ("ə", 301, 4_001)) if number == 0 else None,
                    emotion="happy",
                )
            )
        manifest = Manifest(tuple(rows))
        fingerprint = {"audio": manifest.audio_digest}
        place = writer.finish(store_key("waves", fingerprint), fingerprint)
    write_manifest(tmp_path / "manifest.jsonl", manifest)
    write_json(tmp_path / "waves.json", make_receipt(place, ["wave"]))
    return manifest


def export(root: Path):
    options = [f"--manifest={root / 'manifest.jsonl'}", f"--waves={root / 'waves.json'}", f"--out={root / 'out'}"]
    return CliRunner().invoke(app, options, catch_exceptions=False)


def test_lhotse_reads_what_was_exported_and_finds_the_samples_of_the_store(prepared, tmp_path):
    assert "3 recordings and supervisions" in export(tmp_path).stdout
    out = tmp_path / "out"
    recordings = lhotse.load_manifest(out / "recordings.jsonl.gz").with_path_prefix(out)
    supervisions = lhotse.load_manifest(out / "supervisions.jsonl.gz")
    lhotse.validate_recordings_and_supervisions(recordings, supervisions, read_data=True)
    waves = open_receipt(tmp_path / "waves.json")
    for utterance in prepared:
        samples = np.round(recordings[utterance.id].load_audio()[0] * 32_768).astype(np.int16)
        assert np.array_equal(samples, waves.read("wave", utterance.id))
    said = supervisions["c/0"]
    assert (said.text, said.speaker, said.custom["emotion"], said.custom["tasks"]) == (
        "naïve",
        "S",
        "happy",
        {"er-1": "test"},
    )
    assert [(a.symbol, round(a.start * 16_000), round(a.end * 16_000)) for a in said.alignment["phone"]] == [
        ("sil", 0, 301),
        ("ə", 301, 4_001),
    ]


def test_an_export_is_a_source_that_gives_the_same_waveforms_and_labels(prepared, tmp_path):
    export(tmp_path)
    settings = PrepareParams(
        sources={"l": params(tmp_path / "out")},
        audio=AudioParams(max_sec=5, channels="refuse", rate="refuse"),
        max_bad_fraction=0,
        workers=1,
    )
    again = prepare(settings, tmp_path / "store" / "waves", tmp_path / "quarantine.json").manifest
    assert [(u.samples, u.audio, u.text, u.speaker, u.phones, u.emotion) for u in again] == [
        (u.samples, u.audio, u.text, u.speaker, u.phones, u.emotion) for u in prepared
    ]


def test_an_export_is_the_same_bytes_again_and_replaces_no_folder_of_another_kind(prepared, tmp_path):
    export(tmp_path)
    first = {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    export(tmp_path)
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == first
    (tmp_path / "precious").mkdir()
    with pytest.raises(SettingsError, match=r"precious exists and holds no recordings.jsonl.gz, so it is not replaced"):
        export_lhotse(prepared, open_receipt(tmp_path / "waves.json"), tmp_path / "precious")


def test_a_store_of_another_manifest_is_refused(prepared, tmp_path):
    waves = open_receipt(tmp_path / "waves.json")
    for change, message in (({"id": "c/9"}, "wave store has no c/9"), ({"samples": 4_000}, "has 4001 samples but the")):
        other = Manifest((replace(prepared[0], **change),))
        with pytest.raises(StoreError, match=message):
            export_lhotse(other, waves, tmp_path / "out")
    assert not (tmp_path / "out").exists()
