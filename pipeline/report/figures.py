"""A run in; its loss curves and its learned layer weights as pictures out, each as PNG bytes and as inline SVG.

The PNG files stand alone; the page embeds the SVG, whose text is real text in the fonts of the page. Both are the same
figure and the same bytes every time: no date, no version, ids from a fixed salt.
"""

import io
import re
from collections.abc import Sequence
from math import ceil
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from pipeline.report import wording
from pipeline.report.run import Run, Student
from pipeline.tasks.labels import TASKS

INK, MUTED, HAIRLINE, ACCENT = "#211d1e", "#7a7274", "#d9d3d0", "#7b1e3a"
WINE = LinearSegmentedColormap.from_list("wine", ["#fbf7f4", "#e9c9c6", "#c77f86", "#96364f", "#5c1230"])
LOOK: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same picture on every machine
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": HAIRLINE,
    "axes.labelcolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "svg.fonttype": "none",
    "axes.axisbelow": True,
}
WIDTH = 9.6  # inches; the page is ten wide


def curves(students: Sequence[Student]) -> Figure:
    """Small multiples, one trained student each: train in grey, dev in wine; of a pruned one also where its units went.

    Scales are each student's own: losses of different methods are in different units. An empty figure without students.
    """
    students = [student for student in students if student.metrics.steps > 0] or list(students)[:1]
    columns = max(1, min(3, len(students)))
    rows = max(1, ceil(len(students) / columns))
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, 2.7 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axis, student in zip(axes, students, strict=False):
            _curve(axis, student)
        for axis in axes[len(students) :]:
            axis.set_axis_off()
    return figure


