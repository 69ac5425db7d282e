"""Prediction heads: one hidden state of the student in, one prediction per target layer out.

DistilHuBERT's "expand-last" heads: Linear(D -> N D), GELU, then N separate Linear(D -> E) in one product. They are thrown
away when a student is used, and kept beside it to go on training.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn


class SplitLinear(nn.Module):
    """N linear layers side by side: a block-diagonal matrix of which only the blocks exist."""

    def __init__(self, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads, width, out_width))
        self.bias = nn.Parameter(torch.zeros(heads, out_width))

    def forward(self, x: Float[Tensor, "B N T D"]) -> Float[Tensor, "B N T E"]:
        """Each head its own product."""
        return x @ self.weight + self.bias[:, None, :]


class PredictionHeads(nn.Module):
    """N heads on the student's last hidden state; their width is the teacher's, whatever the student's is."""

    def __init__(self, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.expand = nn.Linear(width, heads * width)
        self.split = SplitLinear(width, heads, out_width)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B N T E"]:
        """One prediction per target layer."""
        # (B, T, N * D) -> (B, N, T, D)
        expanded = nn.functional.gelu(self.expand(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        return self.split(expanded)


@torch.no_grad()
def initialise_heads(heads: PredictionHeads, generator: torch.Generator) -> None:
    """Weights and biases U(-1/sqrt(D), 1/sqrt(D)), a pure function of the generator."""
    bound = heads.expand.in_features**-0.5
    for parameter in heads.parameters():
        parameter.uniform_(-bound, bound, generator=generator)
