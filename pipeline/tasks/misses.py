"""What the first seed's head answered on test in, its worst errors out: what a person listens to afterwards.

Errors are ordered by how wrong they are; of two that are equally wrong the first by name comes first, so that the same
answers give the same bytes.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.tasks import metrics
from pipeline.tasks.phones import BLANK
from pipeline.tasks.score import MISSES, Miss

UNHEARD = "?"
"""Stands for a phone that no training utterance has; no head answers it."""


def worst(misses: Iterable[Miss]) -> tuple[Miss, ...]:
    """The `MISSES` worst, the worst first."""
    return tuple(sorted(misses, key=lambda miss: (-miss.badness, miss.ids))[:MISSES])


def of_classes(
    ids: Sequence[str], names: Sequence[str], logits: Float[Tensor, "U K"], truth: Int64[Tensor, " U"]
) -> tuple[Miss, ...]:
    """Utterances of which another class was named, by how much likelier it was taken to be than the true one."""
    shares = logits.double().softmax(-1)
    given = shares.argmax(-1)
    gaps = (shares.gather(1, given[:, None]) - shares.gather(1, truth[:, None]))[:, 0]
    gaps = gaps.nan_to_num(1.0)  # a head that diverged
    rows = torch.nonzero(given != truth)[:, 0].tolist()
    return worst(
        Miss((ids[row],), names[int(truth[row])], names[int(given[row])], round(float(gaps[row]), 6)) for row in rows
    )


def of_strings(
    ids: Sequence[str], names: Sequence[str], truths: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[Miss, ...]:
    """Utterances of which not all phones were heard right, by edits over true phones; `names[i]` is i + 1 in the strings."""
    return worst(
        Miss((name,), _spelled(truth, names), _spelled(answer, names), round(rate, 6))
        for name, truth, answer in zip(ids, truths, answers, strict=True)
        if (rate := metrics.phone_error_rate([truth], [answer])) > 0
    )


def _spelled(string: Sequence[int], names: Sequence[str]) -> str:
    symbols = (number - BLANK - 1 for number in string)
    return " ".join(names[symbol] if symbol < len(names) else UNHEARD for symbol in symbols)
