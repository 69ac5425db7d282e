"""The language model against hand-worked numbers, the beam search against all alignments there are."""

import os
from importlib.util import find_spec
from itertools import groupby, product

import numpy as np
import pytest

from cache.errors import DataError, SettingsError
from pipeline.tasks import beam as module
from pipeline.tasks.beam import ArpaFile, Beam, BeamParams, TrainTexts, Weights, vocabulary
from pipeline.tasks.characters import Alphabet
from pipeline.tasks.kneserney import BEGIN, END, UNKNOWN, arpa, estimate

needs_beam = pytest.mark.skipif(find_spec("flashlight") is None, reason="the extra beam is not installed")
TEXTS = ("THE CAT SAT", "THE DOG SAT ON THE CAT", "A DOG", "THE DOG RAN", "ON A CAT THE DOG SAT")
ALPHABET = Alphabet(tuple(" ABCDEGHNORST"))
TINY = Alphabet(tuple(" AB"))
TINY_TEXTS = ("A AB", "B A", "AB B A", "A A", "BA A")


def beam(texts=TEXTS, alphabet=ALPHABET, order=3, width=2000, lm=None, **grid) -> Beam:
    grid = {"lm_weights": (1.0,), "word_bonuses": (0.0,)} | grid
    return Beam(BeamParams(lm=lm or TrainTexts(kind="train", order=order), width=width, **grid), alphabet, texts)


def test_a_model_worked_out_by_hand():
    # <s> A B </s>, <s> A C </s>. Pairs: <s>A twice, AB, AC, B</s>, C</s> once: D = 4 / (4 + 2) = 2/3.
    # Places: A, B, C after one word, </s> after two: D = 3 / (3 + 2) = 0.6, and 0.6 x 4 / 5 = 0.48 is for 5 words alike.
    model = estimate(["A B", "A C"], 2)
    assert model.probability((), "A") == pytest.approx(0.4 / 5 + 0.096)
    assert model.probability((), END) == pytest.approx(1.4 / 5 + 0.096)
    assert model.probability((), UNKNOWN) == model.probability((), "Z") == pytest.approx(0.096)
    assert model.probability(("A",), "B") == pytest.approx(1 / 6 + 2 / 3 * 0.176)  # seen
    assert model.probability(("A",), END) == pytest.approx(2 / 3 * 0.376)  # not seen
    assert model.probability((BEGIN,), "A") == pytest.approx(4 / 6 + 1 / 3 * 0.176)
    assert model.probability(("Z",), "A") == pytest.approx(0.176)  # a context never seen


@pytest.mark.parametrize("order", [1, 2, 3, 4, 6])
def test_probabilities_of_all_words_sum_to_one_after_every_context(order):
    model = estimate(TEXTS, order)
    words = {word for text in TEXTS for word in text.split()} | {END, UNKNOWN}
    contexts = {
        (),
        (BEGIN,),
        (BEGIN, "THE"),
        ("THE", "DOG"),
        ("SAT", "ON", "THE"),
        ("ZEBRA",),
        ("CAT", "ON"),
        ("DOG",) * 5,
    }
    for context in contexts | {gram for gram in model.backoff}:
        assert sum(model.probability(context, word) for word in words) == pytest.approx(1), context


@needs_beam
@pytest.mark.parametrize("order", [2, 3, 6])
def test_kenlm_reads_what_was_estimated(order):
    model, read = estimate(TEXTS, order), beam(order=order)
    for text in ("THE CAT SAT", "A CAT RAN", "ON ON ON THE", "DOG"):
        sentence, want = (BEGIN, *text.split(), END), 0.0
        for at in range(1, len(sentence)):
            want += np.log10(model.probability(sentence[:at], sentence[at]))
        assert read.log10(text) == pytest.approx(want, abs=1e-4)
    assert read.words == {"THE", "CAT", "SAT", "DOG", "ON", "A", "RAN"}


def exhaustive(log_probs: np.ndarray, search: Beam, weights: Weights) -> tuple[str, float]:
    """The best of all alignments that spell words of the lexicon, each of which ends with its space."""
    found = []
    for path in product(range(len(TINY)), repeat=len(log_probs)):
        heard = "".join(TINY.characters[number - 1] for number, _ in groupby(path) if number)
        words = heard.split()
        if (heard.endswith(" ") or not words) and set(words) <= search.words:
            lm = search.log10(" ".join(words))
            acoustic = sum(log_probs[t, number] for t, number in enumerate(path))
            found.append((acoustic + weights.lm * lm + weights.word * len(words), " ".join(words)))
    score, text = max(found)
    return text, score


