"""Scores of a run in, one number a model out: the SUPERB score, over the tasks that every model was judged on.

    S(u) = 1000 / |T| * sum_t  1 / |I_t| * sum_{i in I_t}  ( m_i(u) - m_i(zero) ) / ( m_i(thousand) - m_i(zero) )

T are the tasks, I_t the metrics of a task (slot filling has two, those here have one each). Error rates go in as they are:
that less is better cancels, because the thousand is below the zero. What the two points are decides what the number says:
SUPERB's own (its filter banks, and the best of its paper) are comparable with the public leaderboard on SUPERB's data alone;
on other data they are the run's: a model that stands for no learning, and the best teacher of each task.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from cache.errors import SettingsError
from pipeline.tasks.labels import TASKS

FBANK = {"pr": 0.8201, "asr": 0.2318, "kws": 0.4138, "sid": 0.2006, "sv": 0.0956, "er": 0.4824}
"""SUPERB's filter banks with tuned learning rates (Yang et al. 2021); another row of them, untuned, is up to 11 points off."""
BEST = {"pr": 0.0353, "asr": 0.0362, "kws": 0.9666, "sid": 0.9033, "sv": 0.0511, "er": 0.6762}
"""The best of each task in that paper."""


class OfModel(BaseModel, frozen=True, extra="forbid"):
    """The scores of a model of this run."""

    kind: Literal["model"]
    model: str


class Published(BaseModel, frozen=True, extra="forbid"):
    """SUPERB's: means something on its splits only."""

    kind: Literal["published"]


class OfBest(BaseModel, frozen=True, extra="forbid"):
    """The best teacher of this run, task by task."""

    kind: Literal["best"]


class SuperbParams(BaseModel, frozen=True, extra="forbid"):
    """What 0 and what 1000 is."""

    zero: Annotated[OfModel | Published, Field(discriminator="kind")]
    """{kind: model, model: NAME}, a baseline as a rule, or {kind: published}: SUPERB's filter banks."""
    thousand: Annotated[OfBest | Published, Field(discriminator="kind")]
    """{kind: best}: the best teacher of each task, or {kind: published}: the best of SUPERB's paper."""


@dataclass(frozen=True, slots=True)
class Superb:
    """The scores of a run."""

    zero: str
    """What scores 0, in words."""
    thousand: str
    points: dict[str, tuple[float, float]]
    """Task -> its score at 0 and at 1000; the tasks that count."""
    left_out: dict[str, str]
    """Task -> why it does not count."""
    scores: dict[str, float]
    """Model -> score; no model has one where no task counts."""


def superb_score(
    own: Mapping[str, Sequence[float]], zero: Mapping[str, Sequence[float]], thousand: Mapping[str, Sequence[float]]
) -> float:
    """The formula: by task its metrics, of a model, of what scores 0 and of what scores 1000."""
    tasks = [
        fmean((m - low) / (high - low) for m, low, high in zip(own[task], zero[task], thousand[task], strict=True))
        for task in zero
    ]
    return 1000 * fmean(tasks)


def superb_of(
    tasks: Sequence[str],
    means: Mapping[tuple[str, str], float],
    models: Sequence[str],
    teachers: Collection[str],
    params: SuperbParams,
) -> Superb:
    """Score every model over the tasks that all of them have: scores over different tasks do not compare.

    Args:
        tasks: those that ran.
        means: (model, task) -> score.
        models: all that were probed.
        teachers: those of them whose best may be the 1000.
        params: what 0 and what 1000 is.

    Raises:
        SettingsError: the model that is to score 0 was not probed.
    """
    if isinstance(params.zero, OfModel):
        zero = params.zero.model
        if zero not in models:
            raise SettingsError(
                f"report.superb.zero.model is '{zero}', which was not probed; choose one of {', '.join(models)}"
            )
        low = {task: means[zero, task] for task in tasks if (zero, task) in means}  # of every task that may count
    else:
        low, zero = FBANK, "SUPERB’s FBANK"
    if isinstance(params.thousand, OfBest):
        high, thousand = _best(tasks, means, teachers), "the best teacher of each task"
    else:
        high, thousand = BEST, "the best of SUPERB’s paper"
    points, left_out = dict[str, tuple[float, float]](), dict[str, str]()
    for task in tasks:
        missing = sum((model, task) not in means for model in models)
        if missing:
            left_out[task] = f"{missing} of {len(models)} models have no score"
        elif task not in low:
            left_out[task] = f"{zero} has no score"
        elif task not in high:
            left_out[task] = f"there is no score of {thousand}"
        elif not (high[task] > low[task] if TASKS[task].higher_is_better else high[task] < low[task]):
            left_out[task] = f"{thousand} is not better than {zero}"
        else:
            points[task] = (low[task], high[task])
    ends = [{task: [pair[end]] for task, pair in points.items()} for end in (0, 1)]
    own = {model: {task: [means[model, task]] for task in points} for model in models}
    scores = {model: superb_score(row, *ends) for model, row in own.items()} if points else {}
    return Superb(zero, thousand, points, left_out, scores)


def _best(tasks: Sequence[str], means: Mapping[tuple[str, str], float], teachers: Collection[str]) -> dict[str, float]:
    """Task -> the best score of these models; without tasks that none of them has."""
    found = {task: [means[name, task] for name in teachers if (name, task) in means] for task in tasks}
    return {task: (max if TASKS[task].higher_is_better else min)(of) for task, of in found.items() if of}
