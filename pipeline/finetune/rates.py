"""A model and its settings in, parameter groups with a learning rate for each depth out; a step in, the rates of it out.

Layer-wise decay (ELECTRA, BEiT): with L blocks, block l of 1..L learns at rate * decay^(L - l), what stands below the first
block at rate * decay^L, and the convolutions at rate * decay^(L + 1). Heads have a rate of their own.
"""

import re
from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW

from pipeline.distill.schedule import BETAS, EPSILON, rate_at
from pipeline.finetune.model import Model
from pipeline.finetune.settings import FinetuneParams, Tuned


def depth_of(name: str, blocks: int, pre_norm: bool) -> int:
    """How far up in an encoder a parameter is: -1 in the convolutions, 0 below the first block, l in block l.

    The norm of a pre-norm encoder stands behind the last block. WavLM's table of positions, which all blocks read, is as
    high as the last one that does.
    """
    if name.startswith("front."):
        return -1
    if match := re.match(r"blocks\.(\d+)\.", name):
        return int(match[1]) + 1
    is_on_top = name.startswith("position_bias.") or (pre_norm and name.startswith("norm."))
    return blocks if is_on_top else 0


def make_optimizer(model: Model, weighting: nn.Module, params: FinetuneParams) -> AdamW:
    """AdamW over all that moves; what does not is told to (`requires_grad`).

    Matrices and kernels decay; biases, norms, layer weights, the weight norm's magnitude and loss weights do not.
    """
    tuned, train = params.encoder, params.train
    groups: list[dict[str, Any]] = []
    heads = [(name, parameter) for name, parameter in model.heads.named_parameters()]
    heads += [(f"weighting.{name}", parameter) for name, parameter in weighting.named_parameters()]
    groups += _decayed_or_not(heads, train.head_learning_rate, 0, train.weight_decay)
    shape = model.encoder.shape
    depths: dict[int, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.encoder.named_parameters():
        depth = depth_of(name, shape.num_blocks, shape.pre_norm)
        if name == "feature_scale":
            continue  # what pruning left of the gates does not learn
        if not isinstance(tuned, Tuned) or (tuned.freeze_convolutions and depth < 0):
            parameter.requires_grad_(False)
        else:
            depths.setdefault(depth, []).append((name, parameter))
    if isinstance(tuned, Tuned):
        for depth, named in sorted(depths.items(), reverse=True):
            rate = tuned.learning_rate * tuned.layer_decay ** (shape.num_blocks - depth)
            groups += _decayed_or_not(named, rate, tuned.frozen_steps, train.weight_decay)
    return AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON)


def set_rates(optimizer: AdamW, step: int, params: FinetuneParams) -> float:
    """Give every group its rate of update `step` in 1..steps; gives the heads'.

    A group's schedule begins after the steps in which it is frozen.
    """
    for group in optimizer.param_groups:
        began, steps = group["begins_after"], params.train.steps
        moves = step > began
        group["lr"] = rate_at(step - began, steps - began, group["peak"], params.train.warmup) if moves else 0.0
    rate: float = optimizer.param_groups[0]["lr"]
    return rate


def _decayed_or_not(
    named: Iterable[tuple[str, nn.Parameter]], rate: float, begins_after: int, weight_decay: float
) -> list[dict[str, Any]]:
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for name, parameter in named:
        (free if parameter.ndim <= 1 or name.endswith(("bias", "magnitude")) else decayed).append(parameter)
    both = [(decayed, weight_decay), (free, 0.0)]
    return [
        {"params": some, "weight_decay": decay, "peak": rate, "begins_after": begins_after}
        for some, decay in both
        if some
    ]
