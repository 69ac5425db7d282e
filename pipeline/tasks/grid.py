"""A grid of probe heads: N seeds x R learning rates in, all of them trained side by side as one batched model.

SUPERB scores hinge on the learning rate (SID of HuBERT Base: 67 % at 1e-4, 81 % at 1e-1), so every probe is a sweep.
Heads are tiny and features are pooled; one at a time, the interpreter would be most of the cost. Here every parameter
carries two leading axes (N, R), each run keeps its own Adam state, clipping and best checkpoint, and no run can see
another: a head trained in a grid is the head trained alone. `Runs` is what any grid has, `HeadGrid` the one whose
heads see pooled features (`pipeline.tasks.framegrid` has the one whose heads see frames).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipeline.tasks.heads import ProbeHead

BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam as s3prl uses it


class RunScores(NamedTuple):
    """Accuracy and cross entropy of every run."""

    accuracy: Float[Tensor, "N R"]
    loss: Float[Tensor, "N R"]


class Runs:
    """The parameters of N x R heads and their Adam; a seed starts all its learning rates from the same head."""

    def __init__(self, heads: Sequence[ProbeHead], rates: Sequence[float], device: torch.device):
        self.rates = torch.tensor(rates, dtype=torch.float32, device=device)  # (R,)
        self.parameters = {
            name: torch.stack([dict(head.named_parameters())[name].detach() for head in heads])
            .unsqueeze(1)
            .repeat_interleave(len(rates), 1)
            .to(device)
            .requires_grad_()
            for name, _ in heads[0].named_parameters()
        }
        self._slow = {
            name: (torch.zeros_like(value), torch.zeros_like(value)) for name, value in self.parameters.items()
        }
        self._step = 0

    def descend(self, loss: Float[Tensor, ""], clip_norm: float | None) -> None:
        """One Adam step of every run at its own learning rate, down a loss that is a sum over runs."""
        gradients = dict(zip(self.parameters, torch.autograd.grad(loss, list(self.parameters.values())), strict=True))
        if clip_norm is not None:
            norm = torch.sqrt(sum(gradient.square().flatten(2).sum(-1) for gradient in gradients.values()))  # type: ignore[arg-type]
            scale = (clip_norm / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_
            gradients = {name: gradient * _beside(scale, gradient) for name, gradient in gradients.items()}
        self._step += 1
        with torch.no_grad():
            for name, value in self.parameters.items():
                gradient, (first, second) = gradients[name], self._slow[name]
                first.lerp_(gradient, 1 - BETAS[0])
                second.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
                root = (second / (1 - BETAS[1] ** self._step)).sqrt_().add_(EPSILON)
                value.sub_(_beside(self.rates[None], value) * first / ((1 - BETAS[0] ** self._step) * root))

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of all parameters as they stand."""
        return {name: value.detach().clone() for name, value in self.parameters.items()}


class HeadGrid(Runs):
    """Heads that see the pooled features of utterances."""

    def logits(self, means: Float[Tensor, "#N B L D"]) -> Float[Tensor, "N R B K"]:
        """`ProbeHead.pooled` of every run, each seed on its own batch (or all on one)."""
        at = self.parameters
        mixed = torch.einsum(
            "nrl,nbld->nrbd", at["layer_scores"].softmax(-1), means.expand(len(at["layer_scores"]), -1, -1, -1)
        )
        projected = mixed @ at["project.weight"].mT + at["project.bias"].unsqueeze(-2)
        return projected @ at["classify.weight"].mT + at["classify.bias"].unsqueeze(-2)

    def step(self, means: Float[Tensor, "N B L D"], classes: Int64[Tensor, "N B"], clip_norm: float | None) -> None:
        """One Adam step of every run at its own learning rate."""
        scores = self.logits(means)  # (N, R, B, K)
        loss = _cross_entropy(scores, classes[:, None].expand(scores.shape[:-1])).sum()  # a sum: runs do not mix
        self.descend(loss, clip_norm)

    @torch.no_grad()
    def scores(self, means: Float[Tensor, "U L D"], classes: Int64[Tensor, " U"], at_once: int = 256) -> RunScores:
        """Every run on the same utterances."""
        right = loss = torch.zeros_like(self.parameters["layer_scores"][..., 0])  # (N, R)
        for some, true in zip(means.split(at_once), classes.split(at_once), strict=True):
            answers = self.logits(some[None])
            target = true.expand(answers.shape[:-1])
            right = right + (answers.argmax(-1) == target).float().sum(-1)
            loss = loss + _cross_entropy(answers, target) * len(some)
        accuracy = (right / len(means)).where(loss.isfinite(), -torch.inf)  # no numbers at all have a largest one, too
        return RunScores(accuracy, loss / len(means))


