"""A manifest and its waveforms belong together: other audio of the same ids and lengths is refused before it is read."""

import json

import pytest

from cache.errors import StoreError
from stages._corpus import open_corpus
from tests.conftest import make_tiny_corpus


def test_a_corpus_opens(tiny_corpus):
    manifest, store = open_corpus(tiny_corpus.manifest_path, tiny_corpus.waves_path)
    assert manifest.audio_digest == store.fingerprint["audio"]
    assert len(manifest) == 12


def test_corrected_labels_keep_their_waveforms(tiny_corpus):
    path = tiny_corpus.manifest_path
    rows = [json.loads(line) | {"keyword": "no"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest, _ = open_corpus(path, tiny_corpus.waves_path)
    assert {u.keyword for u in manifest} == {"no"}


def test_waveforms_of_the_same_ids_and_lengths_are_not_enough(tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "other/store"))
    other = make_tiny_corpus(tmp_path / "other", [u.samples for u in tiny_corpus.manifest], seed=1)
    with pytest.raises(StoreError, match=r"waves\.json is of other audio than .*manifest\.jsonl.*decant prepare"):
        open_corpus(tiny_corpus.manifest_path, other.waves_path)
