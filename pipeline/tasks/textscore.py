"""What a probe of speech recognition found out about one model: facts, written as they stand into the score's JSON."""

from dataclasses import dataclass

from pipeline.tasks.metrics import Interval
from pipeline.tasks.score import Score
from pipeline.tasks.worderrors import TextErrors


@dataclass(frozen=True, slots=True)
class BeamScore:
    """The same heads with a language model, at the weights that are best on dev for the first seed's."""

    mean: float
    sd: float | None
    interval: Interval
    tests: tuple[float, ...]
    """By seed."""
    cer: float
    errors: TextErrors
    lm_weight: float
    word_bonus: float
    dev: float
    dev_by_weights: tuple[tuple[float, float, float], ...]
    """Weight of the language model, word bonus, WER on dev."""
    lexicon: int
    """Words that can be answered."""
    unknown: int
    """Of the test words, those that cannot: errors for every head."""


@dataclass(frozen=True, slots=True)
class AsrScore(Score):
    """Words of every utterance; `dev_by_lr` is of the first seed, `classes` are characters."""

    cer: float
    """Character error rate of the same answers, mean over seeds."""
    errors: TextErrors
    """Of words, of all seeds together, on test."""
    character_errors: TextErrors
    test_words: int
    test_characters: int
    left_out: int
    """Training utterances that have fewer frames than CTC needs for their characters."""
    beam: BeamScore | None
