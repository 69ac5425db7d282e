"""One similarity matrix and what clustering makes of it in; a heat map beside a dendrogram out."""

from collections.abc import Sequence

import matplotlib
import numpy as np
from jaxtyping import Float64
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import dendrogram

from pipeline.layers.ensembles import GroupParams
from pipeline.layers.groups import group_layers
from pipeline.layers.similarity import Similarity
from pipeline.report.figures import ACCENT, INK, LOOK, MUTED, WIDTH, WINE
from pipeline.report.products import SimilarityFile

WORDS = {"cka": "linear CKA", "cosine": "mean cosine of frames", "distance": "mean |x − y| + 1 − cos"}


def heat_map_of(found: SimilarityFile, linkage: str = "average") -> Figure:
    """The picture of one teacher's file."""
    measure, matrix = str(found.settings["measure"]), np.array(found.matrix)
    whole = GroupParams(num_groups=1, linkage=linkage, contiguous=False, leave_out=())  # type: ignore[arg-type]
    merges = group_layers(Similarity(found.layers, matrix, found.frames), measure, whole).merges
    return heat_map(found.teacher, found.layers, matrix, measure, merges, linkage)


def heat_map(
    title: str,
    layers: Sequence[int],
    matrix: Float64[np.ndarray, "L L"],
    measure: str,
    merges: Float64[np.ndarray, "N 4"],
    linkage: str,
) -> Figure:
    """Layers against layers, and the tree of `merges` of the same layers (scipy's form)."""
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
        heat, tree = figure.subplots(1, 2)
        heat.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
        low, high = float(matrix.min()), float(matrix.max())
        near = WINE.reversed() if measure == "distance" else WINE
        mesh = heat.pcolormesh(matrix, cmap=near, vmin=low, vmax=high, edgecolors="white", linewidth=1.0)
        heat.set_aspect("equal")
        heat.invert_yaxis()
        heat.spines[:].set_visible(False)
        heat.tick_params(length=0)
        for ticks in (heat.set_xticks, heat.set_yticks):
            ticks(np.arange(len(layers)) + 0.5, [str(layer) for layer in layers])
        heat.set_xlabel("layer")
        heat.set_ylabel("layer")
        if len(layers) <= 13:
            dark = (high + low) / 2
            for row in range(len(layers)):
                for column in range(len(layers)):
                    value = matrix[row, column]
                    strong = value < dark if measure == "distance" else value > dark
                    heat.text(
                        *(column + 0.5, row + 0.5, f"{value:.2f}".replace("0.", ".")),
                        **{"ha": "center", "va": "center", "fontsize": 7, "color": "white" if strong else INK},
                    )
        bar = figure.colorbar(mesh, ax=heat, shrink=0.7, label=WORDS[measure])
        bar.outline.set_visible(False)
        assert bar.solids is not None
        bar.solids.set_rasterized(False)  # a picture inside the page would ask for data: its policy forbids that
        bar.solids.set_edgecolor("face")
        tree.set_title(f"clusters, {linkage} linkage", loc="left", fontsize=10, color=INK, fontweight="bold")
        if len(merges):
            dendrogram(
                merges,
                ax=tree,
                labels=[str(layer) for layer in layers],
                color_threshold=0.0,
                above_threshold_color=ACCENT,
                leaf_font_size=9,
            )
        tree.set_xlabel("layer")
        tree.set_ylabel("distance at which they join", color=MUTED)
        tree.tick_params(axis="x", length=0)
    return figure
