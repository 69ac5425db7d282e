"""Where predictions come from: hidden states of a student in, one prediction per target out.

Two ways. `last`: heads on the last hidden state, one per target (DistilHuBERT, EKD). `layers`: every target is compared
with a hidden state of the student, or with the mean of several, through a linear layer (DPHuBERT: student and teacher
have the same depth, layer is compared with layer; SKILL: means of the same group; FitHuBERT, ARMHuBERT: a linear for each).
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, Field
from torch import Tensor, nn

from cache.errors import SettingsError
from pipeline.distill.heads import PredictionHeads, initialise_heads
from pipeline.layers.ensembles import HeadGroup
from pipeline.student.encoder import States
from pipeline.student.shape import EncoderShape

LayerName = int | Literal["projection"]


class LastLayer(BaseModel, frozen=True, extra="forbid"):
    """All targets from the last hidden state."""

    kind: Literal["last"]
    """last: prediction heads, which are left behind with the training."""


class LayerToLayer(BaseModel, frozen=True, extra="forbid"):
    """Every target from a hidden state of its own."""

    kind: Literal["layers"]
    """layers: a linear layer between the student's state and the target."""
    student: Literal["same"] | tuple[LayerName | tuple[LayerName, ...], ...]
    """same: the student's layers with the numbers of the teacher's. Or, for every target in order, a layer of the student,
    or a list of layers: a student of 4 blocks meets layers 3, 6, 9, 12 with [1, 2, 3, 4]."""
    several: Literal["mean", "last"]
    """What is taken where a target is made of several layers: the mean of the student's, or only the last of them."""
    linears: Literal["one", "each"] | tuple[tuple[int, ...], ...]
    """one: all targets share one linear layer. each: every target has its own. Or lists of targets, by position, that
    share one: DPHuBERT has [[0], [1, 2, 3]]. It starts as the identity where widths agree."""


Predict = Annotated[LastLayer | LayerToLayer, Field(discriminator="kind")]


class LastHeads(nn.Module):
    """Groups of heads on the last hidden state."""

    def __init__(self, width: int, groups: Sequence[HeadGroup], generator: torch.Generator) -> None:
        super().__init__()
        self.groups = nn.ModuleList(PredictionHeads(width, group.heads, group.width) for group in groups)
        for group in self.groups:
            assert isinstance(group, PredictionHeads)
            initialise_heads(group, generator)

    def forward(self, states: States, last: Float[Tensor, "B T D"]) -> list[Float[Tensor, "B _ T _"]]:
        """Predictions (B, N, T, E) of each group."""
        return [group(last) for group in self.groups]

    def kept(self) -> dict[str, Tensor]:
        """What is published; a group that is alone goes without a number."""
        return (self.groups[0] if len(self.groups) == 1 else self.groups).state_dict()


class LayerLinears(nn.Module):
    """Linear layers on hidden states."""

    def __init__(
        self,
        params: LayerToLayer,
        shape: EncoderShape,
        groups: Sequence[HeadGroup],
        targets: Sequence[tuple[LayerName, ...]],
        generator: torch.Generator,
    ) -> None:
        """Choose the states and make the linear layers.

        Args:
            params: the settings.
            shape: the student's.
            groups: of targets of one width.
            targets: for every target in order, the layers of the teacher it is made of.
            generator: draws weights where widths differ: U(-1/sqrt(D), 1/sqrt(D)), as heads are drawn.

        Raises:
            SettingsError: a layer that the student does not have, or linears that do not cover the targets once each.
        """
        super().__init__()
        self.sizes = [group.heads for group in groups]
        widths = [group.width for group in groups for _ in range(group.heads)]
        self.chosen = chosen_states(params, shape, targets)
        self.of = _shared(params, widths)
        self.linears = nn.ModuleList()
        for number in range(max(self.of) + 1):
            linear = nn.Linear(shape.width, widths[self.of.index(number)])
            bound = shape.width**-0.5
            with torch.no_grad():
                if linear.in_features == linear.out_features:
                    nn.init.eye_(linear.weight)
                else:
                    linear.weight.uniform_(-bound, bound, generator=generator)
                nn.init.zeros_(linear.bias)
            self.linears.append(linear)

    def forward(self, states: States, last: Float[Tensor, "B T D"]) -> list[Float[Tensor, "B _ T _"]]:
        """Predictions (B, N, T, E) of each group of targets."""
        made = []
        for layers, linear in zip(self.chosen, self.of, strict=True):
            first, *others = (states.projection if n == "projection" else states.hidden[n] for n in layers)
            state = sum(others, first) / len(layers) if others else first
            made.append(self.linears[linear](state))
        groups, begin = [], 0
        for size in self.sizes:
            groups.append(torch.stack(made[begin : begin + size], dim=1))
            begin += size
        return groups

    def kept(self) -> dict[str, Tensor]:
        """What is published."""
        return self.linears.state_dict()


Predictor = LastHeads | LayerLinears


def make_predictor(
    params: LastLayer | LayerToLayer,
    shape: EncoderShape,
    groups: Sequence[HeadGroup],
    targets: Sequence[tuple[LayerName, ...]],
    generator: torch.Generator,
) -> Predictor:
    """The heads or linears of a student; see `LayerLinears`."""
    if isinstance(params, LastLayer):
        return LastHeads(shape.width, groups, generator)
    return LayerLinears(params, shape, groups, targets, generator)


def chosen_states(
    params: LayerToLayer, shape: EncoderShape, targets: Sequence[tuple[LayerName, ...]]
) -> list[tuple[LayerName, ...]]:
    """For every target, the student's states it is compared with.

    Raises:
        SettingsError: as many lists as targets are wanted, of layers that the student has.
    """
    if params.student == "same":
        chosen = [tuple(target) for target in targets]
    else:
        chosen = [layers if isinstance(layers, tuple) else (layers,) for layers in params.student]
        if len(chosen) != len(targets):
            raise SettingsError(
                f"predict.student lists {len(chosen)} entries and there are {len(targets)} targets; one for each"
            )
    for layers in chosen:
        for layer in layers:
            if layer != "projection" and not 0 <= layer <= shape.num_blocks:
                raise SettingsError(
                    f"predict.student asks for layer {layer} of a student with layers 0 to {shape.num_blocks}; list its "
                    "layers, one entry for each target"
                )
    return chosen if params.several == "mean" else [layers[-1:] for layers in chosen]


def _shared(params: LayerToLayer, widths: Sequence[int]) -> list[int]:
    """The number of the linear of each target."""
    if params.linears == "each":
        return list(range(len(widths)))
    together = (tuple(range(len(widths))),) if params.linears == "one" else params.linears
    named = sorted(position for positions in together for position in positions)
    if named != list(range(len(widths))):
        raise SettingsError(
            f"predict.linears names targets {named} and there are {len(widths)}, counted from 0; name each once"
        )
    for positions in together:
        if len({widths[p] for p in positions}) > 1:
            raise SettingsError(
                "predict.linears puts targets of different widths together; give them linears of their own"
            )
    of = [0] * len(widths)
    for number, positions in enumerate(together):
        for position in positions:
            of[position] = number
    return of
