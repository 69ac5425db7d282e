"""A small world to fine-tune in: voices that are pitches, keywords that are rhythms, and a random student to begin with.

A voice hums at one frequency, a keyword switches it on and off at one rate. So each task is in the audio, neither is in
the other, and an encoder that learns both has to keep both.
"""

import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cache.manifest import Manifest, Utterance, write_manifest
from cache.publish import write_json
from cache.receipts import make_receipt, open_receipt, store_key
from cache.waves import WaveWriter
from pipeline.corpora.trials import Trial, read_trials, write_trials
from pipeline.distill.curves import Log
from pipeline.finetune.run import finetune
from pipeline.finetune.settings import FinetuneParams
from pipeline.finetune.start import open_start
from pipeline.student.checkpoint import save_student
from pipeline.student.encoder import Encoder, initialise
from pipeline.student.shape import EncoderShape
from stages._params import read_params
from tests.distill_fixtures import SHAPE

KEYWORDS = {"still": 0.0, "slow": 6.0, "fast": 18.0}
"""How often a second the hum is cut."""
VOICES = 24
SPLITS = {3: "dev", 9: "dev", 15: "dev", 21: "dev", 6: "test", 12: "test", 18: "test", 0: "test"}
"""Of voices that are not of training: they lie between those that are."""
TAKES = 2
"""Utterances of every voice and keyword."""
TUNED: dict[str, Any] = {
    "starts_from": "models/start",
    "tasks": {
        "kws": {
            "layers": "weighted",
            "head_width": 16,
            "class_balanced": True,
            "crop_seconds": None,
            "batch_seconds": 4.0,
        },
        "sv": {
            "layers": "weighted",
            "head_width": 16,
            "class_balanced": False,
            "crop_seconds": 0.4,
            "batch_seconds": 4.0,
            "pooling": {"kind": "statistics"},
            "embedding": 8,
            "scale": 10.0,
            "margin": 0.1,
            "list": None,
            "cost": {"p_target": 0.05, "miss": 1.0, "false_alarm": 1.0},
        },
    },
    "loss_weights": {"kind": "fixed", "kws": 1.0, "sv": 1.0},
    "encoder": {
        "kind": "tuned",
        "learning_rate": 0.003,
        "layer_decay": 0.9,
        "freeze_convolutions": False,
        "frozen_steps": 1,
        "feature_grad_mult": 1.0,
        "dropout": None,
    },
    "augment": None,
    "train": {
        "steps": 8,
        "accumulate": 1,
        "head_learning_rate": 0.01,
        "warmup": 0.1,
        "weight_decay": 0.01,
        "clip": 5.0,
        "precision": "float32",
        "log_every": 3,
        "validate_every": 4,
        "checkpoint_every": 2,
        "publish": "best",
    },
    "seeds": [1],
}
FROZEN = {"kind": "frozen"}
FILES = ["curves.csv", "heads.safetensors", "metrics.json", "shape.json", "weights.safetensors"]
START = {
    **SHAPE,
    "conv_channels": [8, 8, 12, 12, 16, 16, 16],
    "width": 24,
    "heads": [2, 2],
    "head_width": 12,
    "ffn": [24, 24],
    "dropout": {"features": 0.0, "hidden": 0.1, "attention": 0.0, "activation": 0.0},
}
LEARNS: dict[str, Any] = {
    "train": {"steps": 120, "validate_every": 40, "publish": "last"},
    "encoder": {"learning_rate": 0.01, "layer_decay": 1.0},
    "seeds": [0],
}
"""Enough to learn both tasks from nothing."""


@dataclass(frozen=True)
class World:
    """Paths of everything a fine-tuning reads."""

    root: Path
    manifest: Manifest

    def command(self) -> list[str]:
        """`decant finetune` on this world, as a process."""
        return [
            *(sys.executable, "-m", "stages", "finetune", "tuned", "--device", "cpu"),
            *("--starts-from", str(self.root / "models/start"), "--manifest", str(self.root / "manifest.jsonl")),
            *("--waves", str(self.root / "receipts/waves.json"), "--trials", str(self.root / "trials.jsonl")),
            *("--out", str(self.root / "models/tuned"), "--params", str(self.root / "params.yaml")),
        ]

    def environment(self) -> dict[str, str]:
        """Where the process finds the code and the stores."""
        code = str(Path(__file__).parent.parent)
        own = {"PYTHONPATH": code, "DECANT_STORE": str(self.root / "store"), "OMP_NUM_THREADS": "1"}
        return {**os.environ, **own}


def settings(**changes: Any) -> dict[str, Any]:
    """Settings with changes per section ({"train": {"steps": 3}}); a section with a kind, or null, replaces the whole."""
    changed = dict(TUNED)
    for name, value in changes.items():
        merges = isinstance(value, dict) and isinstance(TUNED[name], dict) and "kind" not in value
        changed[name] = {**TUNED[name], **value} if merges else value
    return changed


