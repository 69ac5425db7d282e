"""Names in, train, dev and test out: stable under everything but the names themselves.

A name's place is its SHA-256 and nothing else, so adding recordings to a corpus moves none of the others over a border
where the border is a fraction of all, and files may come in any order.
"""

from collections.abc import Iterable, Mapping
from hashlib import sha256

from pydantic import BaseModel, Field


class Fractions(BaseModel, frozen=True, extra="forbid"):
    """How much is held back; what remains is for training."""

    dev: float = Field(ge=0, le=0.5)
    """Part held back for choosing."""
    test: float = Field(ge=0, le=0.5)
    """Part held back for the score."""


class WithinSpeakers(BaseModel, frozen=True, extra="forbid"):
    """Speaker identification: every speaker on every side, so each one's utterances are shared out."""

    min_utterances: int = Field(ge=3)
    """Speakers with fewer take no part."""
    held_back: Fractions
    """Parts of each speaker's utterances."""


def stable_place(name: str) -> float:
    """The place of a name in [0, 1), uniform over names."""
    return int.from_bytes(sha256(name.encode()).digest()[:7], "big") / 2**56


def split_alone(name: str, fractions: Fractions) -> str:
    """The split of one name, whatever other names there are; the fractions hold on average."""
    place = stable_place(name)
    if place < fractions.test:
        return "test"
    return "dev" if place < fractions.test + fractions.dev else "train"


def split_together(names: Iterable[str], fractions: Fractions) -> dict[str, str]:
    """The splits of names that share them out: as near to the fractions as counts allow.

    A fraction above zero gets at least one name while one remains for training.
    """
    ordered = sorted(names, key=lambda name: (stable_place(name), name))
    num_test = share(len(ordered), fractions.test, len(ordered) - 1)
    num_dev = share(len(ordered), fractions.dev, len(ordered) - 1 - num_test)
    return {
        name: "test" if i < num_test else "dev" if i < num_test + num_dev else "train" for i, name in enumerate(ordered)
    }


def split_within(names: Mapping[str, str | None], params: WithinSpeakers | None) -> dict[str, str]:
    """The splits in speaker identification of names that have a speaker, for speakers who have enough."""
    by_speaker: dict[str, list[str]] = {}
    for name, speaker in names.items():
        if speaker is not None:
            by_speaker.setdefault(speaker, []).append(name)
    splits: dict[str, str] = {}
    for group in by_speaker.values():
        if params is not None and len(group) >= params.min_utterances:
            splits |= split_together(group, params.held_back)
    return splits


def share(count: int, fraction: float, at_most: int) -> int:
    """Names of `count` that a fraction takes, at least one if it is above zero, and no more than there are to take."""
    wanted = max(1, round(count * fraction)) if fraction > 0 else 0
    return max(0, min(wanted, at_most))
