"""Batches of a task: which utterances, in which epoch, and how much of each."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest

from cache.errors import SettingsError
from cache.frames import num_frames
from pipeline.finetune.plan import Place, Pool, batches_from, check_sizes, plan_epoch
from pipeline.finetune.settings import KeywordParams

SECONDS = np.random.default_rng(0).uniform(0.3, 2.0, size=60)
CLASSES = np.array([0] * 50 + [1] * 8 + [2] * 2)


def pool(balanced=False, crop=None, batch=8.0):
    params = KeywordParams(layers="last", head_width=4, class_balanced=balanced, crop_seconds=crop, batch_seconds=batch)
    samples = (SECONDS * 16_000).astype(np.int64)
    return Pool("kws", params, np.arange(100, 160), samples, CLASSES)


def batches_of(pool, seed=0, epoch=0):
    plan = plan_epoch(pool, seed, epoch)
    return [plan.batch(number) for number in range(len(plan))]


def test_every_example_is_in_one_batch_of_an_epoch_and_no_batch_is_too_long():
    batches = batches_of(pool())
    assert sorted(item.utterance for items in batches for item in items) == list(range(100, 160))
    for items in batches:
        longest = max(int(SECONDS[item.utterance - 100] * 16_000) for item in items)
        assert longest * len(items) <= 8.0 * 16_000
    assert all(item.span is None for items in batches for item in items)


def test_an_epoch_is_a_function_of_seed_and_number():
    assert batches_of(pool()) == batches_of(pool())
    assert batches_of(pool(), seed=1) != batches_of(pool())
    assert batches_of(pool(), epoch=1) != batches_of(pool())


def test_balanced_classes_come_equally_often():
    balanced = pool(balanced=True)
    drawn = Counter(
        int(CLASSES[item.utterance - 100])
        for epoch in range(60)
        for b in batches_of(balanced, epoch=epoch)
        for item in b
    )
    assert sum(drawn.values()) == 60 * 60
    for count in drawn.values():  # 1200 expected, 28 the standard deviation
        assert abs(count - 1200) < 4 * 28


def test_what_is_longer_is_cropped_somewhere_on_the_frame_grid():
    limit, starts = num_frames(16_000), []
    for epoch in range(40):
        for items in batches_of(pool(crop=1.0), epoch=epoch):
            for item in items:
                whole = num_frames(int(SECONDS[item.utterance - 100] * 16_000))
                assert (item.span is None) == (whole <= limit)
                if item.span is not None:
                    assert item.span.count == limit
                    assert 0 <= item.span.start <= whole - limit
                    starts.append(item.span.start / (whole - limit))
    assert 0.45 < np.mean(starts) < 0.55
    assert {min(starts), max(starts)} == {0.0, 1.0}


def test_batches_are_not_sorted_by_length():
    """A keyword has its length: batches of one length would be batches of one keyword."""
    spread = [np.std([SECONDS[i.utterance - 100] for i in items]) for items in batches_of(pool()) if len(items) > 2]
    assert np.mean(spread) > 0.6 * SECONDS.std()


def test_from_any_place_the_same_batches_follow():
    whole = list(islice(batches_from(pool(), 3, Place(0, 0)), 30))
    assert {place.epoch for _, place in whole} >= {0, 1}
    for number, (_, place) in enumerate(whole[:-1]):
        assert next(batches_from(pool(), 3, place)) == whole[number + 1]


def test_an_utterance_longer_than_a_batch_is_refused_with_the_way_out():
    with pytest.raises(
        SettingsError, match=r"tasks\.kws\.batch_seconds is 1 but an utterance has 1\.995 s.*crop_seconds"
    ):
        check_sizes(pool(batch=1.0))
    check_sizes(pool(batch=1.0, crop=0.5))
    assert len(plan_epoch(pool(batch=1.0, crop=0.5), 0, 0)) > 10


def test_one_that_the_first_epoch_does_not_draw_is_looked_at_too():
    balanced = pool(balanced=True, batch=2.5)
    undrawn = np.setdiff1d(np.arange(100, 160), plan_epoch(balanced, 0, 0).utterances)
    balanced.samples[undrawn[0] - 100] = 3 * 16_000
    with pytest.raises(SettingsError, match=r"an utterance has 3\.000 s"):
        check_sizes(balanced)


def test_an_utterance_just_too_short_to_be_cropped_can_be_too_long_for_a_batch():
    edge = pool(crop=1.0, batch=1.0)
    edge.samples[0] = 16_040  # as many frames as a crop of a second
    with pytest.raises(SettingsError, match=r"an utterance has 1\.00\d s.*crop_seconds \(1\) smaller"):
        check_sizes(edge)
