"""Settings, targets, waveforms and perhaps an init in; everything a training works on, checked and opened, out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cache.errors import DataError, StoreError
from cache.manifest import Manifest
from cache.publish import digest_file, digest_json
from cache.ragged import Store
from pipeline.distill.batches import BatchReader
from pipeline.distill.build import first_learner, target_names
from pipeline.distill.ensemble import TargetMaker
from pipeline.distill.learner import Learner
from pipeline.distill.settings import StudentParams
from pipeline.distill.world import World
from pipeline.distortion.distort import folders_of
from pipeline.layers.targets import Targets, check_targets, open_targets, targets_json
from pipeline.states import Say


class Inputs(NamedTuple):
    """What is there before the first step."""

    facts: dict[str, Any]
    """All that decides what the training computes, by name."""
    splits: dict[str, Manifest]
    """train and dev."""
    readers_of: dict[str, BatchReader]
    """Of the splits that have utterances."""
    learner: Learner
    target_names: list[str]


def open_inputs(
    params: StudentParams,
    targets: Targets,
    manifest: Manifest,
    waves: Store,
    init: Sequence[Path],
    device: str,
    verify: float,
    world: World,
    say: Say,
) -> Inputs:
    """Check that all of it fits together; writes nothing. Arguments and errors are those of `distil`."""
    facts = {
        "settings": params.model_dump(mode="json"),
        "targets": targets_json(targets, numbers=False),
        "init": [digest_file(path) for path in init if path.exists()],
        "audio": digest_json([[u.id, u.audio, u.split] for u in manifest]),
        "noise": folders_of(params.augment),
    }
    check_targets(params.ensemble, targets)
    features = open_targets(targets, verify)
    manifest = _those_kept(manifest, features, targets, say)
    splits = _splits(params, manifest)
    arrays = [list(store.arrays) for store in targets.stores]
    make_targets = TargetMaker(params.ensemble, targets, features, device)
    learner = first_learner(params, targets, init, device, make_targets, world)
    distort = None if params.augment is None else params.augment.distort
    readers_of = {
        name: BatchReader(split, waves, features, arrays, distort if name == "train" else None, params.seed)
        for name, split in splits.items()
        if len(split)
    }
    return Inputs(facts, splits, readers_of, learner, target_names(params.ensemble, targets))


def _those_kept(manifest: Manifest, features: Sequence[Store], targets: Targets, say: Say) -> Manifest:
    """The utterances that have targets: all, but for those that extraction was told to skip for their length."""
    settings = [store.fingerprint.get("long", {}) for store in features]
    shortest = min((long["max_sec"] for long in settings if long.get("kind") == "skip"), default=None)
    kept = manifest if shortest is None else manifest.up_to(shortest)
    if {kept.audio_digest} != {targets.audio, *(store.fingerprint["audio"] for store in features)}:
        raise StoreError(
            "the targets were extracted from other audio, or from a selection of it, than this manifest lists; "
            "extract with keep.select: all, then run `decant targets` again"
        )
    if len(kept) < len(manifest):
        say(f"{len(manifest) - len(kept)} utterances of more than {shortest:g} s have no targets")
    return kept


def _splits(params: StudentParams, manifest: Manifest) -> dict[str, Manifest]:
    splits = {name: manifest.select(split=name) for name in ("train", "dev")}
    for name in ("train", "dev") if params.train.validate_every is not None else ("train",):
        if not len(splits[name]):
            hint = "; set train.validate_every: null to train without" if name == "dev" else ""
            raise DataError(f"the manifest has no utterance of split {name!r}{hint}")
    return splits
