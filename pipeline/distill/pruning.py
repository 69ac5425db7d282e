"""Sparsity control: how many parameters the gates leave, and when, in; what to add to the loss out.

DPHuBERT (arXiv 2305.17651) trains the gates under the constraint that the share s of parameters that go is t, by an
augmented Lagrangian whose multipliers climb while everything else descends:

    max over lambda, min over the rest:  L_distil + lambda_1 (s - t) + lambda_2 (s - t)^2

t rises in a line from 0. A second phase without gates trains on what is left.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, Field
from torch import Tensor, nn

from cache.errors import SettingsError
from pipeline.student.encoder import GateValues
from pipeline.student.gates import DropRates, Gates, Unit
from pipeline.student.shape import EncoderShape
from pipeline.student.size import fit, full_parameters, smallest_parameters

BETAS, EPSILON = (0.9, 0.999), 1e-8  # AdamW of the gates and multipliers: PyTorch's defaults, as in DPHuBERT


class FinalParams(BaseModel, frozen=True, extra="forbid"):
    """The second phase: distillation into what pruning has left, without gates."""

    steps: int = Field(ge=0)
    """Updates; 25 000 in DPHuBERT."""
    learning_rate: float = Field(gt=0)
    """Peak; 1e-4 in DPHuBERT, half of the first phase's."""
    warmup: float = Field(ge=0, le=1)
    """Share of the steps in which the rate rises; 0.2 in DPHuBERT."""


class PruneParams(BaseModel, frozen=True, extra="forbid"):
    """What is pruned, how far and how fast; `train` holds the first phase, in which the gates are learned."""

    units: tuple[Unit, ...] = Field(min_length=1)
    """What may be removed: conv (channels), heads, ffn (units); all three in DPHuBERT."""
    sparsity: float = Field(gt=0, lt=1)
    """Share of the encoder's parameters that go; 0.75 in DPHuBERT."""
    warmup_steps: int = Field(ge=0)
    """Updates in which the share to reach rises from 0; 5 000 of 50 000 in DPHuBERT."""
    gate_lr: float = Field(gt=0)
    """Peak learning rate of the gates; 0.02 in DPHuBERT."""
    lambda_lr: float = Field(gt=0)
    """Peak learning rate of the two multipliers; 0.02 in DPHuBERT."""
    drop: DropRates
    """Where the gates start."""
    rounding: Literal["each", "size"]
    """each: every layer keeps its own expected number of units (DPHuBERT). size: and then the least likely of the finest
    kind go, or the likeliest come back, until the number of parameters is as near to the sparsity as it can be."""
    final: FinalParams
    """The second phase."""


class SparsityControl(nn.Module):
    """The two multipliers, and what the sparsity should be at each step."""

    def __init__(self, params: PruneParams) -> None:
        super().__init__()
        self.params = params
        self.lambda1 = nn.Parameter(torch.zeros(()))
        self.lambda2 = nn.Parameter(torch.zeros(()))

    def target(self, step: int) -> float:
        """t of update `step` in 1, 2, ...: 0 in the first one, the whole sparsity after `warmup_steps` updates."""
        params = self.params
        if step > params.warmup_steps:
            return params.sparsity
        return params.sparsity * (step - 1) / params.warmup_steps

    def regulariser(self, sparsity: Float[Tensor, ""], step: int) -> Float[Tensor, ""]:
        """What is added to the loss of update `step`, for an expected `sparsity` of the gates."""
        gap = (sparsity - self.target(step)).to(self.lambda1.dtype)
        return self.lambda1 * gap + self.lambda2 * gap.square()

    def groups(self, gates: Gates) -> list[dict[str, Any]]:
        """Parameter groups for AdamW; `peak` is the learning rate where that of the weights is at its own peak.

        The multipliers are maximised: where the gates leave too much, they push harder every step.
        """
        common = {"weight_decay": 0.0, "betas": BETAS, "eps": EPSILON}
        return [
            {"params": [gates.log_alpha], "peak": self.params.gate_lr, "maximize": False, **common},
            {"params": [self.lambda1, self.lambda2], "peak": self.params.lambda_lr, "maximize": True, **common},
        ]

    def close(self, shape: EncoderShape, gates: Gates) -> GateValues:
        """The gates without noise at the end of the first phase, rounded as the settings say."""
        if self.params.rounding == "each":
            return gates.closed()
        return gates.closed(fit(shape, gates, round((1 - self.params.sparsity) * full_parameters(shape))))


def check_prunable(shape: EncoderShape, params: PruneParams) -> None:
    """Refuse before anything is trained.

    Raises:
        SettingsError: the removal of these units would change what the encoder computes, or the sparsity is out of reach.
    """
    if "conv" in params.units and shape.front_norm == "layer":
        raise SettingsError(
            "prune.units has conv, but the shape's front_norm is layer: a LayerNorm over the channels sees which ones are"
            " gone, so masking and removing them differ; prune heads and ffn only"
        )
    if "conv" in params.units and not shape.projection:
        raise SettingsError(
            "prune.units has conv, but the shape has no projection: the last convolution's channels are the width; prune"
            " heads and ffn only"
        )
    if "heads" in params.units and shape.shares_attention is not None and any(shape.shares_attention):
        raise SettingsError(
            "prune.units has heads, but some blocks share the attention map of the block before (shares_attention), head"
            " by head; prune conv and ffn only"
        )
    full, least = full_parameters(shape), smallest_parameters(shape, params.units)
    if least > (1 - params.sparsity) * full:
        raise SettingsError(
            f"prune.sparsity {params.sparsity} is out of reach: without any {', '.join(params.units)} {least} of the"
            f" {full} parameters would be left, a sparsity of {1 - least / full:.3f}; lower it or prune more kinds of units"
        )
