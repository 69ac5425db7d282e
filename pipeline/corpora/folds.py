"""The fold of a recording in, its split in every fold out: a probe task per fold.

Where a corpus is small, each part of its speakers is the test once, and the score is the mean. A manifest names a split
per task, so a task in folds is as many tasks: `er-1` is emotion recognition with the first fold as the test.
"""

from pipeline.corpora.splits import Fractions, split_alone


def fold_tasks(task: str, name: str, fold: int | None, folds: int, dev: float) -> dict[str, str]:
    """The splits of a recording in the tasks `task-1` to `task-N`; none where it is in no fold.

    Its own fold (from 1) has it as test. In every other fold it is dev with the probability `dev`, drawn anew for each
    (SUPERB: a random fifth of what is not the test, by recordings and not by speakers).
    """
    if fold is None:
        return {}
    held_back = Fractions(dev=dev, test=0)
    return {
        f"{task}-{i}": "test" if i == fold else split_alone(f"{task}-{i} {name}", held_back)
        for i in range(1, folds + 1)
    }
