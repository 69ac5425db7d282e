"""Drawn trials: none twice, none against itself, speakers in turn, whatever the order of the files."""

import random
from collections import Counter
from itertools import combinations, product
from typing import get_args

import pytest

from cache.errors import DataError
from cache.manifest import Manifest, Utterance
from pipeline.corpora.drawn import DrawnTrials, TrialCounts, cross_pairs, draw_trials, every_two
from pipeline.corpora.sources import Source
from pipeline.corpora.voxceleb import video_of


def utterance(speaker: str | None, number: int, split: str = "test", text: str | None = None, **changes) -> Utterance:
    values = {
        "id": f"c/{speaker}-{number}",
        "corpus": "c",
        "path": f"{speaker}/{number % 2}/{number}.wav",
        "samples": 16_000,
        "rate_hz": 16_000,
        "file_samples": 16_000,
        "file_bytes": 1,
        "audio": f"{speaker} {number}",
        "split": split,
        "tasks": {"sv": split},
        "speaker": speaker,
        "text": text,
    }
    return Utterance(**{**values, **changes})


def speakers(sizes: dict[str, int], split: str = "test") -> list[Utterance]:
    return [utterance(name, n, split) for name, size in sizes.items() for n in range(size)]


def counts(same: int, different: int) -> DrawnTrials:
    return DrawnTrials(dev=None, test=TrialCounts(same=same, different=different))


def drawn(rows: list[Utterance], same: int, different: int, **options):
    return draw_trials("c", Manifest(tuple(rows)), counts(same, different), **options)


@pytest.mark.parametrize("count", range(8))
def test_every_two_of_a_circle_come_once(count):
    pairs = [frozenset(pair) for pair in every_two(range(count))]
    assert len(pairs) == len(set(pairs))
    assert set(pairs) == {frozenset(pair) for pair in combinations(range(count), 2)}


@pytest.mark.parametrize(("n", "m"), list(product((1, 2, 3, 4, 6), (1, 4, 6, 9))))
def test_every_utterance_of_one_speaker_meets_every_one_of_another_once(n, m):
    ours, theirs = speakers({"a": n}), speakers({"b": m})
    pairs = [(x.id, y.id) for x, y in cross_pairs(ours, theirs)]
    assert sorted(pairs) == sorted(product((u.id for u in ours), (u.id for u in theirs)))
    some = Counter(x for x, _ in pairs[:n])
    assert set(some.values()) == {1}, "in turn, from wherever they begin"


def test_all_there_is_can_be_drawn_and_nothing_twice():
    sizes = {"a": 5, "b": 2, "c": 1, "d": 4}
    rows = speakers(sizes)
    same = 10 + 1 + 0 + 6
    different = sum(x * y for x, y in combinations(sizes.values(), 2))
    trials = drawn(rows, same, different)
    pairs = {frozenset((t.first, t.second)) for t in trials}
    assert len(pairs) == len(trials) == same + different
    assert all(len(pair) == 2 for pair in pairs)
    who = {u.id: u.speaker for u in rows}
    assert all((who[t.first] == who[t.second]) == t.same for t in trials)
    assert {t.list for t in trials} == {"c/test"}
    for kind, most in (("same", same), ("different", different)):
        asked = {"same": 1, "different": 1, kind: most + 1}
        with pytest.raises(DataError, match=rf"c/test: 12 utterances of 4 speakers give {most} trials, and .*{kind}"):
            drawn(rows, **asked)


def test_speakers_and_their_utterances_take_turns():
    rows = speakers(dict.fromkeys("abcdefgh", 12))
    who = {u.id: u.speaker for u in rows}
    trials = drawn(rows, 8 * 12, 8 * 7)
    for same, share in ((True, 2 * 12), (False, 2 * 7)):
        voices = Counter(who[u] for t in trials if t.same == same for u in (t.first, t.second))
        assert set(voices.values()) == {share}
    heard = Counter(u for t in trials if t.same for u in (t.first, t.second))
    assert set(heard.values()) == {2}, "96 pairs of 96 utterances: each is in two"
    few = drawn(rows, 1, 8)  # fewer than pairs of speakers: each speaker is in two of them
    assert set(Counter(who[u] for t in few if not t.same for u in (t.first, t.second)).values()) == {2}


def test_a_speaker_with_few_utterances_gives_all_and_the_others_the_rest():
    rows = speakers({"a": 2, "b": 20, "c": 20})
    who = {u.id: u.speaker for u in rows}
    of = Counter(who[t.first] for t in drawn(rows, 21, 1) if t.same)
    assert of == {"a": 1, "b": 10, "c": 10}


def test_the_order_of_the_files_changes_nothing():
    rows = speakers({"a": 5, "b": 7, "c": 6})
    trials = drawn(rows, 12, 30)
    for seed in range(3):
        shuffled = random.Random(seed).sample(rows, len(rows))
        assert drawn(shuffled, 12, 30) == trials


def test_no_trial_has_the_same_words_twice():
    rows = [utterance(s, n, text=("Yes", "yes", "no")[n % 3]) for s in "abc" for n in range(6)]
    said = {u.id: u.text.casefold() for u in rows}
    trials = drawn(rows, 3 * 8, 3 * 16)  # each says yes four times and no twice: 4 * 2 of 15, and 2 * 4 * 2 of 36 pairs
    assert all(said[t.first] != said[t.second] for t in trials)
    with pytest.raises(DataError, match="give 24 trials"):
        drawn(rows, 25, 1)
    with pytest.raises(DataError, match="give 48 trials"):
        drawn(rows, 1, 49)


def test_of_voxceleb_the_two_are_of_different_videos():
    rows = speakers({"a": 4, "b": 4})
    video = {u.id: u.path.rsplit("/", 1)[0] for u in rows}
    assert all(video[t.first] != video[t.second] for t in drawn(rows, 8, 16, scene=video_of))
    with pytest.raises(DataError, match="give 8 trials"):
        drawn(rows, 9, 1, scene=video_of)


def test_every_kind_of_source_can_draw_but_those_of_actors():
    kinds = get_args(get_args(Source)[0])
    assert {kind.__name__ for kind in kinds if "sv" not in kind.model_fields} == {"IemocapParams", "RavdessParams"}


def test_lists_are_of_one_corpus_and_of_the_splits_that_are_asked_for():
    rows = [
        *speakers({"a": 3, "b": 3}),
        *speakers({"k": 3, "l": 3}, "dev"),
        *speakers({"t": 5, "u": 5}, "train"),
        utterance("x", 0, id="d/x", corpus="d"),
        utterance(None, 0),
        utterance("a", 9, tasks={"kws": "test"}),
    ]
    manifest = Manifest(tuple(rows))
    both = DrawnTrials(dev=TrialCounts(same=6, different=9), test=TrialCounts(same=6, different=9))
    trials = draw_trials("c", manifest, both)
    split = {u.id: u.tasks.get("sv") for u in rows}
    assert Counter((t.list, split[t.first], split[t.second]) for t in trials) == {
        ("c/dev", "dev", "dev"): 15,
        ("c/test", "test", "test"): 15,
    }
    assert draw_trials("c", manifest, DrawnTrials(dev=None, test=None)) == []
    with pytest.raises(DataError, match=r"e/test: 0 utterances of 0 speakers .*sources\.e\.sv\.test\.same is 1"):
        draw_trials("e", manifest, counts(1, 1))
