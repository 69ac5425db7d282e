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

NEAR = 0.6
"""Of the range of the trained models: what is farther off stands at the edge."""
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

    def written(self, quality: float) -> str:
        """A score as it is."""
        return f"{round(-quality if self.is_error else quality, 1):g}".replace("-", "\N{MINUS SIGN}")


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
MACS = Axis("macs", "MACs per second of audio", _macs, lambda n: wording.params(round(n)))
SPEED = Axis("speed", "ms per second of audio", _milliseconds, wording.significant)


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
    columns = min(3 if len(drawn) < 7 else 4, len(drawn))
    rows = ceil(len(drawn) / columns)
    groups = {model.name: "untrained" if model.untrained else model.role for model in run.models}
    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, HEIGHT * rows), layout="constrained")
        places = figure.subplots(rows, columns, squeeze=False).flatten()
        for place, panel in zip(places, drawn, strict=False):
            _draw(place, panel, axis, groups)
        for place in places[len(drawn) :]:
            place.set_axis_off()
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not at each of the drawings that saving takes
    return figure


def _draw(place: Axes, panel: Panel, axis: Axis, groups: dict[str, str]) -> None:
    place.set_title(panel.title, loc="left", fontsize=10, color=INK, fontweight="bold")
    place.grid(axis="y", color=HAIRLINE, linewidth=0.6)
    place.set_xlabel(axis.label)
    if not panel.points:
        place.text(0.5, 0.5, "no model with a cost", transform=place.transAxes, ha="center", color=MUTED)
        return
    place.set_xscale("log")
    low, high = min(p.cost for p in panel.points), max(p.cost for p in panel.points)
    place.set_xlim(low / 1.25, high * 1.25)
    trained = [p.quality for p in panel.points if groups[p.name] != "untrained"]
    others = [p.quality for p in panel.points if groups[p.name] == "untrained"]
    place.set_ylim(*limits(trained, others + ([panel.line.quality] if panel.line else [])))
    # an untrained student is a control: where a trained one has its shape, only noise in the seconds makes it the cheaper
    best = frontier([p for p in panel.points if groups[p.name] != "untrained"] or panel.points)
    on = {point.name for point in best}
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
        teacher = groups[point.name] == "teacher"
        place.plot(
            point.cost,
            point.quality,
            marker="s" if teacher else "o",
            markersize=5,
            color=ACCENT if point.name in on else "white",
            markeredgecolor=ACCENT if point.name in on else INK if teacher else MUTED,
        )
    ticks = [low, high] if high > 1.15 * low else [(low * high) ** 0.5]
    place.set_xticks(ticks, [axis.tick(tick) for tick in ticks])
    place.set_xticks([], minor=True)
    place.yaxis.set_major_formatter(lambda value, _: panel.written(value))
    _names(place, panel, on)


def limits(trained: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """From the worst to the best of what was trained, and farther to what is not far from that.

    An untrained model, or a baseline that costs nothing, may be so far off that all others would lie on one another.
    """
    bottom, top = (min(trained), max(trained)) if trained else (min(others), max(others))
    reach = NEAR * (top - bottom) if top > bottom else float("inf")
    levels = [bottom, top, *(level for level in others if bottom - reach <= level <= top + reach)]
    room = 0.08 * (max(levels) - min(levels) or 1.0)
    return min(levels) - room, max(levels) + room


def _names(place: Axes, panel: Panel, on: set[str]) -> None:
    """Names in a column on the right, in the order of the scores, no two on one another, each with a line to its point.

    What is outside the panel stands at its edge, with its score.
    """
    low, high = place.get_ylim()
    gap = LINE / (HEIGHT - 0.75)  # of the panel's height, without title and axis
    named = [*panel.points, *([panel.line] if panel.line else [])]
    levels = [(point.quality - low) / (high - low) for point in named]
    heights = spaced([min(max(level, 0.0), 1.0) for level in levels], gap)
    for point, level, height in zip(named, levels, heights, strict=True):
        outside = not 0 <= level <= 1
        arrow = "\N{BLACK DOWN-POINTING SMALL TRIANGLE}" if level < 0 else "\N{BLACK UP-POINTING SMALL TRIANGLE}"
        if point is not panel.line and not outside:
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
        elif not outside:
            place.plot([1.0, 1.015], [level, height], transform=place.transAxes, color=HAIRLINE, lw=0.6, clip_on=False)
        place.text(
            1.025,
            height,
            f"{point.name} {panel.written(point.quality)} {arrow}" if outside else point.name,
            transform=place.transAxes,
            va="center",
            fontsize=7.5,
            color=ACCENT if point.name in on else MUTED,
            fontweight="bold" if point.name in on else "normal",
            fontstyle="italic" if point is panel.line else "normal",
        )


def spaced(heights: Sequence[float], gap: float) -> list[float]:
    """Heights at least `gap` apart and between 0 and 1, in the same order, as near to the given ones as that allows.

    Neighbours that touch become a block that stands where the mean of its members wants to be (isotonic regression).
    """
    order = sorted(range(len(heights)), key=lambda n: heights[n])
    blocks: list[list[int]] = []
    for number in order:
        blocks.append([number])
        while len(blocks) > 1 and _bottom(blocks[-1], heights, gap) - _top(blocks[-2], heights, gap) < gap:
            last = blocks.pop()
            blocks[-1] += last
    placed, rank = [0.0] * len(heights), 0
    highest = max(1 - gap * (len(heights) - 1), 0.0)  # of the lowest name, so that those above it have room
    for block in blocks:
        first = _bottom(block, heights, gap) - rank * gap
        for number in block:
            placed[number] = min(max(first, 0.0), highest) + rank * gap
            rank += 1
    return placed


def _bottom(block: list[int], heights: Sequence[float], gap: float) -> float:
    return sum(heights[n] for n in block) / len(block) - gap * (len(block) - 1) / 2


def _top(block: list[int], heights: Sequence[float], gap: float) -> float:
    return _bottom(block, heights, gap) + gap * (len(block) - 1)
