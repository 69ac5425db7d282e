"""A manifest in, the phone strings of its phone recognition task out: inventory, splits, and what cannot be learned from.

A phone is a symbol of the corpus as it stands: stress and inventory are the corpus' business (`stress` of those that
have it). What is left out here are symbols that are no phones, such as the silence between words: a CTC head has its
blank for them, and SUPERB's strings, made from lexica, have none either.
"""

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from cache.errors import DataError
from cache.manifest import Manifest
from pipeline.tasks.labels import Task, labels_by_split

BLANK = 0
"""Index of CTC's blank; phones are counted from 1."""

PhoneString = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Spoken:
    """The utterances of one split, in manifest order, each with its phones."""

    ids: tuple[str, ...]
    strings: tuple[PhoneString, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_phones(self) -> int:
        """Phones of all utterances together."""
        return sum(map(len, self.strings))


@dataclass(frozen=True, slots=True)
class SpokenSplits:
    """Phone recognition over one manifest."""

    task: Task
    names: tuple[str, ...]
    """The phones of the training split, sorted; `names[i]` is `i + 1` in the strings, and any other phone is K + 1."""
    train: Spoken
    dev: Spoken
    test: Spoken
    unfit: tuple[str, ...]
    """Training utterances with more phones than CTC can put into their frames: they are counted and not trained on."""

    @property
    def unseen(self) -> int:
        """Phones of the test split that no training utterance has: errors, whatever a head answers."""
        return sum(string.count(len(self.names) + 1) for string in self.test.strings)

    def constant(self) -> PhoneString:
        """The best answer that ignores the audio, of those that repeat one phone: chosen on train, may be empty.

        From a string of n phones, c of them `a`, to k times `a` it is max(n, k) - min(c, k) edits.
        """
        counts = Counter(phone for string in self.train.strings for phone in string)
        favourite = min(counts, key=lambda phone: (-counts[phone], phone))
        pairs = Counter((len(string), string.count(favourite)) for string in self.train.strings)
        longest = max(length for length, _ in pairs)
        edits = [
            sum(times * (max(length, k) - min(there, k)) for (length, there), times in pairs.items())
            for k in range(longest + 1)
        ]
        return (favourite,) * edits.index(min(edits))


def frames_needed(string: PhoneString) -> int:
    """Frames that CTC needs for a string: one a phone, and one blank between two of the same."""
    return len(string) + sum(a == b for a, b in pairwise(string))


def spoken_splits(
    manifest: Manifest, task: Task, silences: tuple[str, ...], unseen: Literal["refuse", "count"]
) -> SpokenSplits:
    """Turn the phones of the utterances that take part into strings, and refuse a task that cannot be scored.

    Raises:
        DataError: as `labels_by_split`; an utterance of silence alone, no training utterance long enough for its phones,
            or, where `unseen` is to be refused, a phone in dev or test that train does not have.
    """
    phones: dict[str, list[tuple[str, list[str]]]] = {}
    for split, rows in labels_by_split(manifest, task).items():
        phones[split] = [(name, [symbol for symbol in text.split() if symbol not in silences]) for name, text in rows]
        for name, symbols in phones[split]:
            if not symbols:
                raise DataError(
                    f"{name} takes part in task '{task.name}' but nothing is left of its phones without "
                    f"probes.{task.name}.silences; drop '{task.name}' from its tasks"
                )
    names = tuple(sorted({symbol for _, symbols in phones["train"] for symbol in symbols}))
    index = {symbol: number for number, symbol in enumerate(names, BLANK + 1)}
    for split in ("dev", "test"):
        for name, symbols in phones[split]:
            unknown = [symbol for symbol in symbols if symbol not in index]
            if unknown and unseen == "refuse":
                raise DataError(
                    f"{name}: the phone '{unknown[0]}' is in the {split} split of task '{task.name}' and in no training "
                    f"utterance; add training speech that has it, or have it counted as never heard: probes.{task.name}.unseen"
                )
    never = len(names) + 1  # no head answers this
    strings = {
        split: [(name, tuple(index.get(symbol, never) for symbol in symbols)) for name, symbols in rows]
        for split, rows in phones.items()
    }
    unfit = {name for name, string in strings["train"] if manifest.by_id[name].num_frames < frames_needed(string)}
    train = [row for row in strings["train"] if row[0] not in unfit]
    if not train:
        raise DataError(
            f"task '{task.name}': none of the {len(unfit)} training utterances has as many frames as phones; "
            "its phones are not those of its audio: correct the labels of the corpus"
        )
    return SpokenSplits(
        task, names, _spoken(train), _spoken(strings["dev"]), _spoken(strings["test"]), tuple(sorted(unfit))
    )


def _spoken(rows: list[tuple[str, PhoneString]]) -> Spoken:
    return Spoken(tuple(name for name, _ in rows), tuple(string for _, string in rows))
