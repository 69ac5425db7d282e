"""What a probe found out about how well a model tells voices apart: facts, written as they stand into the score's JSON."""

from dataclasses import dataclass

from pipeline.tasks.metrics import Interval
from pipeline.tasks.score import Score


@dataclass(frozen=True, slots=True)
class CostScore:
    """The least detection cost at any threshold, over that of listening to nobody: 0 is perfect, 1 useless."""

    p_target: float
    miss: float
    false_alarm: float
    mean: float
    """Over the seeds."""
    sd: float | None


@dataclass(frozen=True, slots=True)
class ListScore:
    """One list of test trials."""

    name: str
    trials: int
    same: int
    """Trials of one speaker."""
    speakers: int
    mean: float
    """The EER, mean over the seeds."""
    sd: float | None
    interval: Interval
    """95 %, under drawing the test speakers anew."""
    min_dcf: tuple[CostScore, ...]
    tests: tuple[float, ...]
    """The EER by seed."""


@dataclass(frozen=True, slots=True)
class SvScore(Score):
    """The EER of the headline list. `classes` are the training speakers, `counts` utterances, `dev_by_lr` the first seed's.

    `chance` and `majority` are 0.5: what whoever says the same of all trials has.
    """

    headline: str
    """The list whose EER is the score."""
    min_dcf: tuple[CostScore, ...]
    trials: dict[str, int]
    """Of dev, and of the headline list."""
    speakers: dict[str, int]
    lists: tuple[ListScore, ...]
    """Of every list of test trials, by name."""
