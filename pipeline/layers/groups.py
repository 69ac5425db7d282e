"""Layers that say much the same, together: one similarity matrix in, one set of layer groups out (SKILL).

SKILL (arXiv 2402.16830) distils the mean of each group of similar layers instead of chosen layers; the groups come from
hierarchical clustering. Similarity, linkage and number of groups are settings here.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64
from scipy.cluster.hierarchy import linkage
from scipy.spatial.distance import squareform

from cache.errors import SettingsError
from pipeline.layers.ensembles import GroupParams
from pipeline.layers.similarity import Similarity


class LayerGroups(NamedTuple):
    """What came of it."""

    groups: tuple[tuple[int, ...], ...]
    """Layers of each group, ascending; groups by their first layer."""
    layers: tuple[int, ...]
    """All layers that were clustered, in the order that `merges` counts them."""
    merges: Float64[np.ndarray, "N 4"]
    """As scipy has it: two clusters, their distance, layers in the new one; L - 1 rows."""


def group_layers(found: Similarity, measure: str, params: GroupParams) -> LayerGroups:
    """Cluster agglomeratively: every layer by itself, then again and again the two nearest groups become one.

    Raises:
        SettingsError: more groups than layers, or a layer to leave out that is not there.
    """
    if unknown := set(params.leave_out) - set(found.layers):
        raise SettingsError(f"leave_out names layer {min(unknown)}; the matrix has {list(found.layers)}")
    kept = [n for n, layer in enumerate(found.layers) if layer not in params.leave_out]
    if params.num_groups > len(kept):
        raise SettingsError(f"num_groups is {params.num_groups} and there are {len(kept)} layers to group")
    layers = tuple(found.layers[n] for n in kept)
    far = distances(found.matrix, measure)[np.ix_(kept, kept)]
    merges = _neighbours(far, params.linkage) if params.contiguous else _anyone(far, params.linkage)
    labels = _cut(merges, len(kept), params.num_groups)
    members = [tuple(layer for layer, label in zip(layers, labels, strict=True) if label == g) for g in set(labels)]
    return LayerGroups(tuple(sorted(members)), layers, merges)


def distances(matrix: Float64[np.ndarray, "L L"], measure: str) -> Float64[np.ndarray, "L L"]:
    """How far apart layers are: what was measured, or one less a similarity; zero to themselves."""
    far = matrix if measure == "distance" else 1.0 - matrix
    far = np.maximum((far + far.T) / 2, 0.0)
    np.fill_diagonal(far, 0.0)
    return far


def _anyone(far: Float64[np.ndarray, "L L"], method: str) -> Float64[np.ndarray, "N 4"]:
    if len(far) == 1:
        return np.empty((0, 4))
    return np.asarray(linkage(squareform(far, checks=False), method), dtype=np.float64)


def _neighbours(far: Float64[np.ndarray, "L L"], method: str) -> Float64[np.ndarray, "N 4"]:
    """Our own, because scipy's knows no order and scikit-learn's, kept to neighbours, forgets the pairs that do not touch."""
    joins: dict[str, Callable[..., Any]] = {"average": np.mean, "complete": np.max, "single": np.min}
    join = joins[method]
    clusters = [(n, [n]) for n in range(len(far))]
    merges = []
    while len(clusters) > 1:
        apart = [float(join(far[np.ix_(a, b)])) for (_, a), (_, b) in pairwise(clusters)]
        at = int(np.argmin(apart))
        (left, a), (right, b) = clusters[at : at + 2]
        merges.append([left, right, apart[at], len(a) + len(b)])
        clusters[at : at + 2] = [(len(far) + len(merges) - 1, a + b)]
    return np.array(merges, dtype=np.float64).reshape(-1, 4)


def _cut(merges: Float64[np.ndarray, "N 4"], num: int, groups: int) -> list[int]:
    """The group of each layer after the first `num - groups` merges.

    By their number and not by a distance: with neighbours alone, a later merge can be the nearer one.
    """
    label = list(range(num))
    for step, (left, right, *_) in enumerate(merges[: num - groups].tolist()):
        label = [num + step if at in (left, right) else at for at in label]
    return label
