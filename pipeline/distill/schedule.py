"""Learning rate and weight decay: a step in, its rate out; a model in, its parameter groups out."""

from collections.abc import Iterable

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


def make_optimizer(modules: Iterable[nn.Module], weight_decay: float) -> AdamW:
    """AdamW that decays matrices and kernels, and leaves biases, norms and the weight norm's magnitude alone.

    (s3prl's optimiser decays by 0.01 whatever its configuration says, LayerNorms included.)
    """
    decayed: list[nn.Parameter] = []
    free: list[nn.Parameter] = []
    for module in modules:
        for name, parameter in module.named_parameters():
            is_free = parameter.ndim == 1 or name.endswith(("bias", "magnitude"))
            (free if is_free else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
    return AdamW(groups, lr=0.0, betas=BETAS, eps=EPSILON)
