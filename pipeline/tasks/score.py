"""What a probe found out about one model on one task: facts, written as they stand into the score's JSON."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from cache.errors import SettingsError
from pipeline.tasks.metrics import Confusion, Interval, PhoneErrors

MISSES = 8
"""Test errors a score names, the worst first."""


class Miss(NamedTuple):
    """A test utterance, or trial, on which the first seed's head was wrong."""

    ids: tuple[str, ...]
    """One utterance; of a trial both."""
    truth: str
    answer: str
    badness: float
    """How wrong, larger is worse: the probability of the answer less that of the truth; edits over true phones or words; how
    far the score of a trial is on the wrong side of the threshold of the EER."""


@dataclass(frozen=True, slots=True)
class SeedScore:
    """One seed at the chosen learning rate."""

    seed: int
    best_step: int
    dev: float
    test: float
    layer_weights: tuple[float, ...]

    @classmethod
    def of(cls, seed: int, best_step: int, dev: float, test: float, layer_weights: Float[Tensor, " L"]) -> "SeedScore":
        """With what training made as it is written: six digits."""
        return cls(seed, best_step, round(dev, 6), test, tuple(round(w, 6) for w in layer_weights.tolist()))


def mean_weights(parts: "Iterable[SeedScore | Score]") -> tuple[float, ...]:
    """Layer weights of all seeds, or folds, together."""
    return tuple(round(fmean(column), 6) for column in zip(*(part.layer_weights for part in parts), strict=True))


def at_edge(lr: float, tried: Sequence[float]) -> bool:
    """Whether it is the smallest or the largest of several."""
    return len(tried) > 1 and lr in (min(tried), max(tried))


def refuse_diverged(task: str, best_steps: Iterable[int], tried: Sequence[float]) -> None:
    """A sweep needs one head that came through.

    Args:
        task: as in `probes`.
        best_steps: of every run, 0 where no look at dev found it better than where it began: finite.
        tried: learning rates.

    Raises:
        SettingsError: none did.
    """
    if not any(best_steps):
        rates = ", ".join(f"{lr:g}" for lr in tried)
        raise SettingsError(
            f"probes.{task} diverged at every learning rate ({rates}); try smaller ones: probes.{task}.lrs"
        )


@dataclass(frozen=True, slots=True)
class Score:
    """What every task tells."""

    metric: str
    higher_is_better: bool
    mean: float
    sd: float | None
    interval: Interval
    """95 % interval for the test utterances there are, around the mean."""
    chance: float
    """What guessing gives: one over the number of classes; for PER 1, which is saying nothing."""
    majority: float
    """What the best answer gives that ignores the audio."""
    lr: float
    lr_at_edge: bool
    """The best learning rate is the smallest or largest one tried, so a better one may lie outside."""
    dev_by_lr: tuple[tuple[float, float], ...]
    seeds: tuple[SeedScore, ...]
    layers: tuple[str, ...]
    layer_weights: tuple[float, ...]
    """Mean over the seeds."""
    classes: tuple[str, ...]
    """Of a whole utterance, or phones."""
    counts: dict[str, int]
    misses: tuple[Miss, ...]
    """The worst test errors of the first seed, the worst first; none where all was right."""


@dataclass(frozen=True, slots=True)
class ProbeScore(Score):
    """A class for every utterance."""

    confusion: tuple[Confusion, ...]
    """Test answers of all seeds together."""


@dataclass(frozen=True, slots=True)
class PhoneScore(Score):
    """Phones of every utterance."""

    errors: PhoneErrors
    """Of all seeds together, on test."""
    test_phones: int
    unseen: int
    """Of the test phones, those that no training utterance has: errors for every head."""
    left_out: int
    """Training utterances that have fewer frames than CTC needs for their phones."""


@dataclass(frozen=True, slots=True)
class FoldScore:
    """One fold of a task in folds."""

    name: str
    mean: float
    lr: float
    tests: tuple[float, ...]
    """By seed."""
    best_steps: tuple[int, ...]
    """By seed."""
    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class FoldedScore(Score):
    """The mean over folds: `lr` is that of most folds, `best_step` of a seed its mean, `counts` are sums.

    Every utterance is in the test of one fold, so `counts["test"]` are different utterances; the others are not.
    """

    confusion: tuple[Confusion, ...]
    folds: tuple[FoldScore, ...]
