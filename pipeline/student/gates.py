"""Gates on what pruning may remove: an encoder's shape in, a number in [0, 1] for every channel, head and unit out.

A hard concrete variable (Louizos, Welling, Kingma 2018, arXiv 1712.01312) is a sigmoid of noise plus a learned
`log_alpha`, stretched a little past 0 and 1 and cut off there: exactly 0 or 1 most of the time, and yet with a gradient.

    u ~ U(eps, 1 - eps)    s = sigmoid((ln u - ln(1 - u) + log_alpha) / beta)    z = min(1, max(0, s (r - l) + l))

so P(z > 0) = sigmoid(log_alpha - beta ln(-l / r)). Constants and initialisation are those of DPHuBERT (arXiv 2305.17651).
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import BaseModel, Field
from torch import Tensor, nn

from pipeline.student.encoder import GateValues
from pipeline.student.shape import EncoderShape

Unit = Literal["conv", "heads", "ffn"]
UNITS: tuple[Unit, ...] = ("conv", "heads", "ffn")

LOW, HIGH = -0.1, 1.1  # l and r, where the sigmoid is stretched to
BETA = 2 / 3  # temperature
EPSILON = 1e-6  # keeps the noise finite
OPEN = -BETA * math.log(-LOW / HIGH)  # 1.5986: P(z > 0) is sigmoid(log_alpha + OPEN)
SOFTNESS = 0.8  # a closed gate lets sigmoid(0.8 log_alpha / beta) through: found by trial by FLOP's authors
INIT_STD = 0.01  # of log_alpha


class DropRates(BaseModel, frozen=True, extra="forbid"):
    """How likely a unit is to be off at first, leaving the stretch out of account: log_alpha starts at ln((1 - p) / p)."""

    conv: float = Field(gt=0, lt=1)
    """Channels of the convolutions; 0.01 in DPHuBERT."""
    heads: float = Field(gt=0, lt=1)
    """Attention heads; 0.01 in DPHuBERT."""
    ffn: float = Field(gt=0, lt=1)
    """Feed-forward units; 0.5 in DPHuBERT."""


class Counts(NamedTuple):
    """How many units each layer has, or is expected to have; in float64, where counts are exact."""

    conv: Float[Tensor, " C"]
    """Channels of each convolution."""
    heads: Float[Tensor, " L"]
    """Heads of each block."""
    ffn: Float[Tensor, " L"]
    """Feed-forward units of each block."""
    attends: Float[Tensor, " L"]
    """1 where a block has any head, or how likely it is to have one."""


def sizes_of(shape: EncoderShape, unit: Unit) -> tuple[int, ...]:
    """Units of one kind in each layer."""
    return {"conv": shape.conv_channels, "heads": shape.heads, "ffn": shape.ffn}[unit]


class Gates(nn.Module):
    """One hard concrete gate for every unit of the chosen kinds; units of the other kinds are always on.

    All N of them are one parameter, `log_alpha`: kind after kind (conv, heads, ffn), layer after layer.
    """

    def __init__(self, shape: EncoderShape, units: Sequence[Unit], drop: DropRates, generator: torch.Generator) -> None:
        """Draw log_alpha from N(ln((1 - p) / p), 0.01): a pure function of the generator."""
        super().__init__()
        self.units = tuple(unit for unit in UNITS if unit in units)
        self.sizes = {unit: sizes_of(shape, unit) for unit in UNITS}
        means = [math.log((1 - p) / p) for p in (getattr(drop, unit) for unit in self.units)]
        drawn = [
            torch.empty(sum(self.sizes[unit])).normal_(mean, INIT_STD, generator=generator)
            for unit, mean in zip(self.units, means, strict=True)
        ]
        self.log_alpha = nn.Parameter(torch.cat(drawn) if drawn else torch.empty(0))

    def keep(self, shift: float = 0.0) -> Float[Tensor, " N"]:
        """P(z > 0): how likely each gate is to be open at all, were log_alpha larger by `shift`; differentiable."""
        return torch.sigmoid(self.log_alpha + (OPEN + shift))

    def sample(self, generator: torch.Generator | None = None) -> GateValues:
        """What the gates let through in one step of training; differentiable.

        Args:
            generator: where the noise comes from, on the device of the gates; None is torch's own.
        """
        noise = torch.rand(
            self.log_alpha.shape, generator=generator, device=self.log_alpha.device, dtype=self.log_alpha.dtype
        )
        u = EPSILON + (1 - 2 * EPSILON) * noise
        s = torch.sigmoid((torch.log(u) - torch.log1p(-u) + self.log_alpha) / BETA)
        return self.values((s * (HIGH - LOW) + LOW).clamp(0.0, 1.0))

    @torch.no_grad()
    def kept(self, shift: float = 0.0) -> Bool[Tensor, " N"]:
        """Which units stay, by DPHuBERT's rule: of each layer round(n - expected number) go, the least likely ones.

        With a `shift`, as if log_alpha were larger by so much. A convolution keeps one channel at least, because without
        any there is nothing left to learn from.
        """
        kept = torch.ones_like(self.log_alpha, dtype=torch.bool)
        start = 0
        for kind, size in [(unit, size) for unit in self.units for size in self.sizes[unit]]:
            own = self.log_alpha[start : start + size]
            closing = round(size - torch.sigmoid(own.double() + (OPEN + shift)).sum().item())
            order = own.argsort(stable=True)[: min(closing, size - (kind == "conv"))]
            kept[start + order] = False
            start += size
        return kept

    @torch.no_grad()
    def closed(self, kept: Bool[Tensor, " N"] | None = None) -> GateValues:
        """The gates without noise: 0 for units that go, sigmoid(0.8 log_alpha / beta) for those that stay.

        Args:
            kept: which units stay; None is `kept()`.
        """
        kept = self.kept() if kept is None else kept
        return self.values(torch.sigmoid(SOFTNESS / BETA * self.log_alpha) * kept)

    def values(self, flat: Float[Tensor, " N"]) -> GateValues:
        """One number per gate, as the encoder takes them: per layer, with 1 where there is no gate."""
        return GateValues(*(self._split(flat, unit) for unit in UNITS))

    def counts(self, flat: Float[Tensor, " N"]) -> Counts:
        """What independent units, each there with the probability that `flat` gives, add up to in each layer."""
        conv, heads, ffn = ([part.double() for part in self._split(flat, unit)] for unit in UNITS)
        return Counts(
            conv=torch.stack([part.sum() for part in conv]),
            heads=torch.stack([part.sum() for part in heads]),
            ffn=torch.stack([part.sum() for part in ffn]),
            attends=torch.stack([1 - (1 - part).prod() for part in heads]),
        )

    def _split(self, flat: Float[Tensor, " N"], unit: Unit) -> list[Float[Tensor, " _"]]:
        if unit not in self.units:
            return [flat.new_ones(size) for size in self.sizes[unit]]
        start = sum(sum(self.sizes[before]) for before in self.units[: self.units.index(unit)])
        return list(flat[start : start + sum(self.sizes[unit])].split(self.sizes[unit]))
