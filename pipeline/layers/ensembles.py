"""Whom a student learns from: settings in, the teachers with their layers, and the groups of heads they ask for, out.

One teacher, by chosen layers or by groups of layers that are much alike (SKILL), or several that are combined in one of the
three ways of EKD (Huang et al. 2023): a head for every layer of every teacher, the average of their layers, or their layers
side by side.
"""

from typing import Annotated, Literal, NamedTuple

from pydantic import BaseModel, Field, model_validator

from cache.errors import SettingsError
from pipeline.extraction.settings import Layer

Layers = Annotated[tuple[Layer, ...], Field(min_length=1)]
"""Layers (0 is the transformer's input), `projection`, or lists of layers whose mean is stored."""


class Channel(BaseModel, frozen=True, extra="forbid"):
    """Bring every channel of every layer to mean 0 and standard deviation 1."""

    kind: Literal["channel"]
    """channel: statistics of each channel of each layer, over a sample of the store."""
    seconds: float = Field(gt=0)
    """Audio of the sample: 800 s are 40 000 frames. Stores of int8 and mvq have their own statistics, and those are used."""
    seed: int = Field(ge=0)
    """Of the draw of utterances."""


class Teacher(BaseModel, frozen=True, extra="forbid"):
    """One of several teachers."""

    teacher: str
    """Its name: there is a receipt NAME.json for it."""
    layers: Layers
    """Its layers, in order."""


class WeightedTeacher(Teacher, frozen=True, extra="forbid"):
    """One of several teachers, and how much it counts."""

    weight: float = Field(gt=0, allow_inf_nan=False)
    """Relative to the others: 1 and 3 are a quarter and three quarters."""


class SingleTeacher(BaseModel, frozen=True, extra="forbid"):
    """One prediction head per layer of one teacher."""

    kind: Literal["single"]
    """single: one teacher."""
    teacher: str
    """Its name: there is a receipt NAME.json for it."""
    layers: Layers
    """What to predict, one head each, in this order."""
    normalise: Channel | None
    """channel, with seconds and seed; null leaves the targets as they are stored, which is DistilHuBERT."""


class Heads(BaseModel, frozen=True, extra="forbid"):
    """One prediction head per layer of every teacher; the loss is the weighted mean over teachers."""

    kind: Literal["heads"]
    """heads: EKD's multiple prediction heads."""
    teachers: tuple[WeightedTeacher, ...] = Field(min_length=1)
    """Widths and numbers of layers may differ."""
    normalise: Channel | None
    """channel, with seconds and seed, or null."""


class Average(BaseModel, frozen=True, extra="forbid"):
    """One prediction head per position: it predicts the weighted mean of the n-th listed layer of every teacher."""

    kind: Literal["average"]
    """average: EKD's layerwise average."""
    teachers: tuple[WeightedTeacher, ...] = Field(min_length=1)
    """As many layers of each, of one width."""
    normalise: Channel | None
    """channel, with seconds and seed, before averaging, so that no teacher counts more for its scale; or null."""

    @model_validator(mode="after")
    def _as_many_layers(self) -> "Average":
        _check_numbers(self.teachers)
        return self


class Concat(BaseModel, frozen=True, extra="forbid"):
    """One prediction head per position: it predicts the n-th listed layer of every teacher, side by side."""

    kind: Literal["concat"]
    """concat: EKD's layerwise concatenation."""
    teachers: tuple[Teacher, ...] = Field(min_length=1)
    """As many layers of each; widths may differ."""
    normalise: Channel | None
    """channel, with seconds and seed, or null."""

    @model_validator(mode="after")
    def _as_many_layers(self) -> "Concat":
        _check_numbers(self.teachers)
        return self


class GroupParams(BaseModel, frozen=True, extra="forbid"):
    """How layers are put together."""

    num_groups: int = Field(ge=1)
    """K: targets of the student."""
    linkage: Literal["average", "complete", "single"]
    """The distance of two groups: the mean, largest or smallest of the distances of their layers."""
    contiguous: bool
    """Only neighbours may join, so a group is a stretch of layers."""
    leave_out: tuple[int, ...]
    """Layers of no group, such as [0], the input of the first block."""


class Groups(BaseModel, frozen=True, extra="forbid"):
    """One target per group of similar layers of one teacher: the mean of its layers (SKILL, arXiv 2402.16830)."""

    kind: Literal["groups"]
    """groups: `decant targets` makes them of what `decant similarity` found."""
    teacher: str
    """Its name: there is a receipt NAME.json for it, and a similarity NAME.json."""
    groups: GroupParams
    """How layers are put together."""
    normalise: Channel | None
    """channel, with seconds and seed, of each mean; null leaves the means as they are, which is SKILL."""


AnyEnsemble = SingleTeacher | Groups | Heads | Average | Concat
Ensemble = Annotated[AnyEnsemble, Field(discriminator="kind")]


class Member(NamedTuple):
    """A teacher of any ensemble."""

    teacher: str
    layers: tuple[int | Literal["projection"] | tuple[int, ...], ...]
    """Empty where layers are grouped: only the targets say how."""
    share: float
    """Its weight over the sum of weights."""


class HeadGroup(NamedTuple):
    """Heads of one width whose loss is one mean."""

    heads: int
    width: int
    share: float
    """Of its loss in the whole; shares add up to 1."""


def members(ensemble: AnyEnsemble) -> list[Member]:
    """The teachers in order, one store each."""
    if isinstance(ensemble, SingleTeacher):
        return [Member(ensemble.teacher, ensemble.layers, 1.0)]
    if isinstance(ensemble, Groups):
        return [Member(ensemble.teacher, (), 1.0)]
    weights = [t.weight if isinstance(t, WeightedTeacher) else 1.0 for t in ensemble.teachers]
    return [Member(t.teacher, t.layers, w / sum(weights)) for t, w in zip(ensemble.teachers, weights, strict=True)]


def head_groups(ensemble: AnyEnsemble, widths: list[int]) -> list[HeadGroup]:
    """The heads that an ensemble of teachers of these widths asks for.

    Raises:
        SettingsError: teachers of different widths are to be averaged.
    """
    teachers = members(ensemble)
    if isinstance(ensemble, Groups):
        return [HeadGroup(ensemble.groups.num_groups, widths[0], 1.0)]
    if isinstance(ensemble, SingleTeacher | Heads):
        return [HeadGroup(len(m.layers), width, m.share) for m, width in zip(teachers, widths, strict=True)]
    if isinstance(ensemble, Concat):
        return [HeadGroup(len(teachers[0].layers), sum(widths), 1.0)]
    if len(set(widths)) > 1:
        named = ", ".join(f"{m.teacher} {width}" for m, width in zip(teachers, widths, strict=True))
        raise SettingsError(
            f"ensemble: {{kind: average}} needs layers of one width, and there are {named}; choose heads or concat"
        )
    return [HeadGroup(len(teachers[0].layers), widths[0], 1.0)]


def _check_numbers(teachers: tuple[Teacher, ...]) -> None:
    if len({len(t.layers) for t in teachers}) > 1:
        named = ", ".join(f"{t.teacher} has {len(t.layers)}" for t in teachers)
        raise ValueError(f"layers are paired by position, and {named}; list as many of each, or choose kind: heads")
