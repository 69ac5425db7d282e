"""Self-attention of one block: hidden states in, what to add to them out, and the map if a later block wants it.

Positions may enter as WavLM's gated relative bias (Chen et al. 2022, eqs. 1 to 6; buckets as in T5).
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pipeline.student.shape import EncoderShape, PositionBias


class OutputBias(nn.Module):
    """What is left of a sublayer whose every head or unit was pruned: it adds the same to each frame."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """The bias, for every frame of `x`."""
        return self.bias.expand_as(x)


def relative_buckets(frames: int, buckets: int, max_distance: int, device: torch.device) -> Int64[Tensor, " N"]:
    """Bucket of each key minus query in -(frames - 1)..frames - 1.

    Half of the buckets are for later keys; in each half the first half holds one distance each, the others grow
    logarithmically up to `max_distance`.
    """
    relative = torch.arange(1 - frames, frames, device=device)
    half = buckets // 2
    exact = half // 2
    distance = relative.abs()
    # in this order of operations, in float32, as the models were trained: a rounding may move a distance by one bucket
    grown = torch.log(distance.float() / exact) / math.log(max_distance / exact) * (half - exact)
    # distance 0 gives -inf, which no integer is: it has a bucket of its own, below
    far = (exact + grown.clamp(min=0.0)).long().clamp(max=half - 1)
    return (relative > 0).long() * half + torch.where(distance < exact, distance, far)


class RelativePositions(nn.Module):
    """The table of position biases that all blocks share; WavLM keeps it in its first block."""

    def __init__(self, shape: PositionBias) -> None:
        super().__init__()
        self.shape = shape
        self.table = nn.Parameter(torch.empty(shape.buckets, shape.heads))
        nn.init.normal_(self.table, std=0.02)

    def forward(self, frames: int) -> Float[Tensor, "H T T"]:
        """Bias of every key for every query, before a block gates it."""
        buckets = relative_buckets(frames, self.shape.buckets, self.shape.max_distance, self.table.device)
        by_distance = self.table[buckets].T  # (H, 2 T - 1)
        return by_distance.unfold(1, frames, 1).flip(1)  # the window of query t begins at distance -t


class Context(NamedTuple):
    """What blocks hand on to attention beside the hidden state."""

    keys: Bool[Tensor, "B 1 1 T"]
    """True at the frames that may be attended to."""
    bias: Float[Tensor, "H T T"] | None
    """Of relative positions, for every column of the table."""
    weights: Float[Tensor, "B H T T"] | None
    """The attention map of the block before, where this one or a later one shares it; without dropout."""


class Attention(nn.Module):
    """Multi-head self-attention; its heads need not fill the width, and there may be none.

    A map is shared as it was before dropout, and who attends with the map of another block does so without dropout, as
    ARMHuBERT does.
    """

    def __init__(self, shape: EncoderShape, index: int) -> None:
        super().__init__()
        width, inner = shape.width, shape.heads[index] * shape.head_width
        self.heads, self.dropout = shape.heads[index], shape.dropout.attention
        self.shares, self.is_shared = shape.shares(index), shape.shares(index + 1)
        self.query = self.key = self.value = self.gate = None
        self.out: nn.Module
        self.columns: Tensor | None = None
        if not self.heads:
            self.out = OutputBias(width)
            return
        if not self.shares:
            self.query = nn.Linear(width, inner)
            self.key = nn.Linear(width, inner)
        self.value = nn.Linear(width, inner)
        self.out = nn.Linear(inner, width)
        if shape.position_bias is not None and not self.shares:
            self.gate = nn.Linear(width // shape.position_bias.heads, 8)
            self.gate_scale = nn.Parameter(torch.ones(self.heads))
            self.table_heads = shape.position_bias.heads
            if shape.kept_heads is not None:
                del self.columns
                self.register_buffer("columns", torch.tensor(shape.kept_heads[index]), persistent=False)

    def forward(
        self, x: Float[Tensor, "B T D"], context: Context, head_gate: Float[Tensor, " H"] | None
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B H T T"] | None]:
        """What to add to `x`, and the map for the next block if that shares it; `head_gate` multiplies the heads."""
        if self.value is None:
            return self.out(x), None
        dropout = self.dropout if self.training and not self.shares else 0.0
        weights = None
        if self.shares or self.is_shared:
            weights = context.weights if self.shares else self._weights(x, context)
            assert weights is not None
            heard = nn.functional.dropout(weights, dropout) @ self._split(self.value(x))
        else:
            query, key = self._queries_and_keys(x)
            value = self._split(self.value(x))
            mask = self._mask(x, context, query.dtype)
            heard = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        if head_gate is not None:
            heard = heard * head_gate[:, None, None]
        return self.out(heard.transpose(1, 2).flatten(2)), weights if self.is_shared else None

    def _split(self, x: Float[Tensor, "B T E"]) -> Float[Tensor, "B H T W"]:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def _queries_and_keys(self, x: Float[Tensor, "B T D"]) -> tuple[Float[Tensor, "B H T W"], Float[Tensor, "B H T W"]]:
        assert self.query is not None
        assert self.key is not None
        return self._split(self.query(x)), self._split(self.key(x))

    def _weights(self, x: Float[Tensor, "B T D"], context: Context) -> Float[Tensor, "B H T T"]:
        query, key = self._queries_and_keys(x)
        scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
        mask = self._mask(x, context, scores.dtype)
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        return torch.softmax(scores, dim=-1)

    def _mask(self, x: Float[Tensor, "B T D"], context: Context, dtype: torch.dtype) -> Tensor:
        """Where to attend (B, 1, 1, T), or what to add to the scores (B, H, T, T)."""
        if context.bias is None or self.gate is None:
            return context.keys
        bias = context.bias if self.columns is None else context.bias[self.columns]
        slices = x.unflatten(2, (self.table_heads, -1)).transpose(1, 2)  # (B, table's heads, T, D / table's heads)
        if self.columns is not None:
            slices = slices[:, self.columns]
        # eqs. 4 to 6: an update gate and a reset gate, each the sum of four projections
        update, reset = torch.sigmoid(self.gate(slices).unflatten(3, (2, 4)).sum(4)).chunk(2, dim=3)  # (B, H, T, 1)
        gate = update * (reset * self.gate_scale[:, None, None] - 1.0) + 2.0
        return (gate * bias).masked_fill(~context.keys, -math.inf).to(dtype)