@needs_beam
@pytest.mark.parametrize("weights", [Weights(0.0, 0.0), Weights(1.0, 0.0), Weights(2.0, -1.0), Weights(0.5, 1.5)])
def test_a_wide_beam_finds_the_best_of_all_alignments(weights):
    rng, search, texts = np.random.default_rng(0), beam(TINY_TEXTS, TINY, order=2), set()
    for _ in range(6):
        logits = rng.normal(size=(6, len(TINY))) * 2
        log_probs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)
        text, score = search.best(log_probs, weights)
        want, best = exhaustive(log_probs, search, weights)
        assert (text, score) == (want, pytest.approx(best, abs=1e-4))
        texts.add(text)
    assert len(texts) > 1


def spoken(text: str, alphabet: Alphabet, sure: float) -> np.ndarray:
    """Frames of a speaker who gives every character two of them, and a share of `sure`."""
    frames = [number for character in alphabet.spell(text) for number in (character, 0)]
    probabilities = np.full((len(frames), len(alphabet)), (1 - sure) / (len(alphabet) - 1))
    probabilities[range(len(frames)), frames] = sure
    return np.log(probabilities).astype(np.float32)


@needs_beam
def test_clear_speech_of_known_words_is_heard_and_the_model_decides_what_is_not_clear():
    search = beam(width=50)
    assert search.answers([spoken("THE DOG SAT", ALPHABET, 0.99)], Weights(1.0, 0.0)) == ["THE DOG SAT"]
    unclear = spoken("THE COG SAT", ALPHABET, 0.6)
    assert search.answers([unclear], Weights(1.0, 0.0)) == ["THE DOG SAT"], "COG is no word, and C is not sure"
    assert "ZEBRA" not in search.words


@needs_beam
def test_a_model_from_a_file_is_the_same_model_and_lower_case_is_upper_case(tmp_path):
    path = tmp_path / "lm.arpa"
    path.write_text(arpa(estimate([text.lower() for text in TEXTS], 3)))
    # no text reaches it: a model from elsewhere
    read = beam(texts=(), lm=ArpaFile(kind="arpa", path=str(path)), width=50)
    assert read.words == beam().words
    frames = [spoken(text, ALPHABET, 0.7) for text in ("THE COG SAT", "A RAT", "ON THE CAT")]
    assert read.answers(frames, Weights(1.5, 0.5)) == beam(width=50).answers(frames, Weights(1.5, 0.5))


@needs_beam
def test_words_that_cannot_be_spelled_are_not_in_the_lexicon(tmp_path):
    assert "CAT" not in beam(alphabet=Alphabet(tuple(" ADEGHNORST"))).words
    with pytest.raises(DataError, match="none of its 7 words is made of the characters of the task"):
        beam(alphabet=Alphabet((" ", "Z")))


@pytest.mark.parametrize("content", ["", "no such format\n", "\\1-grams:\n-1.0\n", b"\x1f\x8b\x08\xff"])
def test_what_is_no_arpa_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "lm.arpa"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=r"lm.arpa: it has no \\1-grams: of the ARPA format"):
        vocabulary(path)
    with pytest.raises(DataError, match="No such file.*probes.asr.beam.lm.path"):
        vocabulary(tmp_path / "other.arpa")


@needs_beam
def test_an_arpa_file_that_ends_too_early_is_refused_by_name(tmp_path, capfd):
    path = tmp_path / "lm.arpa"
    path.write_text(arpa(estimate(TEXTS, 2))[:400])
    with pytest.raises(DataError, match=r"lm.arpa: KenLM cannot read it \(.+\); correct probes.asr.beam.lm.path"):
        beam(lm=ArpaFile(kind="arpa", path=str(path)))
    beam()
    assert capfd.readouterr().err == "", "KenLM's progress is nobody's business"
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_without_the_extra_the_way_out_is_named(monkeypatch):
    def absent(name, extra):
        raise SettingsError(f"{name} is not installed; install the extra {extra}")

    monkeypatch.setattr(module, "from_extra", absent)
    with pytest.raises(SettingsError, match="flashlight.* the extra beam"):
        beam()
