"""Made-up voices for the tests of speaker verification: a manifest, its frames in a store, all pairs as trials, settings."""

from itertools import combinations
from typing import NamedTuple

import numpy as np

from cache.manifest import Manifest
from cache.ragged import Store
from pipeline.corpora.trials import Trial
from pipeline.tasks.eer import DetectionCost
from pipeline.tasks.verify import SvParams
from tests.probe_fixtures import utterance, write_store

SPEAKERS = {"train": 48, "dev": 6, "test": 10}
L, D, EACH = 3, 12, 5
PARAMS = SvParams(
    head_width=32,
    channels=32,
    pooled_width=32,
    embedding=32,
    scale=30.0,
    margin=0.2,
    normalise_layers=False,
    crop_sec=0.4,
    speakers_balanced=False,
    lrs=(1e-5, 1e-2),
    seeds=(0, 1),
    steps=120,
    batch=24,
    weight_decay=0.01,
    clip_norm=10.0,
    validate_every=40,
    patience=None,
    list=None,
    costs=(DetectionCost(p_target=0.05, miss=1, false_alarm=1),),
)


class Voiced(NamedTuple):
    manifest: Manifest
    store: Store
    layers: list[str]
    trials: tuple[Trial, ...]


def voices(directory, truthful: bool = True, loudness: float = 6.0) -> Voiced:
    """Five utterances of each voice; layer 1 carries its vector, and the others noise. Untruthful: labels are shuffled."""
    rng = np.random.default_rng(0)
    utterances, frames = [], []
    for split, count in SPEAKERS.items():
        owners = np.arange(count).repeat(EACH)
        said = owners if truthful else rng.permutation(owners)
        signal = rng.normal(size=(count, D)) * loudness
        for number, (owner, label) in enumerate(zip(owners, said, strict=True)):
            who = f"{split}{label:02d}"
            row = utterance(f"{split}/{number:03d}", int(rng.integers(8, 40)), {"sv": split}, speaker=who)
            states = rng.normal(size=(L, row.num_frames, D))
            states[1] += signal[owner]
            utterances.append(row)
            frames.append(states.astype(np.float16))
    manifest = Manifest(tuple(utterances))
    return Voiced(manifest, *write_store(directory / "store", manifest, frames), all_pairs(manifest))


def all_pairs(manifest: Manifest) -> tuple[Trial, ...]:
    """Every two utterances of dev, and of test."""
    return tuple(
        Trial(f"toy/{split}", one.speaker == other.speaker, one.id, other.id)
        for split in ("dev", "test")
        for one, other in combinations([u for u in manifest if u.tasks.get("sv") == split], 2)
    )
