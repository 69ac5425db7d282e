"""Layers of a model in, the name of the array that keeps them out, and back.

An array keeps one layer, or the mean of several: the average over a group of layers is as good a target as a layer (SKILL),
and takes the place of one. The name says which, so that an array means the same in every store.
"""

import re
from collections.abc import Sequence

NAME = re.compile(r"layer-\d{2,}|mean-\d{2,}(-\d{2,})+")


def layer_name(layer: int) -> str:
    """Name of the array that keeps one layer: layer 0 is the input of the first block."""
    return f"layer-{layer:02d}"


def array_name(kept: int | Sequence[int]) -> str:
    """Name of the array that keeps one layer, or the mean of several."""
    if isinstance(kept, int):
        return layer_name(kept)
    return "-".join(["mean", *(f"{layer:02d}" for layer in sorted(kept))])


def layers_of(name: str) -> tuple[int, ...]:
    """The layers that an array is the mean of: one, of a layer itself."""
    return tuple(map(int, name.split("-")[1:]))


def keeps_layers(name: str) -> bool:
    """Whether an array of this name keeps layers of a model."""
    return NAME.fullmatch(name) is not None