def write_params(world: World, **changes: Any) -> None:
    """params.yaml with one system."""
    (world.root / "params.yaml").write_text(yaml.safe_dump({"finetunes": {"tuned": settings(**changes)}}))


def params(**changes: Any) -> FinetuneParams:
    """The settings, checked."""
    return FinetuneParams.model_validate(settings(**changes))


def hum(carrier_hz: float, cuts_hz: float, samples: int, rng: np.random.Generator) -> np.ndarray:
    """A voice that says a keyword, in a little noise."""
    time = np.arange(samples) / 16_000
    gate = np.sin(2 * np.pi * cuts_hz * time + rng.uniform(0, 2 * np.pi)) > 0 if cuts_hz else np.ones(samples)
    wave = 0.3 * gate * np.sin(2 * np.pi * carrier_hz * time + rng.uniform(0, 2 * np.pi))
    return ((wave + 0.01 * rng.standard_normal(samples)) * 32767).astype(np.int16)


def make_world(root: Path) -> World:
    """Write the corpus, its wave store, trials, a random student and a params file; needs DECANT_STORE set."""
    rng = np.random.default_rng(5)
    utterances = []
    with WaveWriter(root / "store/waves") as writer:
        for voice, (keyword, cuts), take in product(range(VOICES), KEYWORDS.items(), range(TAKES)):
            name, split = f"v{voice:02d}/{keyword}-{take}", SPLITS.get(voice, "train")
            wave = hum(200.0 * 1.1**voice, cuts, int(rng.integers(7_000, 11_000)), rng)
            source = (len(wave), 16_000, len(wave), 2 * len(wave), writer.add(name, wave), split)
            tasks = {"kws": split, "sv": split}
            utterances.append(Utterance(name, "hum", name, *source, tasks, speaker=f"v{voice:02d}", keyword=keyword))
        manifest = Manifest(tuple(utterances))
        fingerprint = {"audio": manifest.audio_digest}
        directory = writer.finish(store_key("waves", fingerprint), fingerprint)
    write_json(root / "receipts/waves.json", make_receipt(directory, ["wave"]))
    write_manifest(root / "manifest.jsonl", manifest)
    write_trials(root / "trials.jsonl", draw_trials(manifest))
    encoder = Encoder(EncoderShape.model_validate(START))
    initialise(encoder, torch.Generator().manual_seed(0))
    (root / "models/start").mkdir(parents=True)
    save_student(root / "models/start", encoder, {})
    world = World(root, manifest)
    write_params(world)
    return world


def draw_trials(manifest: Manifest) -> list[Trial]:
    """Every pair of dev, and of test, that says different keywords."""
    trials = []
    for split in ("dev", "test"):
        for a, b in combinations([u for u in manifest if u.split == split], 2):
            if a.keyword != b.keyword:
                trials.append(Trial(f"hum/{split}", a.speaker == b.speaker, a.id, b.id))
    return trials


def tune(
    world: World,
    out: str = "models/tuned",
    manifest: Manifest | None = None,
    start: str = "models/start",
    said: list[str] | None = None,
    tick: Callable[..., None] = lambda *_, **__: None,
    readers: int = 0,
    logs_of: Callable[[int], Sequence[Log]] = lambda seed: (),
) -> dict[str, Any]:
    """`finetune` in this process, with the settings of params.yaml; gives its metrics."""
    manifest = manifest or world.manifest
    return finetune(
        read_params("finetunes.tuned", FinetuneParams, world.root / "params.yaml"),
        open_start(world.root / start),
        manifest,
        open_receipt(world.root / "receipts/waves.json"),
        read_trials(world.root / "trials.jsonl", manifest.by_id),
        world.root / out,
        "cpu",
        tick,
        (lambda _: None) if said is None else said.append,
        readers,
        logs_of=logs_of,
    )


def relabelled(manifest: Manifest, label: Callable[[Utterance], dict[str, Any]]) -> Manifest:
    """A manifest whose utterances have other labels."""
    return Manifest(tuple(replace(u, **label(u)) for u in manifest))


def products(world: World, out: str = "models/tuned") -> dict[str, bytes]:
    """The files of a product, which is whole."""
    folder = world.root / out
    assert sorted(p.name for p in folder.iterdir()) == FILES
    return {name: (folder / name).read_bytes() for name in FILES}


def stopping_after(steps: int) -> Callable[..., None]:
    """A tick that sends SIGTERM after so many steps of all seeds, those found done included."""
    done = 0

    def tick(amount: int, note: str = "", found: bool = False) -> None:
        nonlocal done
        done += amount
        if done == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    return tick
