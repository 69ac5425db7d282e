"""A manifest, trials and settings in; what each task trains on and is judged by, checked, out.

Both tasks are those of the probes: the same splits, the same trials, and the same refusal of what would leak.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cache.errors import SettingsError
from cache.manifest import Manifest
from cache.publish import digest_json
from pipeline.corpora.trials import Trial
from pipeline.finetune.settings import Tasks
from pipeline.tasks.labels import Examples, LabelledSplits, labelled_splits, task_named
from pipeline.tasks.leaks import check, check_together
from pipeline.tasks.voices import Asked, VoiceSplits, voice_splits


@dataclass(frozen=True, slots=True)
class AllExamples:
    """What the tasks that are learned have; None for one that is not."""

    kws: LabelledSplits | None
    sv: VoiceSplits | None

    @property
    def train(self) -> dict[str, Examples]:
        """Of each task that is learned, kws first."""
        return {name: task.train for name, task in (("kws", self.kws), ("sv", self.sv)) if task is not None}

    @property
    def classes(self) -> dict[str, tuple[str, ...]]:
        """Keywords and training speakers."""
        return {name: task.names for name, task in (("kws", self.kws), ("sv", self.sv)) if task is not None}

    def keywords(self, split: str) -> Examples | None:
        """What keyword spotting is judged by on dev or test."""
        return None if self.kws is None else self.kws.dev if split == "dev" else self.kws.test

    def trials(self, split: str) -> tuple[Asked, ...]:
        """What speaker verification is asked on dev or test, the list that counts first."""
        if self.sv is None:
            return ()
        if split == "dev":
            return (self.sv.dev,)
        at = self.sv.headline
        return (self.sv.tests[at], *self.sv.tests[:at], *self.sv.tests[at + 1 :])

    def judged(self, split: str) -> dict[str, list[str]]:
        """Of each task, the utterances that it is judged by on dev or test, once each."""
        judged: dict[str, list[str]] = {}
        if (keywords := self.keywords(split)) is not None:
            judged["kws"] = list(keywords.ids)
        if lists := self.trials(split):
            judged["sv"] = list(dict.fromkeys(name for asked in lists for name in asked.ids))
        return judged

    def digest(self, manifest: Manifest) -> str:
        """Of all that is learned from and judged by, the audio included."""
        named: dict[str, Any] = {"classes": {task: list(names) for task, names in self.classes.items()}}
        for task, examples in self.train.items():
            named[f"{task} train"] = _rows(examples)
        for split in ("dev", "test"):
            if (keywords := self.keywords(split)) is not None:
                named[f"kws {split}"] = _rows(keywords)
            for asked in self.trials(split):
                named[f"sv {split} {asked.name}"] = [list(asked.ids), asked.pairs.tolist(), asked.same.tolist()]
        audio = {name: manifest.by_id[name].audio for name in self.ids(manifest)}
        return digest_json({"labels": named, "audio": audio})

    def ids(self, manifest: Manifest) -> list[str]:
        """Every utterance that is read, in the order of the manifest."""
        used = {name for examples in self.train.values() for name in examples.ids}
        for split in ("dev", "test"):
            used.update(name for names in self.judged(split).values() for name in names)
        return [u.id for u in manifest if u.id in used]


def examples_of(tasks: Tasks, manifest: Manifest, trials: Sequence[Trial] | None) -> AllExamples:
    """Sort the utterances into tasks and splits.

    Args:
        tasks: those that are learned.
        manifest: all utterances.
        trials: of speaker verification; None where none were given.

    Raises:
        DataError: a task without utterances, labels or trials, or that leaks.
        SettingsError: no trials were given, or the list that the settings name is not among them.
    """
    for name in tasks.named:
        check(manifest, task_named(name))
    check_together(manifest, list(tasks.named))
    keywords = None if tasks.kws is None else labelled_splits(manifest, task_named("kws"))
    if tasks.sv is None:
        return AllExamples(keywords, None)
    if trials is None:
        raise SettingsError("tasks.sv is set, which is judged by trials: pass --trials data/trials.jsonl")
    return AllExamples(keywords, voice_splits(manifest, task_named("sv"), trials, tasks.sv.list))


def _rows(examples: Examples) -> list[list[Any]]:
    return [[name, number] for name, number in zip(examples.ids, examples.classes, strict=True)]
