"""A manifest in, the texts of its speech recognition task out, and the characters that spell them.

Spelled as SUPERB spells: in upper case, one space after every word, the last one too (so that a decoder with a lexicon
knows where it ends). Texts are to be as they are spoken: numbers in words, nothing that is not said. What a character is
in a text and not in the inventory is refused by name, never dropped unasked.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal

from cache.errors import DataError
from cache.manifest import Manifest
from pipeline.tasks.blstm import reduced
from pipeline.tasks.labels import Task, labels_by_split
from pipeline.tasks.phones import BLANK, frames_needed

SUPERB = tuple(" 'ABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""SUPERB's inventory: the space, the apostrophe and 26 letters."""

Spelling = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Alphabet:
    """The characters a head tells apart; `characters[i]` is `i + 1` in a spelling, 0 is CTC's blank."""

    characters: tuple[str, ...]

    def __len__(self) -> int:
        """Characters and blank."""
        return len(self.characters) + 1

    @property
    def space(self) -> int:
        """What ends a word."""
        return self.characters.index(" ") + BLANK + 1

    def spell(self, text: str) -> Spelling:
        """The characters of every word, each with its space."""
        return tuple(self.characters.index(character) + BLANK + 1 for character in f"{text} ")

    def text(self, spelling: Sequence[int]) -> str:
        """What a spelling reads: words apart by one space."""
        return " ".join("".join(self.characters[number - BLANK - 1] for number in spelling).split())

    def read(self, best: Sequence[int]) -> str:
        """The text of the best symbol of every frame: repeats are one, blanks are none."""
        return self.text([number for number, _ in groupby(best) if number != BLANK])


@dataclass(frozen=True, slots=True)
class Texts:
    """The utterances of one split, in manifest order, each with what is said."""

    ids: tuple[str, ...]
    texts: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_words(self) -> int:
        """Words of all utterances together."""
        return sum(len(text.split()) for text in self.texts)


@dataclass(frozen=True, slots=True)
class TextSplits:
    """Speech recognition over one manifest."""

    task: Task
    alphabet: Alphabet
    train: Texts
    dev: Texts
    test: Texts
    unfit: tuple[str, ...]
    """Training utterances with more characters than CTC can put into their frames: counted and not trained on."""


def text_splits(
    manifest: Manifest, task: Task, characters: Literal["superb", "corpus"], drop: str, reduce_frames: int
) -> TextSplits:
    """Normalise the texts of the utterances that take part, and refuse a task that cannot be scored.

    Raises:
        DataError: as `labels_by_split`; a text without words, a character that is not in the inventory, or no training
            utterance long enough for its text.
    """
    said = {
        split: [(name, normalise(text, drop)) for name, text in rows]
        for split, rows in labels_by_split(manifest, task).items()
    }
    known = SUPERB if characters == "superb" else inventory(text for _, text in said["train"])
    for rows in said.values():
        for name, text in rows:
            _check(name, text, known, task, characters)
    alphabet = Alphabet(known)
    unfit = {
        name
        for name, text in said["train"]
        if reduced(manifest.by_id[name].num_frames, reduce_frames) < frames_needed(alphabet.spell(text))
    }
    train = [row for row in said["train"] if row[0] not in unfit]
    if not train:
        raise DataError(
            f"task '{task.name}': none of the {len(unfit)} training utterances has as many frames as characters "
            f"(probes.{task.name}.reduce_frames is {reduce_frames}): make it smaller, or correct the texts of the corpus"
        )
    return TextSplits(task, alphabet, _texts(train), _texts(said["dev"]), _texts(said["test"]), tuple(sorted(unfit)))


def normalise(text: str, drop: str) -> str:
    """Upper case, without the characters of `drop`, one space between words."""
    return " ".join(text.upper().translate({ord(character): None for character in drop.upper()}).split())


def inventory(texts: Iterable[str]) -> tuple[str, ...]:
    """The characters of some texts and the space, sorted."""
    return tuple(sorted({" "}.union(*texts)))


def best_constant(texts: Sequence[str]) -> str:
    """The best answer that ignores the audio, of those that repeat one word: chosen on these texts, may be empty.

    From a text of n words, c of them `the`, to k times `the` it is max(n, k) - min(c, k) edits.
    """
    words = Counter(word for text in texts for word in text.split())
    favourite = min(words, key=lambda word: (-words[word], word))
    pairs = Counter((len(split), split.count(favourite)) for split in map(str.split, texts))

    def edits(k: int) -> int:
        return sum(times * (max(length, k) - min(there, k)) for (length, there), times in pairs.items())

    return " ".join([favourite] * min(range(max(length for length, _ in pairs) + 1), key=edits))


def _check(name: str, text: str, known: tuple[str, ...], task: Task, characters: str) -> None:
    if not text:
        raise DataError(
            f"{name} takes part in task '{task.name}' but nothing is left of its text without "
            f"probes.{task.name}.drop; drop '{task.name}' from its tasks"
        )
    if unknown := [character for character in text if character not in known]:
        where, other = (
            ("SUPERB's characters (A to Z and ')", f"set probes.{task.name}.characters to corpus")
            if characters == "superb"
            else ("the training texts", "add training speech that has it")
        )
        raise DataError(
            f"{name}: the character '{unknown[0]}' of its text is not among {where}; write the text out as it is spoken, "
            f"name the character in probes.{task.name}.drop if it is not, or {other}"
        )


def _texts(rows: list[tuple[str, str]]) -> Texts:
    return Texts(tuple(name for name, _ in rows), tuple(text for _, text in rows))
