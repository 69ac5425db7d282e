"""A manifest and trials in, speaker verification over them out: training speakers, and what is asked in dev and in test.

Voices of dev and test are none of the training's: verification is of people whom nobody knew while training, and
`pipeline.tasks.leaks` refuses a manifest where it is not.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from cache.errors import DataError, SettingsError
from cache.manifest import Manifest
from pipeline.corpora.trials import Trial, split_of
from pipeline.tasks.labels import Examples, Task, labels_by_split


@dataclass(frozen=True, slots=True)
class Asked:
    """N trials, and the U utterances they are about, each there once."""

    name: str
    """Of the list of trials."""
    ids: tuple[str, ...]
    """In manifest order."""
    pairs: Int64[np.ndarray, "N 2"]
    """The two utterances of each trial, counted in `ids`."""
    same: Bool[np.ndarray, " N"]
    speakers: Int64[np.ndarray, "N 2"]
    """Who says them; numbers that mean nothing but who is who."""
    lists: Int64[np.ndarray, " N"]
    """Which list each trial is of, counted from 0 by name: all the same in a test."""

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def each_list(self) -> list[Bool[np.ndarray, " N"]]:
        """Of each list, which trials are its own. Words of a second and sentences of ten have other thresholds, and no test
        asks for one: errors are of a list, never of lists thrown together."""
        return [self.lists == number for number in np.unique(self.lists)]


@dataclass(frozen=True, slots=True)
class VoiceSplits:
    """Speaker verification over one manifest."""

    task: Task
    names: tuple[str, ...]
    """The K training speakers, sorted; `train.classes` indexes them."""
    train: Examples
    dev: Asked
    """All trials of dev, of whichever list."""
    tests: tuple[Asked, ...]
    """The test trials of each list, by name."""
    headline: int
    """Of the tests, the one whose EER is the score."""

    @property
    def ids(self) -> tuple[str, ...]:
        """Every utterance that is read."""
        asked = [*self.dev.ids, *(name for test in self.tests for name in test.ids)]
        return tuple(dict.fromkeys([*self.train.ids, *asked]))

    @property
    def test_ids(self) -> tuple[str, ...]:
        """The utterances of all tests, each once."""
        return tuple(dict.fromkeys(name for test in self.tests for name in test.ids))


def voice_splits(manifest: Manifest, task: Task, trials: Sequence[Trial], headline: str | None) -> VoiceSplits:
    """Sort speakers and trials, and refuse what cannot be scored.

    Raises:
        DataError: as `labels_by_split` and `split_of`; an answer that the speakers contradict; no trials, or trials of one
            kind only, in dev or in a test list.
        SettingsError: `headline` is no list, or null where there are several.
    """
    labels = labels_by_split(manifest, task)
    splits = {name: split for split, rows in labels.items() for name, _ in rows}
    speaker = {name: who for rows in labels.values() for name, who in rows}
    asked: dict[str, dict[str, list[Trial]]] = {"dev": {}, "test": {}}
    for trial in trials:
        asked[split_of(trial, splits)].setdefault(trial.list, []).append(trial)
        if trial.same != (speaker[trial.first] == speaker[trial.second]):
            raise DataError(
                f"a trial of {trial.list} says that {trial.first} and {trial.second} are "
                f"{'one speaker' if trial.same else 'two speakers'}, and the manifest says {speaker[trial.first]} and "
                f"{speaker[trial.second]}; correct the list or the corpus"
            )
    for split, lists in asked.items():
        if not lists:
            raise DataError(
                f"task '{task.name}' has no {split} trials; have `decant prepare` draw some for a corpus with "
                f"{split} speakers, or leave the probe out"
            )
    dev = asked_about(manifest, "dev", [trial for rows in asked["dev"].values() for trial in rows], speaker)
    tests = tuple(asked_about(manifest, name, rows, speaker) for name, rows in sorted(asked["test"].items()))
    names = tuple(sorted({who for _, who in labels["train"]}))
    if len(names) < 2:
        raise DataError(f"task '{task.name}' has one training speaker only ('{names[0]}'); add others")
    index = {who: number for number, who in enumerate(names)}
    train = Examples(tuple(name for name, _ in labels["train"]), tuple(index[who] for _, who in labels["train"]))
    return VoiceSplits(task, names, train, dev, tests, headline_of(task, [test.name for test in tests], headline))


def asked_about(manifest: Manifest, name: str, trials: list[Trial], speaker: dict[str, str]) -> Asked:
    """Trials by number.

    Raises:
        DataError: all of one list are of one kind.
    """
    titles = sorted({trial.list for trial in trials})
    for title in titles:
        kinds = [trial.same for trial in trials if trial.list == title]
        if len(set(kinds)) < 2:
            kind = "one speaker" if kinds[0] else "two speakers"
            raise DataError(
                f"all {len(kinds)} trials of {title} are of {kind}; an error rate needs trials of both kinds"
            )
    wanted = {utterance for trial in trials for utterance in (trial.first, trial.second)}
    ids = tuple(utterance.id for utterance in manifest if utterance.id in wanted)
    place = {utterance: number for number, utterance in enumerate(ids)}
    voices = {who: number for number, who in enumerate(dict.fromkeys(speaker[utterance] for utterance in ids))}
    pairs = np.array([(place[t.first], place[t.second]) for t in trials])
    return Asked(
        name=name,
        ids=ids,
        pairs=pairs,
        same=np.array([trial.same for trial in trials]),
        speakers=np.array([voices[speaker[utterance]] for utterance in ids])[pairs],
        lists=np.array([titles.index(trial.list) for trial in trials]),
    )


def headline_of(task: Task, names: list[str], wanted: str | None) -> int:
    """Which list is the score.

    Raises:
        SettingsError: it is not said, and there are several; or there is none of that name.
    """
    if wanted is None and len(names) == 1:
        return 0
    if wanted not in names:
        problem = "is null, and there are several" if wanted is None else f"is {wanted!r}, and that is none"
        raise SettingsError(f"`list` of task '{task.name}' {problem}: choose one of {', '.join(names)}")
    return names.index(wanted)
