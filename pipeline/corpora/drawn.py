"""The utterances of speaker verification in one split in, a drawn list of trials out.

For corpora that come without a list. Which trials are drawn depends on the ids alone: not on the order of files, not on
a generator. Speakers take turns, so that none has more trials than others while it has pairs left, and so do the
utterances of a speaker. The two of a trial never say the same words: were same-speaker trials of other words and
different-speaker trials of equal ones, hearing the words would answer some of them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TypeVar

from pydantic import BaseModel, Field

from cache.errors import DataError
from cache.manifest import Manifest, Utterance
from pipeline.corpora.splits import stable_place
from pipeline.corpora.trials import Trial

Pair = tuple[Utterance, Utterance]
T = TypeVar("T")


class TrialCounts(BaseModel, frozen=True, extra="forbid"):
    """How many trials a list has."""

    same: int = Field(ge=1)
    """Of one speaker."""
    different: int = Field(ge=1)
    """Of two."""


class DrawnTrials(BaseModel, frozen=True, extra="forbid"):
    """Trials that are drawn from a corpus, as the lists `CORPUS/dev` and `CORPUS/test`."""

    dev: TrialCounts | None
    """null draws none: a corpus whose dev speakers have one utterance each, or none."""
    test: TrialCounts | None
    """null where the corpus has official lists, or is only learned from."""


def words_of(utterance: Utterance) -> str | None:
    """What is said, in any case."""
    return utterance.text.casefold() if utterance.text is not None else None


def draw_trials(
    corpus: str,
    manifest: Manifest,
    params: DrawnTrials,
    scene: Callable[[Utterance], str | None] = words_of,
) -> list[Trial]:
    """The lists of one corpus: `same` trials of one speaker, then `different` trials of two.

    Args:
        corpus: whose utterances take part, where their task `sv` is in the split of the list.
        manifest: what was not quarantined.
        params: how many trials.
        scene: what the two of a trial must not have in common; None of an utterance is in common with nothing.

    Raises:
        DataError: the utterances do not give so many.
    """

    def apart(pair: Pair) -> bool:
        first, second = map(scene, pair)
        return first is None or first != second

    trials = []
    for split, counts in (("dev", params.dev), ("test", params.test)):
        if counts is None:
            continue
        groups = speakers_of([u for u in manifest if u.corpus == corpus and u.tasks.get("sv") == split])
        own = (filter(apart, every_two(group)) for group in groups)
        cross = (filter(apart, cross_pairs(*two)) for two in every_two(groups))
        for same, wanted, streams in ((True, counts.same, own), (False, counts.different, cross)):
            pairs = list(islice(in_turn(streams), wanted))
            if len(pairs) < wanted:
                raise DataError(
                    f"{corpus}/{split}: {sum(map(len, groups))} utterances of {len(groups)} speakers give {len(pairs)} "
                    f"trials, and prepare.sources.{corpus}.sv.{split}.{'same' if same else 'different'} is {wanted}; "
                    "lower it, or hold back more speakers"
                )
            trials += [Trial(f"{corpus}/{split}", same, first.id, second.id) for first, second in pairs]
    return trials


def speakers_of(utterances: Sequence[Utterance]) -> list[list[Utterance]]:
    """The utterances of each speaker who is known; speakers and utterances in the order of their names' hashes."""
    groups: dict[str, list[Utterance]] = {}
    for utterance in sorted(utterances, key=lambda u: (stable_place(u.id), u.id)):
        if utterance.speaker is not None:
            groups.setdefault(utterance.speaker, []).append(utterance)
    return [groups[name] for name in sorted(groups, key=lambda name: (stable_place(name), name))]


def every_two(circle: Sequence[T]) -> Iterator[tuple[T, T]]:
    """Every two of a circle once: those next to each other, then the next but one, ..."""
    count = len(circle)
    for distance in range(1, count // 2 + 1):
        for i in range(count if 2 * distance < count else count // 2):  # halfway round, both ways are one pair
            yield circle[i], circle[(i + distance) % count]


def cross_pairs(ours: Sequence[Utterance], theirs: Sequence[Utterance]) -> Iterator[Pair]:
    """Every utterance of one speaker with every one of another once, both in turn.

    Pair r is (r mod n, r + r // lcm(n, m) mod m): after lcm(n, m) pairs the same two would meet, so one moves on a place.
    """
    n, m = len(ours), len(theirs)
    start = int(stable_place(f"{ours[0].id} {theirs[0].id}") * n * m)  # else each speaker's first is always first
    for i in range(n * m):
        r = (start + i) % (n * m)
        yield ours[r % n], theirs[(r + r // math.lcm(n, m)) % m]


def in_turn(streams: Iterable[Iterator[Pair]]) -> Iterator[Pair]:
    """One pair of each stream, then another of each, until all are used up."""
    while True:
        left = []
        for stream in streams:
            for pair in islice(stream, 1):
                yield pair
                left.append(stream)
        if not left:
            return
        streams = left
