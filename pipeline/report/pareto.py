"""A run in; quality against what it costs as pictures out, a panel for each task and one for the score.

Better is always up, so of an error rate the axis is turned round. The line is the frontier: models than which none is both
cheaper and better. The baseline costs next to nothing and is a dashed line across.
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.report import wording
from pipeline.report.figures import ACCENT, HAIRLINE, INK, LOOK, MUTED, WIDTH
from pipeline.report.run import Model, Run
from pipeline.tasks.labels import TASKS

COLUMNS = 3
HEIGHT = 2.55  # inches of a row
LINE = 0.118  # inches from one name to the next


class Point(NamedTuple):
    """A model in a panel."""

    name: str
    cost: float
    quality: float
    """Larger is better: the score of a task, less than nothing where it is an error rate."""


class Panel(NamedTuple):
    """A task, or the score."""

    title: str
    points: list[Point]
    line: Point | None
    """The baseline."""
    is_error: bool


class Axis(NamedTuple):
    """What models cost."""

    name: str
    """Of the file."""
    label: str
    of: Callable[[Run, Model], float | None]
    tick: Callable[[float], str]


def _macs(run: Run, model: Model) -> float | None:
    cost = run.cost(model.name)
    return None if cost is None else cost.macs_per_second


def _milliseconds(run: Run, model: Model) -> float | None:
    cost = run.cost(model.name)
    return None if cost is None else 1000 * cost.rtf.median


SIZE = Axis("size", "parameters", lambda _, model: float(model.num_params or 0), lambda n: wording.params(round(n)))
MACS = Axis("macs", "multiply-accumulates per second of audio", _macs, lambda n: wording.params(round(n)))
SPEED = Axis("speed", "ms of computing per second of audio", _milliseconds, wording.significant)


def axes_of(run: Run) -> list[Axis]:
    """What this run knows the costs of."""
    return [SIZE] if run.profile is None else [SIZE, MACS, SPEED]


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those than which no other is as cheap and better, or cheaper and as good; the cheapest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.cost, -p.quality, p.name)):
        if not best or point.quality > best[-1].quality:
            best.append(point)
    return best


def panels(run: Run, axis: Axis) -> list[Panel]:
    """A panel for each task, and one for the score where there is one."""
    found = []
    for task in run.tasks:
        sign = 100 if TASKS[task].higher_is_better else -100
        quality = {name: sign * score.mean for (name, of), score in run.scores.items() if of == task}
        title = f"{TASKS[task].superb}, {wording.metric(TASKS[task].metric, TASKS[task].higher_is_better)}"
        found.append(_panel(run, axis, title, quality, is_error=sign < 0))
    if run.superb is not None and run.superb.scores:
        found.append(_panel(run, axis, "SUPERB-like score", run.superb.scores, is_error=False))
    return found


def _panel(run: Run, axis: Axis, title: str, quality: dict[str, float], is_error: bool) -> Panel:
    points = []
    for model in run.models:
        cost = axis.of(run, model) if model.role != "baseline" else None
        if model.name in quality and cost:
            points.append(Point(model.name, cost, quality[model.name]))
    floors = [m.name for m in run.of_role("baseline") if m.name in quality]
    line = max((Point(name, 0.0, quality[name]) for name in floors), key=lambda p: p.quality, default=None)
    return Panel(title, points, line, is_error)


def plot(run: Run, axis: Axis) -> Figure:
    """The figure of one kind of cost."""
    drawn = panels(run, axis)
    columns = min(COLUMNS, len(drawn))
    rows = ceil(len(drawn) / columns)
    roles = {model.name: model.role for model in run.models}
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, HEIGHT * rows), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).flatten()
        for place, panel in zip(places, drawn, strict=False):
            _draw(place, panel, axis, roles)
        for place in places[len(drawn) :]:
            place.set_axis_off()
    return figure


def _draw(place: Axes, panel: Panel, axis: Axis, roles: dict[str, str]) -> None:
    place.set_title(panel.title, loc="left", fontsize=10, color=INK, fontweight="bold")
    place.grid(axis="y", color=HAIRLINE, linewidth=0.6)
    place.set_xlabel(axis.label)
    if not panel.points:
        place.text(0.5, 0.5, "no model with a cost", transform=place.transAxes, ha="center", color=MUTED)
        return
    place.set_xscale("log")
    best = frontier(panel.points)
    on = {point.name for point in best}
    low, high = min(p.cost for p in panel.points), max(p.cost for p in panel.points)
    place.set_xlim(low / 1.25, high * 1.25)
    levels = [p.quality for p in panel.points] + ([panel.line.quality] if panel.line else [])
    bottom, top = min(levels), max(levels)
    room = 0.08 * (top - bottom or 1.0)
    place.set_ylim(bottom - room, top + room)
    place.plot(  # a step: between two models of the frontier there is the cheaper one
        [*(p.cost for p in best), high * 1.25],
        [*(p.quality for p in best), best[-1].quality],
        drawstyle="steps-post",
        color=ACCENT,
        linewidth=1.0,
        alpha=0.7,
    )
    if panel.line is not None:
        place.axhline(panel.line.quality, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
    for point in panel.points:
        teacher = roles[point.name] == "teacher"
        place.plot(
            point.cost,
            point.quality,
            marker="s" if teacher else "o",
            markersize=5,
            color=ACCENT if point.name in on else "white",
            markeredgecolor=ACCENT if point.name in on else INK if teacher else MUTED,
        )
    _ticks(place, axis, low, high, panel.is_error)
    _names(place, panel, on)


def _ticks(place: Axes, axis: Axis, low: float, high: float, is_error: bool) -> None:
    """Three round costs; scores as they are, also where the axis is turned round."""
    middle = (low * high) ** 0.5
    ticks = [low, middle, high] if high > 1.6 * low else [low, high] if high > 1.15 * low else [middle]
    place.set_xticks(ticks, [axis.tick(tick) for tick in ticks])
    place.set_xticks([], minor=True)
    place.yaxis.set_major_formatter(lambda value, _: f"{-value if is_error else value:g}")


def _names(place: Axes, panel: Panel, on: set[str]) -> None:
    """Names in a column on the right, in the order of the scores, no two on one another, each with a line to its point."""
    low, high = place.get_ylim()
    inches = HEIGHT - 0.75  # of the panel's height, without title and axis
    gap = LINE / inches
    named = [*panel.points, *([panel.line] if panel.line else [])]
    heights = spaced([(p.quality - low) / (high - low) for p in named], gap)
    for point, height in zip(named, heights, strict=True):
        best = point.name in on
        level = (point.quality - low) / (high - low)
        is_line = point is panel.line
        if not is_line:
            place.annotate(
                "",
                xy=(point.cost, point.quality),
                xytext=(1.015, height),
                xycoords="data",
                textcoords="axes fraction",
                arrowprops={"arrowstyle": "-", "color": HAIRLINE, "linewidth": 0.6, "shrinkA": 0, "shrinkB": 3},
                annotation_clip=False,
                zorder=0.5,
            )
        elif abs(height - level) > 0.01:
            place.plot(
                [1.0, 1.015], [level, height], transform=place.transAxes, color=HAIRLINE, linewidth=0.6, clip_on=False
            )
        place.text(
            1.025,
            height,
            point.name,
            transform=place.transAxes,
            va="center",
            fontsize=7.5,
            color=ACCENT if best else MUTED,
            fontweight="bold" if best else "normal",
            fontstyle="italic" if is_line else "normal",
        )


def spaced(heights: Sequence[float], gap: float) -> list[float]:
    """Heights at least `gap` apart, in the same order, as near to the given ones as pushing them apart allows.

    Neighbours that touch become a block that stands where the mean of its members wants to be.
    """
    order = sorted(range(len(heights)), key=lambda n: heights[n])
    blocks: list[list[int]] = []
    for number in order:
        blocks.append([number])
        while len(blocks) > 1 and _bottom(blocks[-1], heights, gap) - _top(blocks[-2], heights, gap) < gap:
            last = blocks.pop()
            blocks[-1] += last
    placed = [0.0] * len(heights)
    for block in blocks:
        first = _bottom(block, heights, gap)
        for place, number in enumerate(block):
            placed[number] = first + place * gap
    return placed


def _bottom(block: list[int], heights: Sequence[float], gap: float) -> float:
    return sum(heights[n] for n in block) / len(block) - gap * (len(block) - 1) / 2


def _top(block: list[int], heights: Sequence[float], gap: float) -> float:
    return _bottom(block, heights, gap) + gap * (len(block) - 1)
