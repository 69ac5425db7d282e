"""Probe tasks: a manifest and the name of a task in, its labelled splits out.

A task is one row of `TASKS`: which label of an utterance it predicts and how it is scored. Which utterances take part,
and in which split, is written in the manifest by `prepare`, because only the corpus knows its official splits.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from cache.errors import DataError, SettingsError
from cache.manifest import SPLITS, Manifest, Utterance


@dataclass(frozen=True, slots=True)
class Task:
    """What is predicted from an utterance, and how that is scored."""

    name: str
    """As in `probes.<name>` of params.yaml and `tasks` of the manifest."""
    title: str
    """For people."""
    superb: str
    """The SUPERB task whose head and procedure this one follows."""
    metric: str
    higher_is_better: bool
    field: str
    """The field of a manifest line that holds the label."""
    label: Callable[[Utterance], str | None]


def phones_of(utterance: Utterance) -> str | None:
    """The phones in order, apart by spaces, from their times or, where those are not known, from the pronunciation."""
    if utterance.phones is not None:
        return " ".join(symbol for symbol, _, _ in utterance.phones)
    return utterance.pronunciation


TASKS = {
    task.name: task
    for task in (
        Task("kws", "Keyword spotting", "KS", "accuracy", True, "keyword", lambda utterance: utterance.keyword),
        Task("sid", "Speaker identification", "SID", "accuracy", True, "speaker", lambda utterance: utterance.person),
        Task("pr", "Phone recognition", "PR", "PER", False, "phones", phones_of),
        Task("asr", "Speech recognition", "ASR", "WER", False, "text", lambda utterance: utterance.text),
        Task("sv", "Speaker verification", "ASV", "EER", False, "speaker", lambda utterance: utterance.person),
        Task("er", "Emotion or speaking style", "ER", "accuracy", True, "emotion", lambda utterance: utterance.emotion),
    )
}


@dataclass(frozen=True, slots=True)
class Examples:
    """The utterances of one split, in manifest order, each with the index of its class."""

    ids: tuple[str, ...]
    classes: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class LabelledSplits:
    """One task over one manifest."""

    task: Task
    names: tuple[str, ...]
    """The K classes, sorted; `Examples.classes` indexes them."""
    train: Examples
    dev: Examples
    test: Examples

    @property
    def ids(self) -> tuple[str, ...]:
        """Every utterance that takes part."""
        return self.train.ids + self.dev.ids + self.test.ids

    @property
    def chance(self) -> float:
        """Accuracy of a guess that is uniform over the classes."""
        return 1 / len(self.names)

    @property
    def majority(self) -> float:
        """Test accuracy of always naming the most frequent class of the training split (the first such by name)."""
        counts = Counter(self.train.classes)
        favourite = min(counts, key=lambda index: (-counts[index], index))
        return self.test.classes.count(favourite) / len(self.test)


def task_named(name: str) -> Task:
    """The row of the table, or a refusal that names the choices."""
    if name not in TASKS:
        raise SettingsError(f"there is no probe task '{name}'; choose one of {', '.join(sorted(TASKS))}")
    return TASKS[name]


def folds_of(manifest: Manifest, task: Task) -> tuple[Task, ...]:
    """The task in each of its folds, `er-1` to `er-N`; the task itself where no utterance names a fold of it.

    Raises:
        DataError: utterances with and without folds, or a fold missing before the last.
    """
    named = {name for utterance in manifest for name in utterance.tasks}
    prefix = f"{task.name}-"
    numbers = sorted(
        int(n) for n in (name.removeprefix(prefix) for name in named if name.startswith(prefix)) if n.isdecimal()
    )
    if not numbers:
        return (task,)
    if task.name in named:
        raise DataError(
            f"some utterances take part in '{task.name}' and others in its folds ('{prefix}{numbers[0]}'), which cannot "
            "be one score; leave one of the corpora out of `prepare.sources`, or give all of them folds"
        )
    if numbers != list(range(1, len(numbers) + 1)) or len(numbers) < 2:
        raise DataError(
            f"the folds of task '{task.name}' are {', '.join(map(str, numbers))}; they are numbered from 1 without a gap "
            "and at least two: correct the folds in `prepare.sources`"
        )
    return tuple(replace(task, name=f"{prefix}{number}") for number in numbers)


def whole_task(name: str) -> str:
    """The task that a name in a manifest belongs to: `er-3` is a fold of `er`."""
    whole, _, number = name.rpartition("-")
    return whole if whole in TASKS and number.isdecimal() else name


def labels_by_split(manifest: Manifest, task: Task) -> dict[str, list[tuple[str, str]]]:
    """(id, label) of the utterances that take part in `task`, by split, in manifest order.

    Raises:
        DataError: nobody takes part, a split is empty, or an utterance has no label.
    """
    labels: dict[str, list[tuple[str, str]]] = {split: [] for split in SPLITS}
    for utterance in manifest:
        split = utterance.tasks.get(task.name)
        if split is None:
            continue
        label = task.label(utterance)
        if label is None:
            raise DataError(
                f"{utterance.id} takes part in task '{task.name}' but has no {task.field}; "
                f"give it one or drop '{task.name}' from its tasks"
            )
        labels[split].append((utterance.id, label))
    if not any(labels.values()):
        raise DataError(
            f"no utterance of the manifest takes part in task '{task.name}'; "
            "add a corpus that labels it to `prepare.sources`, or drop the probe"
        )
    for split, rows in labels.items():
        if not rows:
            raise DataError(
                f"task '{task.name}' has no {split} utterances; a probe needs train, dev and test: "
                "change the split fractions of `prepare` or add data"
            )
    return labels


def labelled_splits(manifest: Manifest, task: Task) -> LabelledSplits:
    """Sort the utterances that take part in `task` into their splits, and refuse a task that cannot be scored."""
    labels = labels_by_split(manifest, task)
    names = tuple(sorted({label for _, label in labels["train"]}))
    index = {name: number for number, name in enumerate(names)}
    for split in ("dev", "test"):
        for utterance_id, label in labels[split]:
            if label not in index:
                raise DataError(
                    f"{utterance_id}: {task.field} '{label}' is in the {split} split of task '{task.name}' but has no "
                    "training example; add some, or leave that class out of the task"
                )
    if len(names) < 2:
        raise DataError(f"task '{task.name}' has one class only ('{names[0]}'); there is nothing to tell apart")

    def examples(split: str) -> Examples:
        rows = labels[split]
        return Examples(tuple(utterance_id for utterance_id, _ in rows), tuple(index[label] for _, label in rows))

    return LabelledSplits(task, names, examples("train"), examples("dev"), examples("test"))