class BestHeads(NamedTuple):
    """The best dev checkpoint of every run."""

    accuracy: Float[Tensor, "N R"]
    loss: Float[Tensor, "N R"]
    step: Int64[Tensor, "N R"]
    parameters: dict[str, Tensor]

    def head(self, seed: int, rate: int, like: ProbeHead) -> ProbeHead:
        """One run as a module of its own; `like` is overwritten."""
        like.load_state_dict({name: value[seed, rate].cpu() for name, value in self.parameters.items()})
        return like


def train(
    grid: HeadGrid,
    batches: Iterator[Int64[Tensor, "N B"]],
    train_split: tuple[Float[Tensor, "U L D"], Int64[Tensor, " U"]],
    dev_split: tuple[Float[Tensor, "V L D"], Int64[Tensor, " V"]],
    steps: int,
    validate_every: int,
    clip_norm: float | None,
    patience: int | None,
) -> BestHeads:
    """Train every run on pooled features and keep its best dev checkpoint."""
    means, classes = train_split

    def step() -> None:
        rows = next(batches).to(means.device)
        grid.step(means[rows], classes[rows], clip_norm)

    return keep_best(grid, step, lambda: grid.scores(*dev_split), steps, validate_every, patience)


def keep_best(
    runs: Runs,
    step: Callable[[], None],
    scores: Callable[[], RunScores],
    steps: int,
    validate_every: int,
    patience: int | None,
) -> BestHeads:
    """Take steps and keep every run's best dev checkpoint: higher accuracy, then lower cross entropy.

    A run whose last `patience` validations brought nothing better is over: its checkpoint no longer moves.
    """
    device = runs.rates.device
    shape = runs.parameters["layer_scores"].shape[:2]
    best = BestHeads(
        torch.full(shape, -torch.inf, device=device),
        torch.full(shape, torch.inf, device=device),
        torch.zeros(shape, dtype=torch.int64, device=device),
        runs.snapshot(),
    )
    idle = torch.zeros(shape, dtype=torch.int64, device=device)
    for number in range(1, steps + 1):
        step()
        if number % validate_every and number != steps:
            continue
        now = scores()
        better = (now.accuracy > best.accuracy) | ((now.accuracy == best.accuracy) & (now.loss < best.loss))
        if patience is not None:
            better &= idle < patience
        best = BestHeads(
            torch.where(better, now.accuracy, best.accuracy),
            torch.where(better, now.loss, best.loss),
            torch.where(better, torch.tensor(number, device=device), best.step),
            {
                name: torch.where(_beside(better, old), runs.parameters[name].detach(), old)
                for name, old in best.parameters.items()
            },
        )
        idle = torch.where(better, 0, idle + 1)
        if patience is not None and bool((idle >= patience).all()):
            break
    return best


def _cross_entropy(logits: Float[Tensor, "N R B K"], classes: Int64[Tensor, "N R B"]) -> Float[Tensor, "N R"]:
    """Mean over the batch, per run."""
    return (logits.logsumexp(-1) - logits.gather(-1, classes[..., None])[..., 0]).mean(-1)


def _beside(run: Float[Tensor, "#N R"] | Bool[Tensor, "N R"], value: Tensor) -> Tensor:
    """One number per run, shaped to multiply a parameter (N, R, ...)."""
    return run.reshape(*run.shape, *(1,) * (value.dim() - 2))
