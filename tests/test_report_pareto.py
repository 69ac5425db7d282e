"""Quality against cost: the frontier by hand and by brute force, names that do not overlap, and pictures of a run."""

import itertools
import re
from dataclasses import replace

import numpy as np
import pytest

from pipeline.report import figures, pareto
from pipeline.report.gather import gather
from pipeline.report.pareto import Point, frontier, limits, spaced
from pipeline.report.superb import SuperbParams
from tests.report_fixtures import MODELS, write_profile, write_run

SUPERB = SuperbParams.model_validate({"zero": {"kind": "model", "model": "log-mel"}, "thousand": {"kind": "best"}})


def test_the_frontier_by_hand():
    points = [
        Point("a", 1, 10),
        Point("b", 2, 30),
        Point("c", 2, 20),
        Point("d", 3, 30),
        Point("e", 4, 40),
        Point("f", 5, 5),
    ]
    assert [point.name for point in frontier(points)] == ["a", "b", "e"]
    assert frontier([]) == []


def test_the_frontier_is_what_nothing_dominates():
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [Point(str(n), *map(float, rng.integers(0, 6, 2))) for n in range(12)]
        best = {
            (p.cost, p.quality)
            for p in points
            if not any(
                q.cost <= p.cost and q.quality >= p.quality and (q.cost < p.cost or q.quality > p.quality)
                for q in points
            )
        }
        found = frontier(points)
        assert {(p.cost, p.quality) for p in found} == best
        assert all(a.cost < b.cost and a.quality < b.quality for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("seed", range(20))
def test_names_keep_their_order_and_their_distance(seed):
    heights = np.random.default_rng(seed).random(9).tolist()
    placed = spaced(heights, 0.08)
    order = np.argsort(heights)
    assert np.all(np.diff(np.array(placed)[order]) >= 0.08 - 1e-9)
    assert spaced([0.1, 0.9], 0.08) == [0.1, 0.9]
    assert spaced([0.5, 0.5], 0.1) == pytest.approx([0.45, 0.55])
    assert spaced([1.0, 1.0, 0.2], 0.1) == pytest.approx([0.9, 1.0, 0.2])
    assert spaced([0.0, 0.01], 0.1) == pytest.approx([0.0, 0.1])


def test_what_is_far_from_the_trained_models_does_not_squeeze_them():
    assert limits([50.0, 60.0], [20.0, 58.0]) == pytest.approx((50 - 0.8, 60 + 0.8))
    assert limits([50.0, 60.0], [45.0]) == pytest.approx((45 - 1.2, 60 + 1.2))
    assert limits([50.0], [20.0]) == pytest.approx((20 - 2.4, 50 + 2.4))
    assert limits([], [20.0, 30.0]) == pytest.approx((20 - 0.8, 30 + 0.8))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    home = tmp_path_factory.mktemp("run")
    paths = write_run(home)
    return gather(**paths, profile=write_profile(home / "profile.json"), superb=SUPERB)


def test_every_task_and_the_score_have_a_panel(run):
    panels = pareto.panels(run, pareto.SIZE)
    assert [panel.title for panel in panels] == ["KS, accuracy, %", "SID, accuracy, %", "SUPERB-like score"]
    kws = panels[0]
    want = {name: (float(m[3]), 100 * m[4]) for name, m in MODELS.items() if m[3]}
    assert {p.name: (p.cost, pytest.approx(p.quality)) for p in kws.points} == want
    assert kws.line == Point("log-mel", 0.0, pytest.approx(58.33))


def test_costs_are_those_of_the_longest_utterance(run):
    costs = {axis.name: {p.name: p.cost for p in pareto.panels(run, axis)[0].points} for axis in pareto.axes_of(run)}
    assert costs["macs"]["hubert"] == pytest.approx(1000 * 2_513_408 * 1.1)
    assert costs["speed"]["distil"] == pytest.approx(1000 * 0.0005 * 2)


def test_the_picture_names_every_model_and_has_the_same_bytes_each_time(run):
    one, two = (figures.svg(pareto.plot(run, pareto.SPEED), "pareto", "") for _ in range(2))
    assert one == two
    for name in MODELS:
        assert len(re.findall(f">{name}[ <]", one)) == 3
    assert "untrained 61 ▾<" in one  # far below the others


def test_an_untrained_student_that_is_a_little_faster_is_not_on_the_frontier(run):
    models = dict(run.profile.models)
    (cost,) = models["untrained"].costs[-1:]
    fast = cost.model_copy(update={"rtf": cost.rtf.model_copy(update={"median": 1e-6})})
    models["untrained"] = models["untrained"].model_copy(update={"costs": (fast,)})
    faster = replace(run, profile=run.profile.model_copy(update={"models": models}))
    drawn = {text.get_text(): text for text in pareto.plot(faster, pareto.SPEED).axes[0].texts if text.get_text()}
    assert drawn["hubert"].get_fontweight() == "bold"
    assert drawn["untrained 61 ▾"].get_fontweight() == "normal"


def test_an_error_rate_is_turned_round_and_its_axis_reads_as_it_is(run):
    scores = {
        pair: s.model_copy(update={"task": "pr", "mean": 1 - s.mean})
        for pair, s in run.scores.items()
        if pair[1] == "kws"
    }
    errors = replace(run, tasks=("pr",), scores={(name, "pr"): s for (name, _), s in scores.items()}, superb=None)
    (panel,) = pareto.panels(errors, pareto.SIZE)
    assert panel.is_error
    assert [p.name for p in frontier(panel.points)] == ["small", "distil", "hubert"]
    figure = pareto.plot(errors, pareto.SIZE)
    axis = figure.axes[0]
    assert axis.get_ylim()[1] == pytest.approx(-6.88, abs=5)
    assert axis.yaxis.get_major_formatter()(-40.0, 0) == "40"


def test_without_a_profile_there_is_size_alone(tmp_path):
    run = gather(**write_run(tmp_path))
    assert [axis.name for axis in pareto.axes_of(run)] == ["size"]
