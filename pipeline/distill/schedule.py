"""Learning rate and weight decay: a step in, its rate out; a model in, its parameter groups out."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import AdamW

BETAS, EPSILON = (0.9, 0.98), 1e-6  # DistilHuBERT, HuBERT


def rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Learning rate of update `step` in 1..steps: up to `peak` over a share `warmup` of them, then down in a line.

    Neither the first nor the last update has rate 0, so none is wasted.
    """
    rising = max(1, round(warmup * steps))
    if step <= rising:
        return peak * step / rising
    return peak * (steps - step + 1) / (steps - rising + 1)


def make_optimizer(
    modules: Iterable[nn.Module], learning_rate: float, weight_decay: float, more: Iterable[dict[str, Any]] = ()
) -> AdamW:
    """AdamW that decays matrices and kernels, and leaves biases, norms and the weight norm's magnitude alone.

    Every group has its highest rate as "peak", for `set_rates`; `more` are groups with a peak of their own. (s3prl's
    optimiser decays by 0.01 whatever its configuration says, LayerNorms included.)
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            is_free = parameter.ndim == 1 or name.endswith(("bias", "magnitude"))
            (free if is_free else decayed).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": weight_decay, "peak": learning_rate},
        {"params": free, "weight_decay": 0.0, "peak": learning_rate},
        *more,
    ]
    return AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON)


def set_rates(optimizer: AdamW, step: int, steps: int, warmup: float) -> float:
    """Give every group its rate of one step; gives that of the first, which is the student's."""
    for group in optimizer.param_groups:
        group["lr"] = rate_at(step, steps, group["peak"], warmup)
    rate: float = optimizer.param_groups[0]["lr"]
    return rate
