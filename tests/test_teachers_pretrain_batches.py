"""Batches of pretraining: spans that are hidden, epochs that are planned, and drawing on from any place."""

import json
from itertools import islice

import numpy as np
import pytest
import torch

from cache.errors import DataError
from pipeline.teachers.pretrain.batches import BatchMaker, Recordings, draws, mask_spans, plan_epoch
from tests.pretrain_fixtures import DISTORT, MIX, make_melodies, settings


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_melodies(tmp_path_factory.mktemp("waves"))


def test_spans_hide_about_half_of_the_frames_in_runs_of_at_least_ten():
    rng = np.random.default_rng(0)
    hidden = mask_spans(400, 150, 0.8, 10, rng)
    # 12 spans of 10 without replacement among 141 starts: 1 - (1 - 12/141)^10, a little less at the edges
    assert 0.54 < hidden.mean() < 0.60
    for row in hidden:
        edges = np.flatnonzero(np.diff(np.r_[0, row, 0]))
        assert (edges[1::2] - edges[::2] >= 10).all()


@pytest.mark.parametrize("frames", [1, 2, 9, 10, 11, 25])
def test_short_rows_are_hidden_somewhere_and_never_past_their_end(frames):
    hidden = mask_spans(5, frames, 0.8, 10, np.random.default_rng(0))
    assert hidden.shape == (5, frames)
    assert hidden.any(1).all()


def test_an_epoch_has_every_recording_once_in_batches_of_the_asked_size():
    frames = np.random.default_rng(0).integers(20, 400, 300)
    plan = plan_epoch(frames, 1_000, 150, np.random.default_rng(1))
    again = plan_epoch(frames, 1_000, 150, np.random.default_rng(1))
    assert sorted(np.concatenate([b.utterances for b in plan]).tolist()) == list(range(300))
    for batch, same in zip(plan, again, strict=True):
        assert np.array_equal(batch.utterances, same.utterances)
        assert len(batch.utterances) * batch.frames <= 1_000
        assert batch.frames == min(150, frames[batch.utterances].min())
    kept = sum(len(b.utterances) * b.frames for b in plan) / np.minimum(frames, 150).sum()
    assert kept > 0.9  # cropping to the shortest costs little, since neighbours are of like length


def test_a_recording_longer_than_a_batch_is_a_batch():
    (batch,) = plan_epoch(np.array([500]), 100, 1_000, np.random.default_rng(0))
    assert (batch.utterances.tolist(), batch.frames) == ([0], 500)


@pytest.mark.parametrize("done", [1, 2, 3, 4, 5, 11])
def test_drawing_on_from_any_place_gives_what_would_have_come(done):
    frames = np.random.default_rng(0).integers(20, 60, 12)  # epochs of four or five batches
    params = settings(batch_seconds=2.0)
    whole = list(islice(draws(params, frames, 1, 0, None), 16))
    assert len({d.place["position"] for d in whole}) < 7  # several epochs
    place = json.loads(json.dumps(whole[done - 1].place))  # as a state keeps it
    for wanted, found in zip(whole[done:], draws(params, frames, 1, done, place), strict=False):
        assert wanted.step == found.step
        assert np.array_equal(wanted.utterances, found.utterances)
        assert wanted.spans == found.spans
        assert np.array_equal(wanted.hidden, found.hidden)
        assert wanted.place == found.place


def test_a_batch_holds_the_samples_of_the_drawn_frames(corpus):
    recordings = Recordings(corpus.manifest, corpus.waves)
    draw = next(draws(settings(), recordings.frames, 0, 0, None))
    batch = BatchMaker(settings(), recordings, None, 0)(draw)
    assert batch.units is None
    for row, u, span in zip(batch.waves, draw.utterances, draw.spans, strict=True):
        whole = corpus.waves.read("wave", recordings.ids[u]).astype(np.float32) / 32_768
        np.testing.assert_array_equal(row.numpy(), whole[320 * span.start : 320 * (span.start + span.count - 1) + 400])


def test_distortion_and_mixing_move_neither_crops_nor_hidden_frames_and_are_drawn_for_each_step_alone(corpus):
    recordings = Recordings(corpus.manifest, corpus.waves)
    noisy = settings(distort=DISTORT, mix=MIX)
    clean = list(islice(draws(settings(), recordings.frames, 0, 0, None), 4))
    drawn = list(islice(draws(noisy, recordings.frames, 0, 0, None), 4))
    for one, other in zip(clean, drawn, strict=True):
        assert one.spans == other.spans
        assert np.array_equal(one.hidden, other.hidden)
    in_order = [BatchMaker(noisy, recordings, None, 0)(draw).waves for draw in drawn]
    backwards = [BatchMaker(noisy, recordings, None, 0)(draw).waves for draw in reversed(drawn)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(in_order, backwards, strict=True))
    other_round = BatchMaker(noisy, recordings, None, 1)(drawn[0]).waves
    assert not torch.equal(in_order[0], other_round)


def test_a_manifest_without_training_recordings_is_refused(corpus):
    with pytest.raises(DataError, match="no utterance has split train"):
        Recordings(corpus.manifest.select(split="dev"), corpus.waves)
