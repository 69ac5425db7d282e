"""True texts and answers in, their word and character errors out, as jiwer counts them.

Both rates come from the same pair of strings: WER from their words, CER from all their characters, the space between two
words among them. Errors over truths of all utterances together, so that long ones count more, as everywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jiwer


class TextErrors(NamedTuple):
    """The edits of a shortest way from the true words (or characters) to an answer."""

    substitutions: int
    deletions: int
    insertions: int


class Counted(NamedTuple):
    """One utterance."""

    words: TextErrors
    characters: TextErrors


def word_error_rate(truths: Sequence[str], answers: Sequence[str]) -> float:
    """All edits of words over all true words."""
    return float(jiwer.wer(list(truths), list(answers)))


def character_error_rate(truths: Sequence[str], answers: Sequence[str]) -> float:
    """All edits of characters over all true characters."""
    return float(jiwer.cer(list(truths), list(answers)))


def counted(truth: str, answer: str) -> Counted:
    """The edits of one utterance; their sum over its words (or characters) is its rate."""
    by_word, by_character = jiwer.process_words(truth, answer), jiwer.process_characters(truth, answer)
    return Counted(
        TextErrors(by_word.substitutions, by_word.deletions, by_word.insertions),
        TextErrors(by_character.substitutions, by_character.deletions, by_character.insertions),
    )


def summed(errors: Sequence[TextErrors]) -> TextErrors:
    """The edits of several utterances together."""
    return TextErrors(*(sum(kind) for kind in zip(*errors, strict=True)))
