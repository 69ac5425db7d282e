"""Error rates of verification, held against brute force, scikit-learn's ROC with a root finder, and cases done by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from cache.errors import DataError
from pipeline.tasks.eer import DetectionCost, Ranked, equal_error, min_dcf, separation, speaker_interval

NIST, VOX = (DetectionCost(p_target=p, miss=1, false_alarm=1) for p in (0.01, 0.05))


def random_trials(seed: int, steps: int | None = None, shift: float = 1.0):
    """Scores of 40 to 240 trials; `steps` values only, so that many are equal."""
    rng = np.random.default_rng(seed)
    same = rng.random(rng.integers(40, 240)) < rng.uniform(0.1, 0.9)
    same[:2] = True, False
    scores = rng.normal(size=len(same)) + shift * same
    return (scores if steps is None else np.round(scores * steps) / steps), same


def brute_force(scores, same):
    """(threshold, misses, false alarms) at every threshold, by counting."""
    return [
        (t, np.mean(scores[same] < t), np.mean(scores[~same] >= t)) for t in [np.inf, *np.unique(scores)[::-1].tolist()]
    ]


@pytest.mark.parametrize("steps", [None, 1, 3])
@pytest.mark.parametrize("seed", range(20))
def test_the_rates_are_those_of_counting_at_every_threshold(seed, steps):
    scores, same = random_trials(seed, steps)
    rates = Ranked(scores, same).rates()
    np.testing.assert_allclose(np.stack(rates, 1), brute_force(scores, same), atol=1e-12)


@pytest.mark.parametrize("shift", [-0.5, 0.0, 1.0, 4.0])
@pytest.mark.parametrize("steps", [None, 1, 3])
@pytest.mark.parametrize("seed", range(10))
def test_the_equal_error_rate_is_the_root_on_the_roc_of_scikit_learn(seed, steps, shift):
    scores, same = random_trials(seed, steps, shift)
    alarms, hits, _ = roc_curve(same, scores)
    expected = brentq(lambda x: 1 - x - interp1d(alarms, hits)(x), 0.0, 1.0, xtol=1e-12)
    assert equal_error(Ranked(scores, same).rates()).rate == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("cost", [NIST, VOX, DetectionCost(p_target=0.3, miss=10, false_alarm=2)])
@pytest.mark.parametrize("seed", range(10))
def test_the_detection_cost_is_that_of_the_best_threshold_by_counting(seed, cost):
    scores, same = random_trials(seed, 3)
    costs = [
        cost.miss * cost.p_target * missed + cost.false_alarm * (1 - cost.p_target) * alarmed
        for _, missed, alarmed in brute_force(scores, same)
    ]
    blind = min(cost.miss * cost.p_target, cost.false_alarm * (1 - cost.p_target))
    assert min_dcf(Ranked(scores, same).rates(), cost) == pytest.approx(min(costs) / blind)


def test_five_trials_by_hand():
    """Scores .9s .7d .6s .4s .2d: at .6 misses are 1/3 and false alarms 1/2, above it 2/3 and 1/2; they meet at 1/2."""
    rates = Ranked(np.array([0.9, 0.7, 0.6, 0.4, 0.2]), np.array([True, False, True, True, False])).rates()
    assert rates.misses.tolist() == pytest.approx([1, 2 / 3, 2 / 3, 1 / 3, 0, 0])
    assert rates.false_alarms.tolist() == [0, 0, 0.5, 0.5, 0.5, 1]
    found = equal_error(rates)
    assert found.rate == 0.5
    assert found.threshold == pytest.approx(0.65)  # half way from 2/3 at .7 to 1/3 at .6
    assert min_dcf(rates, NIST) == pytest.approx(2 / 3)  # only the first is accepted: 0.01 * 2/3 over 0.01


def test_a_perfect_scorer_errs_never_and_a_reversed_one_always():
    same = np.arange(30) < 10
    perfect = Ranked(np.where(same, 0.8, 0.1) + np.linspace(0, 0.1, 30), same).rates()
    assert (equal_error(perfect).rate, min_dcf(perfect, NIST)) == (0, 0)
    assert 0.2 < equal_error(perfect).threshold <= 0.9
    assert equal_error(Ranked(np.where(same, -1.0, 1.0), same).rates()).rate == 1


def test_a_scorer_that_says_the_same_of_all_is_at_one_half_and_costs_as_much_as_refusing():
    rates = Ranked(np.zeros(9), np.arange(9) < 2).rates()
    assert (equal_error(rates).rate, min_dcf(rates, VOX)) == (0.5, 1)


def test_a_random_scorer_is_near_one_half():
    rng = np.random.default_rng(0)
    assert equal_error(Ranked(rng.random(20_000), rng.random(20_000) < 0.2).rates()).rate == pytest.approx(
        0.5, abs=0.02
    )


@given(st.integers(0, 10_000), st.sampled_from([None, 1, 2]))
def test_only_the_order_of_the_scores_counts(seed, steps):
    scores, same = random_trials(seed, steps)
    plain, bent = Ranked(scores, same).rates(), Ranked(np.exp(scores) * 3, same).rates()
    assert equal_error(plain).rate == pytest.approx(equal_error(bent).rate, abs=1e-12)
    mirrored = Ranked(-scores, ~same).rates()  # exchanging the kinds and the direction exchanges the errors
    assert equal_error(mirrored).rate == pytest.approx(equal_error(plain).rate, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_whole_weights_are_trials_that_are_there_so_often(seed):
    scores, same = random_trials(seed, 2)
    times = np.random.default_rng(seed).integers(0, 3, size=len(scores))
    times[:2] = 1
    weighted = equal_error(Ranked(scores, same).rates(times.astype(float)))
    repeated = equal_error(Ranked(scores.repeat(times), same.repeat(times)).rates())
    assert weighted.rate == pytest.approx(repeated.rate, abs=1e-12)


def test_separation_is_the_distance_in_standard_deviations():
    rng = np.random.default_rng(0)
    same = rng.random(40_000) < 0.5
    assert separation(rng.normal(size=40_000) * 2 + 3 * same, same) == pytest.approx(1.5, abs=0.03)


def planted(rng, num_speakers: int, spread: float):
    """All pairs of two recordings of each voice; how well a voice is told apart differs from voice to voice."""
    who = np.arange(num_speakers).repeat(2)
    first, second = np.triu_indices(len(who), 1)
    speakers = np.stack([who[first], who[second]], 1)
    same = speakers[:, 0] == speakers[:, 1]
    ease = rng.normal(size=num_speakers) * spread
    scores = rng.normal(size=len(same)) + np.where(same, 2 + 2 * ease[speakers[:, 0]], ease[speakers].sum(1))
    return scores, same, speakers


def test_the_interval_covers_the_rate_of_all_voices_nineteen_times_in_twenty():
    rng = np.random.default_rng(3)
    everyone = equal_error(Ranked(*planted(rng, 700, 0.7)[:2]).rates()).rate
    inside = []
    for _ in range(100):
        scores, same, speakers = planted(rng, 20, 0.7)
        low, high = speaker_interval([Ranked(scores, same)], speakers, same, resamples=200)
        inside.append(low <= everyone <= high)
    assert 0.84 <= np.mean(inside) <= 1


def test_the_interval_is_the_same_each_time_and_that_of_equal_runs_is_that_of_one():
    scores, same, speakers = planted(np.random.default_rng(0), 12, 0.5)
    one = speaker_interval([Ranked(scores, same)], speakers, same, resamples=50)
    assert one == speaker_interval([Ranked(scores, same)], speakers, same, resamples=50)
    assert one == pytest.approx(speaker_interval([Ranked(scores, same)] * 3, speakers, same, resamples=50))
    assert one.low < equal_error(Ranked(scores, same).rates()).rate < one.high


@pytest.mark.parametrize(("same", "kind"), [(True, "one speaker"), (False, "two speakers")])
def test_trials_of_one_kind_are_refused(same, kind):
    with pytest.raises(DataError, match=f"all 4 trials are of {kind}"):
        Ranked(np.arange(4.0), np.full(4, same))


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(DataError, match="1 of 3 trial scores are not finite"):
        Ranked(np.array([0.1, np.nan, 0.2]), np.array([True, False, True]))
