"""The name of a task in, the settings it takes and a job that scores a model on it out.

The kinds of task share one command: a class for every utterance, such a task in folds, phones or words of every
utterance, and whether two utterances are of one voice.
Everything a manifest can have wrong is refused when the job is made, before a store is opened.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cache.errors import SettingsError
from cache.manifest import Manifest
from cache.ragged import Store
from pipeline.corpora.trials import Trial
from pipeline.tasks import leaks
from pipeline.tasks.asr import AsrParams
from pipeline.tasks.characters import text_splits
from pipeline.tasks.features import pool
from pipeline.tasks.folded import probe_folds
from pipeline.tasks.frames import FrameFeatures
from pipeline.tasks.labels import Task, folds_of, labelled_splits
from pipeline.tasks.phones import spoken_splits
from pipeline.tasks.probe import ProbeParams, probe
from pipeline.tasks.recognise import PhoneParams, recognise
from pipeline.tasks.score import Score
from pipeline.tasks.transcribe import transcribe
from pipeline.tasks.verify import SvParams, verify
from pipeline.tasks.voices import voice_splits

Settings = ProbeParams | PhoneParams | AsrParams | SvParams
Tick = Callable[[float], None]
SETTINGS: dict[str, type[Settings]] = {"pr": PhoneParams, "asr": AsrParams, "sv": SvParams}


def settings_of(task: str) -> type[Settings]:
    """What stands under `probes.TASK` of params.yaml."""
    return SETTINGS.get(task, ProbeParams)


@dataclass(frozen=True, slots=True)
class Job:
    """A task over one manifest, for any model."""

    total: float
    unit: str
    """What `total` counts: the work of which a tick tells."""
    score: Callable[[Store, Sequence[str], torch.device, Tick], Score]


def job_of(task: Task, manifest: Manifest, params: Settings, trials: Sequence[Trial] | None = None) -> Job:
    """Sort the utterances into splits; `trials` are what speaker verification is asked.

    Raises:
        DataError: the manifest does not have what the task needs, or its splits leak.
        SettingsError: no trials, and the task is about them.
    """
    leaks.check(manifest, task)
    if isinstance(params, SvParams):
        return _voices(task, manifest, params, trials)
    if isinstance(params, PhoneParams):
        return _phones(task, manifest, params)
    if isinstance(params, AsrParams):
        return _words(task, manifest, params)
    return _classes(task, manifest, params)


def _phones(task: Task, manifest: Manifest, params: PhoneParams) -> Job:
    spoken = spoken_splits(manifest, task, params.silences, params.unseen)
    ids = [*spoken.train.ids, *spoken.dev.ids, *spoken.test.ids]

    def score(store: Store, layers: Sequence[str], device: torch.device, tick: Tick) -> Score:
        features = FrameFeatures(store, layers, manifest, ids, params.normalise_layers, device)
        return recognise(features, spoken, params, device, on_step=tick)

    return Job(float(params.steps), "updates", score)


def _words(task: Task, manifest: Manifest, params: AsrParams) -> Job:
    splits = text_splits(manifest, task, params.characters, params.drop, params.reduce_frames)
    ids = [*splits.train.ids, *splits.dev.ids, *splits.test.ids]

    def score(store: Store, layers: Sequence[str], device: torch.device, tick: Tick) -> Score:
        features = FrameFeatures(store, layers, manifest, ids, params.normalise_layers, device)
        return transcribe(features, splits, params, device, on_step=tick)

    sweeps = 1 if len(params.seeds) == 1 else 2  # all rates with the first seed, then the other seeds
    return Job(float(sweeps * params.steps), "updates", score)


def _voices(task: Task, manifest: Manifest, params: SvParams, trials: Sequence[Trial] | None) -> Job:
    if trials is None:
        raise SettingsError(
            f"task '{task.name}' is asked trials; name their file with `decant probe ... --trials data/trials.jsonl`, "
            "which `decant prepare --trials` writes"
        )
    splits = voice_splits(manifest, task, trials, params.list)

    def score(store: Store, layers: Sequence[str], device: torch.device, tick: Tick) -> Score:
        features = FrameFeatures(store, layers, manifest, splits.ids, params.normalise_layers, device)
        return verify(features, splits, params, device, on_step=tick)

    return Job(float(params.total_steps), "updates", score)


def _classes(task: Task, manifest: Manifest, params: ProbeParams) -> Job:
    folds = [labelled_splits(manifest, fold) for fold in folds_of(manifest, task)]
    ids = list(dict.fromkeys(name for fold in folds for name in fold.ids))

    def score(store: Store, layers: Sequence[str], device: torch.device, tick: Tick) -> Score:
        pooled = pool(store, layers, manifest, ids, params.normalise_layers, on_pooled=tick)
        if len(folds) == 1:
            return probe(pooled, folds[0], params, device)
        return probe_folds(pooled, task, folds, params, device)

    return Job(float(len(ids)), "utterances", score)
