"""Layers of a model in, the name of the array that keeps them out, and back.

An array keeps one layer, or the mean of several: the average over a group of layers is as good a target as a layer (SKILL),
and takes the place of one. Or it keeps the projection: what a model makes of its convolutions' features before it adds
positions to them, which DPHuBERT calls its layer 0. The name says which, so that an array means the same in every store.
"""

import re
from collections.abc import Sequence
from typing import Literal

PROJECTION: Literal["projection"] = "projection"
NAME = re.compile(r"layer-\d{2,}|mean-\d{2,}(-\d{2,})+|projection")


def layer_name(layer: int) -> str:
    """Name of the array that keeps one layer: layer 0 is the input of the first block."""
    return f"layer-{layer:02d}"


def array_name(kept: int | Literal["projection"] | Sequence[int]) -> str:
    """Name of the array that keeps one layer, the projection, or the mean of several layers."""
    if isinstance(kept, int):
        return layer_name(kept)
    if isinstance(kept, str):
        return kept
    return "-".join(["mean", *(f"{layer:02d}" for layer in sorted(kept))])


def layers_of(name: str) -> tuple[int, ...]:
    """The layers that an array is the mean of: one, of a layer itself; none, of the projection, which comes before them."""
    return () if name == PROJECTION else tuple(map(int, name.split("-")[1:]))


def keeps_layers(name: str) -> bool:
    """Whether an array of this name keeps layers of a model, or its projection."""
    return NAME.fullmatch(name) is not None


def in_order(names: Sequence[str]) -> list[str]:
    """Names from the input of a model to its output: the projection, the layers, the means."""
    return sorted(names, key=lambda name: (name != PROJECTION, name))


def in_words(name: str) -> str:
    """As it stands in settings: projection, 4, or [1, 2]."""
    layers = layers_of(name)
    if not layers:
        return PROJECTION
    return str(layers[0]) if len(layers) == 1 else str(list(layers))
