"""The name of a task in, the settings it takes and a job that scores a model on it out.

Three kinds of task share one command: a class for every utterance, such a task in folds, and phones of every utterance.
Everything a manifest can have wrong is refused when the job is made, before a store is opened.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cache.manifest import Manifest
from cache.ragged import Store
from pipeline.tasks.features import pool
from pipeline.tasks.folded import probe_folds
from pipeline.tasks.frames import FrameFeatures
from pipeline.tasks.labels import Task, folds_of, labelled_splits
from pipeline.tasks.phones import spoken_splits
from pipeline.tasks.probe import ProbeParams, probe
from pipeline.tasks.recognise import PhoneParams, recognise
from pipeline.tasks.score import Score

Settings = ProbeParams | PhoneParams
Tick = Callable[[float], None]


def settings_of(task: str) -> type[ProbeParams] | type[PhoneParams]:
    """What stands under `probes.TASK` of params.yaml."""
    return PhoneParams if task == "pr" else ProbeParams


@dataclass(frozen=True, slots=True)
class Job:
    """A task over one manifest, for any model."""

    total: float
    unit: str
    """What `total` counts: the work of which a tick tells."""
    score: Callable[[Store, Sequence[str], torch.device, Tick], Score]


def job_of(task: Task, manifest: Manifest, params: Settings) -> Job:
    """Sort the utterances into splits.

    Raises:
        DataError: the manifest does not have what the task needs.
    """
    if isinstance(params, PhoneParams):
        return _phones(task, manifest, params)
    return _classes(task, manifest, params)


def _phones(task: Task, manifest: Manifest, params: PhoneParams) -> Job:
    spoken = spoken_splits(manifest, task, params.silences, params.unseen)
    ids = [*spoken.train.ids, *spoken.dev.ids, *spoken.test.ids]

    def score(store: Store, layers: Sequence[str], device: torch.device, tick: Tick) -> Score:
        features = FrameFeatures(store, layers, manifest, ids, params.normalise_layers, device)
        return recognise(features, spoken, params, device, on_step=tick)

    return Job(float(params.steps), "updates", score)


def _classes(task: Task, manifest: Manifest, params: ProbeParams) -> Job:
    folds = [labelled_splits(manifest, fold) for fold in folds_of(manifest, task)]
    ids = list(dict.fromkeys(name for fold in folds for name in fold.ids))

    def score(store: Store, layers: Sequence[str], device: torch.device, tick: Tick) -> Score:
        pooled = pool(store, layers, manifest, ids, params.normalise_layers, on_pooled=tick)
        if len(folds) == 1:
            return probe(pooled, folds[0], params, device)
        return probe_folds(pooled, task, folds, params, device)

    return Job(float(len(ids)), "utterances", score)
