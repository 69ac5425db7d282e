"""Optimiser of a pretraining: a model in, AdamW out; a step in, its learning rate out (HuBERT, section IV.B)."""

from torch import nn
from torch.optim import AdamW

BETAS, EPSILON = (0.9, 0.98), 1e-6


def make_optimiser(model: nn.Module, weight_decay: float) -> AdamW:
    """AdamW that spares norms and biases the decay, as everywhere."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    spared = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON)


def rate_at(step: int, steps: int, peak: float, warmup: float) -> float:
    """Learning rate of update `step` in 1..steps: up to `peak` over a share `warmup` of them, then down to peak / steps."""
    rising = max(1, round(warmup * steps))
    return peak * min(step / rising, (steps - step + 1) / max(1, steps - rising))
