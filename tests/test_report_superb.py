"""The SUPERB score: the formula against the public leaderboard, and what a run makes of it."""

import pytest

from cache.errors import SettingsError
from pipeline.report.superb import BEST, FBANK, SuperbParams, superb_of, superb_score

PAPER_ZERO = {
    "PR": [82.01], "ASR": [23.18], "KS": [41.38], "QbE": [0.0058], "SID": [20.06], "ASV": [9.56], "SD": [10.05],
    "IC": [9.65], "SF": [69.64, 52.94], "ER": [48.24],
}  # fmt: skip
PAPER_BEST = {
    "PR": [3.53], "ASR": [3.62], "KS": [96.66], "QbE": [0.0736], "SID": [90.33], "ASV": [5.11], "SD": [5.62],
    "IC": [98.76], "SF": [89.81, 21.76], "ER": [67.62],
}  # fmt: skip
LEADERBOARD = {  # published scores of a task each, and the score that the leaderboard shows
    "HuBERT Base": ((5.41, 6.42, 96.30, 0.0736, 81.42, 5.11, 5.88, 98.34, (88.53, 25.20), 64.92), 941),
    "WavLM Base+": ((3.92, 5.59, 97.37, 0.0988, 89.42, 4.07, 3.50, 99.00, (90.58, 21.20), 68.65), 1106),
    "wav2vec2 Base": ((5.74, 6.43, 96.23, 0.0233, 75.18, 6.02, 6.08, 92.35, (88.30, 24.77), 63.43), 818),
    "DistilHuBERT": ((16.27, 13.37, 95.98, 0.0511, 73.54, 8.55, 6.19, 94.99, (82.57, 35.59), 63.02), 717),
    "DPHuBERT": ((9.67, 10.47, 96.36, 0.0693, 76.83, 5.84, 5.92, 97.92, (86.86, 28.26), 63.16), 866),
    "DPWavLM": ((8.22, 10.19, 96.27, 0.0874, 82.11, 5.98, 5.53, 98.58, (87.68, 26.11), 65.24), 926),
}
NAMES = {"pr": "PR", "asr": "ASR", "kws": "KS", "sid": "SID", "sv": "ASV", "er": "ER"}


def by_task(row) -> dict[str, list[float]]:
    return {
        task: list(value) if isinstance(value, tuple) else [value] for task, value in zip(PAPER_ZERO, row, strict=True)
    }


@pytest.mark.parametrize("name", LEADERBOARD)
def test_the_formula_gives_what_the_public_leaderboard_shows(name):
    row, shown = LEADERBOARD[name]
    assert superb_score(by_task(row), PAPER_ZERO, PAPER_BEST) == pytest.approx(shown, abs=1.0)


def test_the_two_points_are_0_and_1000():
    assert superb_score(PAPER_ZERO, PAPER_ZERO, PAPER_BEST) == 0
    assert superb_score(PAPER_BEST, PAPER_ZERO, PAPER_BEST) == pytest.approx(1000)


def test_the_published_points_are_those_of_the_paper():
    for task, name in NAMES.items():
        assert 100 * FBANK[task] == pytest.approx(PAPER_ZERO[name][0])
        assert 100 * BEST[task] == pytest.approx(PAPER_BEST[name][0])


MEANS = {
    ("mel", "kws"): 0.5, ("big", "kws"): 0.9, ("large", "kws"): 0.8, ("small", "kws"): 0.7, ("bad", "kws"): 0.3,
    ("mel", "pr"): 0.8, ("big", "pr"): 0.5, ("large", "pr"): 0.4, ("small", "pr"): 0.5, ("bad", "pr"): 0.9,
}  # fmt: skip
MODELS = ["big", "large", "small", "bad", "mel"]


def points(zero, thousand) -> SuperbParams:
    return SuperbParams.model_validate({"zero": zero, "thousand": thousand})


OURS = points({"kind": "model", "model": "mel"}, {"kind": "best"})


def test_a_run_is_scored_between_its_baseline_and_the_best_teacher_of_each_task():
    found = superb_of(["kws", "pr"], MEANS, MODELS, {"big", "large"}, OURS)
    assert found.points == {"kws": (0.5, 0.9), "pr": (0.8, 0.4)}
    assert found.scores == pytest.approx({"mel": 0, "big": 875, "large": 875, "small": 625, "bad": -375})
    assert (found.zero, found.left_out) == ("mel", {})


def test_the_best_of_a_student_does_not_move_the_thousand():
    better = {**MEANS, ("small", "kws"): 0.99}
    assert superb_of(["kws"], better, MODELS, {"big", "large"}, OURS).points == {"kws": (0.5, 0.9)}


def test_a_task_that_no_teacher_does_better_than_the_zero_is_left_out_and_told():
    worse = {**MEANS, ("mel", "kws"): 0.95}
    found = superb_of(["kws", "pr"], worse, MODELS, {"big", "large"}, OURS)
    assert list(found.points) == ["pr"]
    assert found.left_out == {"kws": "the best teacher of each task is not better than mel"}
    assert found.scores["large"] == pytest.approx(1000)
    equal = {**MEANS, ("mel", "pr"): 0.4}
    assert "pr" in superb_of(["kws", "pr"], equal, MODELS, {"big", "large"}, OURS).left_out


def test_a_task_that_not_every_model_was_judged_on_is_left_out_and_told():
    fewer = {pair: mean for pair, mean in MEANS.items() if pair != ("small", "pr")}
    found = superb_of(["kws", "pr"], fewer, MODELS, {"big", "large"}, OURS)
    assert found.left_out == {"pr": "1 of 5 models have no score"}
    assert found.scores == pytest.approx({"mel": 0, "big": 1000, "large": 750, "small": 500, "bad": -500})
    none = superb_of(["pr"], fewer, MODELS, {"big", "large"}, OURS)
    assert (none.scores, list(none.left_out)) == ({}, ["pr"])


def test_without_teachers_there_is_no_thousand():
    found = superb_of(["kws"], MEANS, MODELS, set(), OURS)
    assert (found.scores, list(found.left_out)) == ({}, ["kws"])


def test_the_published_points_score_a_run_of_fewer_tasks():
    found = superb_of(
        ["kws", "pr"],
        {("a", "kws"): 0.9666, ("a", "pr"): 0.8201},
        ["a"],
        set(),
        points({"kind": "published"}, {"kind": "published"}),
    )
    assert found.scores == pytest.approx({"a": 500})
    assert found.zero == "SUPERB’s FBANK"


def test_a_zero_that_was_not_probed_is_refused():
    with pytest.raises(
        SettingsError, match=r"report.superb.zero.model is 'mel', which was not probed; choose one of big"
    ):
        superb_of(["kws"], MEANS, ["big"], {"big"}, OURS)
