"""The loss of one task in, its part in the loss of both out: by fixed weights, or by weights that are learned.

Kendall, Gal and Cipolla (2018) weigh a task by how uncertain its answers are: with s_t = log sigma_t^2 learned, two
classifications have the loss sum_t exp(-s_t) L_t + s_t / 2. Its minimum over s_t is at exp(-s_t) = 1 / (2 L_t), where the
task counts 1/2 + log(2 L_t) / 2: every task falls by ratios, whatever the size of its loss.
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.finetune.settings import Fixed, Uncertainty


class LossWeights(nn.Module):
    """Of the tasks that are learned."""

    def __init__(self, params: Fixed | Uncertainty, tasks: Iterable[str]) -> None:
        super().__init__()
        self.fixed: dict[str, float] | None = None
        self.log_variance = nn.ParameterDict()
        if isinstance(params, Fixed):
            self.fixed = {task: getattr(params, task) for task in tasks}
        else:
            self.log_variance.update({task: nn.Parameter(torch.zeros(())) for task in tasks})

    def forward(self, task: str, loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
        """w_t L_t, or exp(-s_t) L_t + s_t / 2."""
        if self.fixed is not None:
            return self.fixed[task] * loss
        log_variance = self.log_variance[task]
        return torch.exp(-log_variance) * loss + log_variance / 2

    def now(self) -> dict[str, float]:
        """What each loss is multiplied by, for the curves; nothing where a person has fixed it."""
        return {f"{task}_weight": float(torch.exp(-s.detach())) for task, s in self.log_variance.items()}

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of what `now` tells."""
        return tuple(f"{task}_weight" for task in self.log_variance)
