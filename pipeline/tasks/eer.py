"""Scores of trials and which of them are of one speaker in; the equal error rate, the detection cost and their spread out.

A trial is accepted where its score reaches a threshold. Lowering the threshold trades misses (one speaker, refused) for
false alarms (two speakers, accepted); both are steps of the sorted scores, and trials of equal score fall together.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int64
from pydantic import BaseModel, Field

from cache.errors import DataError
from pipeline.tasks.metrics import RESAMPLES, Interval


class DetectionCost(BaseModel, frozen=True, extra="forbid"):
    """What errors cost where a system is used: NIST's detection cost function."""

    p_target: float = Field(gt=0, lt=1)
    """How often the two are one speaker, there; VoxCeleb's challenge: 0.05, NIST: 0.01."""
    miss: float = Field(gt=0)
    """Cost of refusing the right speaker."""
    false_alarm: float = Field(gt=0)
    """Cost of accepting another."""


class EqualError(NamedTuple):
    """Where misses and false alarms are equally frequent."""

    rate: float
    threshold: float


class ErrorRates(NamedTuple):
    """Both errors at every threshold, from above all scores to the lowest: P is one more than there are different scores."""

    thresholds: Float[np.ndarray, " P"]
    misses: Float[np.ndarray, " P"]
    false_alarms: Float[np.ndarray, " P"]


class Ranked:
    """The trials of one list by falling score, sorted once: the rates follow for any weights of the trials."""

    def __init__(self, scores: Float[np.ndarray, " N"], same: Bool[np.ndarray, " N"]) -> None:
        """Sort.

        Raises:
            DataError: trials of one kind only, which have no equal error rate, or a score that is not finite.
        """
        if same.all() or not same.any():
            kind = "one speaker" if same.all() else "two speakers"
            raise DataError(f"all {len(same)} trials are of {kind}; an error rate needs trials of both kinds")
        if not np.isfinite(scores).all():
            raise DataError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} trial scores are not finite")
        self._order = np.argsort(-scores, kind="stable")
        ranked = scores[self._order]
        self._last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # the last trial of each score
        self._thresholds = np.concatenate([[np.inf], ranked[self._last]]).astype(np.float64)
        self._same = same[self._order]

    def rates(self, weights: Float[np.ndarray, " N"] | None = None) -> ErrorRates:
        """Misses and false alarms, each trial counted as often as its weight says (both kinds need some)."""
        weight = np.ones(len(self._order)) if weights is None else weights[self._order]
        hits = np.cumsum(np.where(self._same, weight, 0.0))
        alarms = np.cumsum(np.where(self._same, 0.0, weight))
        return ErrorRates(
            self._thresholds,
            1 - np.concatenate([[0.0], hits[self._last] / hits[-1]]),
            np.concatenate([[0.0], alarms[self._last] / alarms[-1]]),
        )


def equal_error(rates: ErrorRates) -> EqualError:
    """Where the ROC, drawn as straight lines between its points, meets misses = false alarms.

    SUPERB's EER is read off the same lines. All scores equal are one line from corner to corner: 0.5.
    """
    ahead = rates.misses - rates.false_alarms  # from 1 down to -1, never up
    after = int(np.argmax(ahead <= 0))
    before = after - 1
    part = ahead[before] / (ahead[before] - ahead[after])
    rate = rates.false_alarms[before] + part * (rates.false_alarms[after] - rates.false_alarms[before])
    low, high = rates.thresholds[after], rates.thresholds[before]
    return EqualError(float(rate), float(low if before == 0 else high + part * (low - high)))


def min_dcf(rates: ErrorRates, cost: DetectionCost) -> float:
    """The cost at the best threshold there is, over that of the better of accepting all and refusing all: at most 1."""
    miss, alarm = cost.miss * cost.p_target, cost.false_alarm * (1 - cost.p_target)
    return float((miss * rates.misses + alarm * rates.false_alarms).min() / min(miss, alarm))


def separation(scores: Float[np.ndarray, " N"], same: Bool[np.ndarray, " N"]) -> float:
    """Distance of the two kinds' means in standard deviations: it goes on telling where the EER of few trials is 0."""
    one, two = scores[same].astype(np.float64), scores[~same].astype(np.float64)
    return float((one.mean() - two.mean()) / (np.sqrt((one.var() + two.var()) / 2) + 1e-9))


def speaker_interval(
    runs: Sequence[Ranked],
    speakers: Int64[np.ndarray, "N 2"],
    same: Bool[np.ndarray, " N"],
    statistic: Callable[[ErrorRates], float] = lambda rates: equal_error(rates).rate,
    resamples: int = RESAMPLES,
) -> Interval:
    """The 95 % percentile interval of a rate, mean over runs on the same trials, under drawing the speakers anew.

    Trials that share a voice are not independent, so voices are drawn, not trials: a speaker drawn n times brings each
    of his trials n times, and speakers drawn n and k times bring a trial between them n k times. Draws without a trial of
    each kind are drawn again. Always the same draws, so that the same scores give the same bytes.
    """
    num = int(speakers.max()) + 1
    generator = np.random.default_rng(0)
    found: list[float] = []
    while len(found) < resamples:
        times = np.bincount(generator.integers(num, size=num), minlength=num).astype(np.float64)
        weights = np.where(same, times[speakers[:, 0]], times[speakers[:, 0]] * times[speakers[:, 1]])
        if weights[same].any() and weights[~same].any():
            found.append(float(np.mean([statistic(run.rates(weights)) for run in runs])))
    low, high = np.quantile(found, [0.025, 0.975]).tolist()
    return Interval(low, high)
