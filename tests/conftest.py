"""What many tests share: a ten-second corpus with its waves in a store, and one thread so that numbers repeat."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import numpy as np
import pytest

# Two test processes on two cores; the same bytes from every process; and a forked one waits for no thread left behind.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

from cache.manifest import Manifest, Utterance, write_manifest
from cache.publish import write_json
from cache.ragged import Store
from cache.receipts import make_receipt, open_receipt, store_key
from cache.waves import WaveWriter

for name in (
    "DECANT_DEBUG",
    "DECANT_EXECUTOR",
    "DECANT_SCHEDULER",
    "DECANT_STORE",
    "DVC_ROOT",
    "PYTHONDONTWRITEBYTECODE",
):
    os.environ.pop(name, None)  # settings of whoever runs the tests; compiling torch at each start takes seconds
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

TINY_HUBERT = {  # sizes of a transformers configuration: odd ones, so that a wrong axis shows
    "conv_dim": (8, 8, 8, 8, 8, 8, 12),
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow ones first, so that no process is left alone with one at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture
def store_here(tmp_path, monkeypatch) -> None:
    """Stores go below the folder of this test."""
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))


@pytest.fixture(scope="module")
def shared_root(tmp_path_factory) -> Iterator[Path]:
    """A folder that all tests of a file share, where their stores go."""
    root: Path = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECANT_STORE", str(root / "store"))
        yield root


@dataclass(frozen=True)
class TinyCorpus:
    """A manifest and its wave store under `root`, which is also where DECANT_STORE points."""

    root: Path
    manifest: Manifest
    waves: Store

    @property
    def manifest_path(self) -> Path:
        return self.root / "data" / "manifest.jsonl"

    @property
    def waves_path(self) -> Path:
        return self.root / "receipts" / "waves.json"


def make_tiny_corpus(root: Path, lengths: list[int], seed: int = 0) -> TinyCorpus:
    """Tones in noise of the given sample counts; DECANT_STORE must point to root/store."""
    rng = np.random.default_rng(seed)
    utterances = []
    with WaveWriter(root / "store" / "waves") as writer:
        for number, samples in enumerate(lengths):
            time = np.arange(samples) / 16_000
            wave = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 3000) * time) + 0.05 * rng.normal(size=samples)
            stored = (wave * 32767).clip(-32768, 32767).astype(np.int16)
            name = f"tiny/{number:03d}"
            utterances.append(
                Utterance(
                    id=name,
                    corpus="tiny",
                    path=f"{number:03d}.wav",
                    samples=samples,
                    rate_hz=16_000,
                    file_samples=samples,
                    file_bytes=2 * samples + 44,
                    audio=writer.add(name, stored),
                    split=("train", "train", "train", "dev")[number % 4],
                    tasks={"kws": ("train", "dev", "test")[number % 3]},
                    speaker=f"s{number % 4}",
                    keyword=("yes", "no")[number // 3 % 2],
                )
            )
        manifest = Manifest(tuple(utterances))
        fingerprint = {"audio": manifest.audio_digest}
        place = writer.finish(store_key("waves", fingerprint), fingerprint)
    write_manifest(root / "data" / "manifest.jsonl", manifest)
    write_json(root / "receipts" / "waves.json", make_receipt(place, ["wave"]))
    return TinyCorpus(root, manifest, open_receipt(root / "receipts" / "waves.json"))


@pytest.fixture
def tiny_corpus(tmp_path, monkeypatch) -> TinyCorpus:
    """Twelve utterances of 25 ms to 1.6 s."""
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    return make_tiny_corpus(
        tmp_path, [400, 16_000, 9_999, 719, 720, 24_000, 5_000, 16_001, 12_345, 8_000, 25_600, 3_210]
    )