def _curve(axis: Axes, student: Student) -> None:
    axis.set_title(student.name, loc="left", fontsize=10, color=INK, fontweight="bold")
    axis.grid(axis="y", color=HAIRLINE, linewidth=0.6)
    train = [(point.step, point.train) for point in student.curve if point.train is not None]
    dev = [(point.step, point.dev) for point in student.curve if point.dev is not None]
    if not train:
        axis.text(0.5, 0.5, "not trained", transform=axis.transAxes, ha="center", va="center", color=MUTED)
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
        return
    axis.plot([step for step, _ in train], [loss for _, loss in train], color=MUTED, linewidth=1.2)
    axis.plot([s for s, _ in dev], [loss for _, loss in dev], color=ACCENT, linewidth=1.6, marker="o", markersize=2.8)
    axis.set_xlabel("step")
    axis.set_xlim(0, train[-1][0] * 1.03)
    _pruning(axis, student)
    # a fresh head towers over everything that follows: show the band that training moves in
    settled = [loss for _, loss in train[len(train) // 20 :]] + [loss for step, loss in dev if step > 0]
    low, high = min(settled), max(max(settled), min(settled) + 1e-6)
    axis.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    ends = [("dev", dev[-1][1], ACCENT, 0)] if dev else []
    for label, value, colour, left in [*ends, ("train", train[-1][1], MUTED, 62 if dev else 0)]:
        axis.annotate(  # on the line of the title, where no curve can run through it
            f"{label} {wording.loss(value)}",
            (1, 1),
            xycoords="axes fraction",
            xytext=(-left, 6),
            textcoords="offset points",
            ha="right",
            color=colour,
            fontsize=8.5,
            fontweight="bold" if label == "dev" else "normal",
        )


def _pruning(axis: Axes, student: Student) -> None:
    """A line where the gates were closed, and the share of parameters that went until then, from none to all."""
    if student.pruned_at is None:
        return
    axis.axvline(student.pruned_at, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    gone = [(point.step, point.sparsity) for point in student.curve if point.sparsity is not None]
    left = 0.0 if student.unpruned is None else 1 - student.metrics.parameters["student"] / student.unpruned
    if gone:
        shares = axis.twinx()
        shares.plot([step for step, _ in gone], [share for _, share in gone], color=INK, linewidth=1.0, linestyle=":")
        shares.set_ylim(0, 1)
        shares.set_axis_off()
    axis.annotate(
        f"{100 * left:.1f} % pruned",
        (student.pruned_at, 0),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 5),
        textcoords="offset points",
        ha="right",
        color=INK,
        fontsize=8,
    )


def layer_weights(run: Run) -> Figure:
    """One panel a task: models down, layers across, the weight of each layer as colour and as number.

    Models of one layer have nothing to weigh and are left out; their line would read 1.00.
    """
    names = [model.name for model in run.models if model.num_layers > 1]
    deepest = max(len(score.layer_weights) for score in run.scores.values())
    columns = min(len(run.tasks), 6 if deepest <= 6 else 3)
    rows, is_wide = ceil(len(run.tasks) / columns), columns <= 3
    with matplotlib.rc_context(LOOK):
        height = rows * (0.9 + 0.34 * max(1, len(names)))
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
        for axis in axes[len(run.tasks) :]:
            axis.set_axis_off()
        for axis, task in zip(axes, run.tasks, strict=False):
            title = TASKS[task].title if is_wide else TASKS[task].superb
            axis.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
            axis.spines[:].set_visible(False)
            axis.tick_params(length=0)
            for row, name in enumerate(names):
                score = run.scores.get((name, task))
                if score is not None:
                    _weights_of(axis, row, score.layer_weights, deepest, is_wide)
            axis.set_xlim(-0.5, deepest - 0.5)
            axis.set_ylim(max(1, len(names)) - 0.5, -0.5)
            axis.set_xticks(range(0, deepest, 1 if deepest <= 14 else 4))
            axis.set_yticks(range(len(names)), names, color=INK)
            axis.set_xlabel("layer (0 is the input of the first block)" if is_wide else "layer")
            if not names:
                axis.text(0, 0, "no model with more than one layer", color=MUTED, va="center")
    return figure


def _weights_of(axis: Axes, row: int, weights: Sequence[float], deepest: int, is_wide: bool) -> None:
    """One line of a panel."""
    top = max(0.5, *weights)
    edges = [column - 0.5 for column in range(len(weights) + 1)]
    axis.pcolormesh(
        edges, [row - 0.5, row + 0.5], [weights], cmap=WINE, vmin=0, vmax=top, edgecolors="white", linewidth=1.5
    )
    for column, weight in enumerate(weights if deepest <= 14 else ()):
        axis.text(
            column,
            row,
            f"{weight:.2f}".removeprefix("0"),
            ha="center",
            va="center",
            fontsize=8 if deepest <= 8 and is_wide else 6.5,
            color="white" if weight / top > 0.6 else INK,
        )


def png(figure: Figure) -> bytes:
    """The bytes of a PNG file without date or version."""
    data = io.BytesIO()
    with matplotlib.rc_context(LOOK):
        figure.savefig(
            data,
            format="png",
            dpi=200,
            metadata={"Software": None},
            facecolor="white",
            bbox_inches="tight",
            pad_inches=0.15,
        )
    return data.getvalue()


def svg(figure: Figure, name: str, description: str) -> str:
    """Markup for the page: scales with it, uses its fonts, and keeps its ids to itself."""
    text = io.StringIO()
    with matplotlib.rc_context({**LOOK, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    markup = text.getvalue()
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup, flags=re.DOTALL)
    markup = re.sub(r"'DejaVu Sans'(, [^;\"]*)?", "var(--sans)", markup)
    markup = re.sub(r'\bid="(matplotlib\.)?', f'id="{name}-', markup)
    markup = re.sub(r'(url\(|href=")#', rf"\1#{name}-", markup)
    markup = re.sub(r'<svg ([^>]*?)width="[^"]*" ?', r"<svg \1", markup, count=1)
    markup = re.sub(r'<svg ([^>]*?)height="[^"]*" ?', r"<svg \1", markup, count=1)
    return markup.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1).strip()
