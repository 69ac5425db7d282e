"""decant prepare: sources into a manifest, a wave store and a quarantine."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import xxhash
import yaml
from typer.testing import CliRunner

from cache.errors import DataError, ResourceError, SettingsError
from cache.manifest import read_manifest
from cache.publish import read_json
from cache.receipts import open_receipt
from pipeline.audio import AudioParams
from pipeline.corpora.librispeech import LibriSpeechParams
from pipeline.corpora.speech_commands import SpeechCommandsParams
from pipeline.corpora.trials import read_trials
from pipeline.prepare import PrepareParams, describe, prepare
from stages.prepare import app

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture
def corpora(tmp_path, monkeypatch) -> Path:
    """Two miniature corpora, and DECANT_STORE beside them."""
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    rng = np.random.default_rng(0)
    for speaker in ("0a7c2a8d", "2aa787cf", "8b775397"):
        for word in ("up", "down"):
            folder = tmp_path / "commands" / word
            folder.mkdir(parents=True, exist_ok=True)
            wave = (rng.normal(size=rng.integers(2_000, 16_000)) * 1_000).astype(np.int16)
            soundfile.write(folder / f"{speaker}_nohash_0.wav", wave, 16_000)
    chapter = tmp_path / "books" / "test-clean" / "1089" / "134686"
    chapter.mkdir(parents=True)
    names = [f"1089-134686-{i:04d}" for i in range(4)]
    for name in names:
        soundfile.write(chapter / f"{name}.flac", rng.normal(size=22_050) * 0.1, 22_050)
    (chapter / "1089-134686.trans.txt").write_text("".join(f"{name} SOME WORDS\n" for name in names))
    return tmp_path


def settings(root: Path, max_bad_fraction: float = 0.0, workers: int = 2) -> PrepareParams:
    return PrepareParams(
        sources={
            "commands": SpeechCommandsParams(
                kind="speech_commands",
                root=str(root / "commands"),
                words=None,
                validation_percentage=10,
                testing_percentage=10,
                sv=None,
            ),
            "books": LibriSpeechParams(
                kind="librispeech",
                root=str(root / "books"),
                subsets=("test-clean",),
                dev_speakers=0,
                sid=None,
                lexicon=None,
                asr=False,
                sv=None,
            ),
        },
        audio=AudioParams(max_sec=10, channels="mean", rate="resample"),
        max_bad_fraction=max_bad_fraction,
        workers=workers,
    )


def run(root: Path, **changes):
    return prepare(settings(root, **changes), root / "store" / "waves", root / "quarantine.json")


def write_params(root: Path, params: PrepareParams) -> Path:
    (root / "params.yaml").write_text(yaml.safe_dump({"prepare": params.model_dump(mode="json")}))
    return root / "params.yaml"


def arguments(root: Path) -> list[str]:
    places = {"out": "data/manifest.jsonl", "waves": "receipts/waves.json", "quarantine": "data/quarantine.json"}
    return [*(f"--{name}={root / place}" for name, place in places.items()), f"--params={root / 'params.yaml'}"]


def test_the_command_writes_a_manifest_and_the_very_samples(corpora):
    write_params(corpora, settings(corpora))
    result = CliRunner().invoke(app, arguments(corpora), catch_exceptions=False)
    manifest = read_manifest(corpora / "data" / "manifest.jsonl")
    store = open_receipt(corpora / "receipts" / "waves.json", verify=True)
    assert store.ids == [u.id for u in manifest]
    assert len(manifest) == 10
    for utterance in manifest.select(task="kws"):
        wave, _ = soundfile.read(corpora / "commands" / utterance.path, dtype="int16")
        np.testing.assert_array_equal(store.read("wave", utterance.id), wave)
        assert utterance.audio == xxhash.xxh3_128_hexdigest(wave.tobytes())
        assert utterance.file_bytes == (corpora / "commands" / utterance.path).stat().st_size
    book = manifest.by_id["books/test-clean/1089-134686-0000"]
    assert (book.rate_hz, book.file_samples, book.samples) == (22_050, 22_050, 16_000)
    assert (book.speaker, book.text, book.split, book.tasks) == ("1089", "SOME WORDS", "test", {})
    assert read_json(corpora / "data" / "quarantine.json") == []
    assert (
        "commands: 6 utterances, 0.00 h, 3 speakers; train 2, dev 2, test 2; kws train 2, dev 2, test 2"
        in result.stdout
    )
    assert "0 quarantined" in result.stdout


def test_a_second_run_and_another_number_of_threads_give_the_same_bytes(corpora):
    first, second = run(corpora, workers=1), run(corpora, workers=3)
    assert first.manifest.digest == second.manifest.digest
    assert first.receipt == second.receipt


def test_the_order_of_sources_in_the_settings_does_not_matter(corpora):
    params = settings(corpora)
    turned = params.model_copy(update={"sources": dict(reversed(params.sources.items()))})
    other = prepare(turned, corpora / "store" / "waves", corpora / "q.jsonl")
    assert other.manifest.digest == run(corpora).manifest.digest


def test_bad_recordings_are_left_out_by_name_and_counted(corpora):
    (corpora / "commands" / "up" / "00000000_nohash_0.wav").write_text("<html>")
    write_params(corpora, settings(corpora, max_bad_fraction=0.2))
    result = CliRunner().invoke(app, arguments(corpora), catch_exceptions=False)
    rows = read_json(corpora / "data" / "quarantine.json")
    assert [(r["id"], r["path"]) for r in rows] == [("commands/up/00000000_nohash_0", "up/00000000_nohash_0.wav")]
    assert "web page" in rows[0]["reason"]
    assert "quarantined commands/up/00000000_nohash_0 (up/00000000_nohash_0.wav): cannot be decoded" in result.stdout
    assert "1 quarantined" in result.stdout
    assert len(read_manifest(corpora / "data" / "manifest.jsonl")) == 10


def test_more_than_twenty_bad_recordings_are_shown_in_part(corpora):
    for i in range(25):
        (corpora / "commands" / "up" / f"{i:08x}_nohash_0.wav").touch()
    write_params(corpora, settings(corpora, max_bad_fraction=0.9))
    result = CliRunner().invoke(app, arguments(corpora), catch_exceptions=False)
    assert result.stdout.count("quarantined commands/") == 20
    assert "... and 5 more quarantined, in" in result.stdout


def test_too_many_bad_recordings_end_the_run_and_publish_nothing(corpora):
    (corpora / "commands" / "up" / "00000000_nohash_0.wav").touch()
    with pytest.raises(
        DataError,
        match=r"1 of 11 recordings cannot be used, more than prepare.max_bad_fraction = 0.05 allows; "
        r"the first is commands/up/00000000_nohash_0: the file is empty \(0 bytes\); all are in .*quarantine.json",
    ):
        run(corpora, max_bad_fraction=0.05)
    assert len(read_json(corpora / "quarantine.json")) == 1
    assert [p.name for p in (corpora / "store" / "waves").iterdir()] == ["writer.lock"]


def test_a_corpus_of_bad_recordings_alone_is_refused_whatever_the_fraction(corpora):
    for file in [*corpora.glob("commands/*/*.wav"), *corpora.glob("books/**/*.flac")]:
        file.write_bytes(b"")
    with pytest.raises(DataError, match="10 of 10 recordings cannot be used"):
        run(corpora, max_bad_fraction=1.0)


def test_a_recording_in_two_formats_is_refused(corpora):
    up = corpora / "commands" / "up"
    soundfile.write(up / "0a7c2a8d_nohash_0.flac", np.zeros(1_000), 16_000)
    with pytest.raises(
        DataError, match=r"0a7c2a8d_nohash_0 is there twice: up/0a7c2a8d_nohash_0.flac and up/0a7c2a8d_nohash_0.wav"
    ):
        run(corpora)


def test_a_recording_that_changed_changes_the_manifest_and_the_store(corpora):
    before = run(corpora)
    soundfile.write(corpora / "commands" / "up" / "0a7c2a8d_nohash_0.wav", np.ones(1_000) * 0.1, 16_000)
    after = run(corpora)
    assert after.manifest.digest != before.manifest.digest
    assert after.receipt["key"] != before.receipt["key"]


def test_labels_alone_leave_the_wave_store_as_it_is(corpora):
    before = run(corpora)
    transcript = next(corpora.glob("books/**/*.trans.txt"))
    transcript.write_text(transcript.read_text().replace("SOME", "OTHER"))
    after = run(corpora)
    assert after.manifest.digest != before.manifest.digest
    assert after.receipt == before.receipt


def test_settings_are_refused_with_their_key_and_the_choices(corpora):
    def refused(message: str, change) -> None:
        values = settings(corpora).model_dump(mode="json")
        change(values)
        (corpora / "params.yaml").write_text(yaml.safe_dump({"prepare": values}))
        with pytest.raises(SettingsError, match=message):
            CliRunner().invoke(app, arguments(corpora), catch_exceptions=False)

    refused("prepare.sources.books: .*tape.*kind.*table", lambda v: v["sources"]["books"].update(kind="tape"))
    refused("prepare.audio.channels .*'mean', 'first' or 'refuse'", lambda v: v["audio"].update(channels="left"))
    refused("prepare.workers", lambda v: v.update(workers=0))
    refused("prepare.audio.max_sec is missing", lambda v: v["audio"].pop("max_sec"))
    refused("prepare.sources", lambda v: v.update(sources={}))
    refused("prepare.sources.a/b", lambda v: v["sources"].update({"a/b": v["sources"]["books"]}))


def test_a_speaking_process_that_is_killed_ends_the_run_with_one_line(corpora):
    pytest.importorskip("espeakng_loader", reason="espeak-ng is not installed")
    group = {"count": 1, "variants": ["m1"]}
    source = {
        "kind": "espeak",
        "seed": 0,
        "voices": {"train": group, "dev": {**group, "variants": ["m2"]}, "test": {**group, "variants": ["m3"]}},
        "accents": ["en"],
        "rate_wpm": [150, 170],
        "pitch": [40, 60],
        "jitter": 0.5,
        "keywords": [],
        "repetitions": 0,
        "sentences_per_voice": 500,
        "silence_sec": [0, 0],
        "snr_db": None,
        "sid": None,
        "styles": {},
        "sv": None,
    }
    values = {**settings(corpora).model_dump(mode="json"), "sources": {"speech": source}}

    def kill(amount: float, note: str) -> None:
        for children in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
            for pid in map(int, children.read_text().split()):
                if b"cache.children" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)

    with pytest.raises(ResourceError, match=r"a process that speaks .* was killed .*smaller prepare.workers"):
        prepare(PrepareParams.model_validate(values), corpora / "store" / "waves", corpora / "q.jsonl", kill)
    assert [p.name for p in (corpora / "store" / "waves").iterdir()] == ["writer.lock"]


def test_the_command_tells_what_leaves_a_task_and_draws_trials_from_what_can_be_used(corpora):
    rng = np.random.default_rng(1)
    for speaker in ("ffa76c4a", "2643992f"):  # test and dev, officially
        for word in ("up", "down"):
            wave = (rng.normal(size=4_000) * 1_000).astype(np.int16)
            soundfile.write(corpora / "commands" / word / f"{speaker}_nohash_0.wav", wave, 16_000)
    (corpora / "commands" / "up" / "ffa76c4a_nohash_1.wav").write_bytes(b"")
    chapter = corpora / "books" / "train-clean-100" / "19" / "198"
    chapter.mkdir(parents=True)
    for number, text in enumerate(("SOME WORDS", "OTHER WORDS")):
        soundfile.write(chapter / f"19-198-000{number}.flac", rng.normal(size=16_000) * 0.1, 16_000)
        with open(chapter / "19-198.trans.txt", "a") as file:
            file.write(f"19-198-000{number} {text}\n")
    params = settings(corpora, max_bad_fraction=0.1).model_dump(mode="json")
    counts = {"same": 2, "different": 2}
    params["sources"]["commands"]["sv"] = {"dev": counts, "test": counts}
    params["sources"]["books"] |= {"asr": True, "subsets": ["train-clean-100", "test-clean"]}
    write_params(corpora, PrepareParams.model_validate(params))
    trials = corpora / "trials.jsonl"
    result = CliRunner().invoke(app, [*arguments(corpora), f"--trials={trials}"], catch_exceptions=False)
    manifest = read_manifest(corpora / "data" / "manifest.jsonl")
    read = read_trials(trials, manifest.by_id)
    assert [(t.list, t.same) for t in read] == [
        (f"commands/{split}", same) for split in ("dev", "test") for same in (True, True, False, False)
    ]
    lines = result.stdout.splitlines()
    assert (
        "asr leaves out 1 of books, same sentence as what is held back; "
        "the first is books/train-clean-100/19-198-0000, for books/test-clean/1089-134686-0000"
    ) in lines
    assert "trials commands/test: 2 of one speaker, 2 of two, 4 utterances" in lines
    assert [u.id for u in manifest if u.tasks.get("asr") == "train"] == ["books/train-clean-100/19-198-0001"]
    assert any(line.startswith("quarantined commands/up/ffa76c4a_nohash_1") for line in lines)


def test_the_table_of_corpora_counts_by_hand(corpora):
    assert describe(run(corpora).manifest) == [
        "books: 4 utterances, 0.00 h, 1 speakers; test 4",
        "commands: 6 utterances, 0.00 h, 3 speakers; train 2, dev 2, test 2; kws train 2, dev 2, test 2",
    ]
