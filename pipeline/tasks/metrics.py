"""Scores: what a probe answered and what was true in, accuracies and error rates with their uncertainty out.

Two kinds of uncertainty are kept apart: the spread over seeds (how the head was started and fed) and the sampling
error of a finite test split, which more seeds do not reduce.
"""

from collections import Counter
from collections.abc import Sequence
from math import sqrt
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from rapidfuzz.distance import Levenshtein
from torch import Tensor

RESAMPLES = 1000
"""Test splits drawn for a bootstrap interval."""
NORMAL_95 = 1.959963984540054
"""The standard normal quantile at 0.975."""


class Interval(NamedTuple):
    """Bounds of a share, both in [0, 1], or of an error rate, which may exceed 1."""

    low: float
    high: float


class Confusion(NamedTuple):
    """One cell of a confusion matrix that is not empty."""

    truth: int
    answer: int
    times: int


def accuracy(answers: Int64[Tensor, " U"], truth: Int64[Tensor, " U"]) -> float:
    """The share of utterances whose class was named."""
    return int((answers == truth).sum()) / len(truth)


def wilson_interval(share: float, trials: int) -> Interval:
    """The 95 % interval of a share seen in `trials` independent trials (Wilson 1927).

    Unlike share ± 1.96 sd it stays inside [0, 1] and is honest near both ends: 8 of 10 gives [0.490, 0.943], and
    10 of 10 gives [0.722, 1], where the plain normal interval would claim certainty.
    """
    z2 = NORMAL_95**2
    centre = share + z2 / (2 * trials)
    reach = NORMAL_95 * sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    scale = 1 + z2 / trials
    return Interval(max(0.0, (centre - reach) / scale), min(1.0, (centre + reach) / scale))


def confusion(answers: Int64[Tensor, " U"], truth: Int64[Tensor, " U"]) -> list[Confusion]:
    """The non-empty cells, by truth and answer: short even with a thousand classes."""
    counts = Counter(zip(truth.tolist(), answers.tolist(), strict=True))
    return [Confusion(was, named, counts[was, named]) for was, named in sorted(counts)]


class PhoneErrors(NamedTuple):
    """The edits of a shortest way from the true phones to an answer."""

    substitutions: int
    deletions: int
    insertions: int


def phone_errors(truth: Sequence[int], answer: Sequence[int]) -> PhoneErrors:
    """Edits between two strings of phones; their sum over `len(truth)` is the PER of an utterance.

    rapidfuzz counts them (it is what jiwer counts with): on integers, so that no symbol is taken for two.
    """
    kinds = Counter(edit.tag for edit in Levenshtein.editops(truth, answer))
    return PhoneErrors(kinds["replace"], kinds["delete"], kinds["insert"])


def phone_error_rate(truths: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> float:
    """All edits over all true phones: long utterances count more, as everywhere PER is reported."""
    edits = sum(Levenshtein.distance(truth, answer) for truth, answer in zip(truths, answers, strict=True))
    return edits / sum(map(len, truths))


def bootstrap_interval(errors: Float[Tensor, " U"], lengths: Int64[Tensor, " U"]) -> Interval:
    """The 95 % percentile interval of an error rate under drawing the test utterances anew (Bisani & Ney 2004).

    Always the same draws, so that the same scores give the same bytes.
    """
    generator = torch.Generator().manual_seed(0)
    errors, weights = errors.double(), lengths.double()
    rates = torch.empty(RESAMPLES, dtype=torch.float64)
    for number in range(RESAMPLES):
        drawn = torch.randint(len(errors), (len(errors),), generator=generator)
        rates[number] = errors[drawn].sum() / weights[drawn].sum()
    low, high = rates.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(low, high)


def mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; one value has no spread to speak of, hence None."""
    return fmean(values), stdev(values) if len(values) > 1 else None
