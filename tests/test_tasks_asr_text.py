"""Texts and their errors: spellings that come back, misfits that are refused, and rates that an own count confirms."""

import numpy as np
import pytest

from cache.errors import DataError
from cache.manifest import Manifest
from pipeline.tasks.characters import SUPERB, Alphabet, best_constant, normalise, text_splits
from pipeline.tasks.labels import TASKS
from pipeline.tasks.worderrors import TextErrors, character_error_rate, counted, summed, word_error_rate
from tests.probe_fixtures import utterance


def manifest(**texts: str) -> Manifest:
    """One utterance of 60 frames per split, or those given."""
    said = {"train": "yes", "dev": "no", "test": "yes no"} | texts
    return Manifest(
        tuple(utterance(split, 60, {"asr": split.split("_")[0]}, text=text) for split, text in said.items())
    )


def splits(characters="superb", drop="", reduce_frames=1, **texts: str):
    return text_splits(manifest(**texts), TASKS["asr"], characters, drop, reduce_frames)


def test_a_spelling_ends_every_word_and_reads_as_it_was_written():
    alphabet = Alphabet(SUPERB)
    assert len(alphabet) == 29
    assert alphabet.spell("A 'Z") == (3, 1, 2, 28, 1)
    for text in ("A 'Z", "IT'S A BEE"):
        assert alphabet.text(alphabet.spell(text)) == text


def test_the_best_frames_are_read_without_repeats_and_blanks():
    alphabet = Alphabet((" ", "A", "B"))
    blank, space, a, b = 0, 1, 2, 3
    assert alphabet.read([blank, a, a, blank, a, b, b, space, space, blank, space, b, blank]) == "AAB B"
    assert alphabet.read([blank, space, blank]) == ""


def test_texts_are_upper_case_with_one_space_and_without_what_is_to_be_dropped():
    assert normalise("  The  cat, (or dog)\n sat. ", ",.()") == "THE CAT OR DOG SAT"
    assert splits(train="Hello, you", drop=",").train.texts == ("HELLO YOU",)


@pytest.mark.parametrize(
    ("characters", "where", "other"),
    [
        ("superb", "SUPERB's characters", "characters to corpus"),
        ("corpus", "the training texts", "add training speech"),
    ],
)
def test_a_character_outside_the_inventory_is_refused_with_three_ways_out(characters, where, other):
    with pytest.raises(
        DataError, match=rf"toy/test: the character '4' of its text is not among {where}.*asr.drop.*{other}"
    ):
        splits(characters, train="yes no", test="4 yes")


def test_the_inventory_of_a_corpus_is_what_its_training_texts_have():
    found = splits("corpus", train="über 4", dev="rüb", test="4")
    assert found.alphabet.characters == tuple(" 4BERÜ")


def test_a_text_of_nothing_is_refused():
    with pytest.raises(DataError, match="nothing is left of its text without probes.asr.drop"):
        splits(dev="...", drop=".")


def test_training_texts_that_their_frames_cannot_hold_are_left_out_and_counted():
    # 60 frames in threes are 20: 19 letters and a space fit, one more does not, nor does a blank between two equal ones
    fits, long, doubled = "ABCDEFGHIJKLMNOPQRS", "ABCDEFGHIJKLMNOPQRST", "ABCDEFGHIJKLMNOPQRR"
    found = splits(reduce_frames=3, train=fits, train_long=long, train_doubled=doubled, test=long)
    assert (found.train.texts, found.unfit) == ((fits,), ("toy/train_doubled", "toy/train_long"))
    assert found.test.texts == (long,), "what is scored is never left out"
    with pytest.raises(DataError, match=r"none of the 1 training utterances.*reduce_frames is 3"):
        splits(reduce_frames=3, train=long)


def test_errors_worked_out_by_hand():
    # SAT is another word, the second THE is missing: 2 of 6 words; A becomes I and "THE " is missing: 5 of 22 characters
    truth, answer = "THE CAT SAT ON THE MAT", "THE CAT SIT ON MAT"
    assert counted(truth, answer) == (TextErrors(1, 1, 0), TextErrors(1, 4, 0))
    assert word_error_rate([truth], [answer]) == 2 / 6
    assert character_error_rate([truth], [answer]) == 5 / 22
    assert counted("A CAT", "A BIG CAT") == (TextErrors(0, 0, 1), TextErrors(0, 0, 4))
    assert counted("A B", "") == (TextErrors(0, 2, 0), TextErrors(0, 3, 0))
    # together: longer utterances count more, and too many words make more than all of them
    assert word_error_rate([truth, "A"], [answer, "A"]) == 2 / 7
    assert word_error_rate(["A"], ["B C D"]) == 3.0


def edits(truth, answer) -> int:
    """Wagner and Fischer's table, cell by cell."""
    row = list(range(len(answer) + 1))
    for i, a in enumerate(truth, 1):
        before, row[0] = row[0], i
        for j, b in enumerate(answer, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (a != b))
    return row[-1]


def test_rates_equal_an_independent_count_on_random_texts():
    rng = np.random.default_rng(0)
    pairs = [
        tuple(" ".join(rng.choice(["A", "AB", "BA", "ABBA"], size=rng.integers(1, 9))) for _ in "ta")
        for _ in range(200)
    ]
    truths, answers = zip(*pairs, strict=True)
    by_word = [edits(truth.split(), answer.split()) for truth, answer in pairs]
    by_character = [edits(truth, answer) for truth, answer in pairs]
    assert word_error_rate(truths, answers) == pytest.approx(sum(by_word) / sum(len(t.split()) for t in truths))
    assert character_error_rate(truths, answers) == pytest.approx(sum(by_character) / sum(map(len, truths)))
    found = [counted(*pair) for pair in pairs]
    assert [sum(one.words) for one in found] == by_word
    assert [sum(one.characters) for one in found] == by_character
    assert sum(summed([one.words for one in found])) == sum(by_word)


def test_the_best_constant_answer_is_the_best_of_all_repetitions():
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(["THE", "A", "CAT"], p=[0.6, 0.2, 0.2], size=rng.integers(1, 9))) for _ in range(40)]
    rates = [word_error_rate(texts, [" ".join(["THE"] * k)] * 40) for k in range(9)]
    assert word_error_rate(texts, [best_constant(texts)] * 40) == min(rates) < 1
    assert best_constant(["A B C D E F"]) == "A"
