"""--download, with recipes that stand in for torchaudio's: what is fetched, and what stays when it fails."""

import errno
import tarfile
from pathlib import Path
from urllib.error import URLError

import pytest
import torchaudio.datasets
from torchaudio.datasets import librispeech

from cache.errors import DataError, ResourceError, SettingsError
from pipeline.corpora.download import download
from pipeline.corpora.librispeech import LibriSpeechParams
from pipeline.corpora.ravdess import RavdessParams
from pipeline.corpora.speech_commands import SpeechCommandsParams


def books(root) -> LibriSpeechParams:
    return LibriSpeechParams(
        kind="librispeech",
        root=str(root),
        subsets=("dev-clean", "test-clean"),
        dev_speakers=0,
        sid=None,
        lexicon=None,
        asr=False,
        sv=None,
    )


def commands(root) -> SpeechCommandsParams:
    return SpeechCommandsParams(
        kind="speech_commands", root=str(root), words=None, validation_percentage=10, testing_percentage=10, sv=None
    )


def serve(monkeypatch, tmp_path, error: Exception | None = None) -> list[str]:
    """Stand in for the network under torchaudio's own LibriSpeech recipe."""
    asked = []

    def download_url_to_file(url: str, archive: str, hash_prefix: str) -> None:
        asked.append(url.rsplit("/", 1)[1])
        assert len(hash_prefix) == 64  # SHA-256, which the real function checks
        if error is not None:
            Path(archive).write_text("half")
            raise error
        name = asked[-1].removesuffix(".tar.gz")
        file = tmp_path / "1-2.trans.txt"
        file.write_text("1-2-0000 WORDS\n")
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(file, f"LibriSpeech/{name}/1/2/1-2.trans.txt")

    monkeypatch.setattr(librispeech, "download_url_to_file", download_url_to_file)
    return asked


def test_only_subsets_that_are_missing_are_fetched_and_nothing_else_is_left(monkeypatch, tmp_path):
    root = tmp_path / "speech" / "LibriSpeech"
    (root / "dev-clean").mkdir(parents=True)
    asked = serve(monkeypatch, tmp_path)
    assert download("b", books(root)) == [root / "test-clean"]
    assert asked == ["test-clean.tar.gz"]
    assert (root / "test-clean/1/2/1-2.trans.txt").read_text() == "1-2-0000 WORDS\n"
    assert sorted(p.name for p in root.iterdir()) == ["dev-clean", "test-clean"]
    assert download("b", books(root)) == []
    assert len(asked) == 1


def test_a_corpus_that_is_whole_may_be_in_a_folder_of_any_name(tmp_path):
    for subset in ("dev-clean", "test-clean"):
        (tmp_path / "books" / subset).mkdir(parents=True)
    assert download("b", books(tmp_path / "books")) == []


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (URLError("Name or service not known"), DataError, "cannot be fetched: Name or service not known; connect, or"),
        (ConnectionResetError(104, "Connection reset"), DataError, "cannot be fetched: .*Connection reset"),
        (RuntimeError("invalid hash value"), DataError, "cannot be fetched: invalid hash value; run the command again"),
        (OSError(errno.ENOSPC, "No space left on device"), ResourceError, "cannot be written .*: No space left"),
    ],
)
def test_what_fails_is_one_line_and_leaves_no_half_corpus(monkeypatch, tmp_path, error, kind, message):
    root = tmp_path / "LibriSpeech"
    serve(monkeypatch, tmp_path, error)
    with pytest.raises(kind, match=message) as refusal:
        download("b", books(root))
    assert "\n" not in str(refusal.value)
    assert not (root / "dev-clean").exists()
    serve(monkeypatch, tmp_path)
    assert download("b", books(root)) == [root / "dev-clean", root / "test-clean"]


def test_speech_commands_come_in_the_version_of_their_folder(monkeypatch, tmp_path):
    def recipe(to, url, download):
        (Path(to) / "SpeechCommands" / url / "up").mkdir(parents=True)

    monkeypatch.setattr(torchaudio.datasets, "SPEECHCOMMANDS", recipe)
    root = tmp_path / "speech_commands_v0.01"
    assert download("c", commands(root)) == [root]
    assert (root / "up").is_dir()
    assert download("c", commands(root)) == []


def test_folders_and_corpora_that_no_recipe_fits_are_named(tmp_path):
    with pytest.raises(SettingsError, match=r"sources.b.root ends in 'books'; to fetch it, end it in LibriSpeech"):
        download("b", books(tmp_path / "books"))
    with pytest.raises(SettingsError, match=r"end it in speech_commands_v0.01 or speech_commands_v0.02"):
        download("c", commands(tmp_path / "commands"))
    values = {"kind": "ravdess", "classes": {}, "folds": ((1,), (2,)), "dev": 0.2, "split": "test"}
    assert download("r", RavdessParams(root=str(tmp_path), **values)) == []
    with pytest.raises(DataError, match=r"no recipe fetches ravdess to .*; get Audio_Speech_Actors_01-24.zip"):
        download("r", RavdessParams(root=str(tmp_path / "none"), **values))
