"""Batches: planned, shuffled and read, in this process and in others."""

import shutil
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import DataError, SettingsError, StoreError
from cache.frames import FrameSpan, num_frames
from cache.manifest import Manifest
from cache.receipts import open_receipt
from pipeline.distill.batches import BatchReader
from pipeline.distill.plan import Aligned, Full, Item, Planned, plan_epoch
from pipeline.student.encoder import Encoder
from pipeline.student.shape import EncoderShape
from tests.distill_fixtures import SHAPE, make_world

CROP = Aligned(kind="aligned", max_seconds=1.0)
FULL = Full(kind="full")


def lengths(count=200, seed=0):
    return np.random.default_rng(seed).integers(400, 48_000, size=count)


def padded_samples(batch, samples):
    return len(batch) * max(int(samples[i.utterance]) if i.span is None else samples_of(i) for i in batch)


def samples_of(item):
    return item.span.samples.stop - item.span.samples.start


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(400, 60_000), min_size=1, max_size=60),
    st.integers(0, 5),
    st.integers(0, 50),
    st.sampled_from([FULL, CROP]),
)
def test_every_utterance_is_in_exactly_one_batch_and_no_batch_exceeds_its_budget(sizes, seed, epoch, crop):
    samples = np.array(sizes)
    plan = plan_epoch(samples, crop, 4.0, seed, epoch)
    assert sorted(item.utterance for batch in plan for item in batch) == list(range(len(samples)))
    assert all(batch and padded_samples(batch, samples) <= 4 * 16_000 for batch in plan)
    for item in (item for batch in plan for item in batch if item.span is not None):
        assert item.span.count == num_frames(16_000)
        assert item.span.start >= 0
        assert item.span.start + item.span.count <= num_frames(int(samples[item.utterance]))


def test_a_plan_is_a_pure_function_of_seed_and_epoch():
    np.random.seed(0)  # what the plan must not depend on
    plan = plan_epoch(lengths(), CROP, 8.0, seed=1, epoch=4)
    np.random.seed(1)
    assert plan == plan_epoch(lengths(), CROP, 8.0, seed=1, epoch=4)
    assert plan != plan_epoch(lengths(), CROP, 8.0, seed=1, epoch=5)
    assert plan != plan_epoch(lengths(), CROP, 8.0, seed=2, epoch=4)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(400, 60_000), min_size=1, max_size=60), st.integers(0, 5), st.sampled_from([FULL, CROP]))
def test_the_plan_is_the_greedy_one_written_the_slow_way(sizes, seed, crop):
    generator = np.random.default_rng([seed, 2])
    pieces, jitter = [], 0.05
    for size, draw in zip(sizes, generator.random(len(sizes)).tolist(), strict=True):
        frames = num_frames(size)
        if crop is CROP and frames > 49:  # frames of one second
            pieces.append((16_000 - 240, FrameSpan(int(draw * (frames - 48)), 49)))
        else:
            pieces.append((size, None))
    keys = [size * (1.0 + jitter * draw) for (size, _), draw in zip(pieces, generator.random(len(sizes)), strict=True)]
    batches: list[list[Item]] = []
    longest = 0
    for u in sorted(range(len(sizes)), key=keys.__getitem__):
        longest = max(longest, pieces[u][0])
        if not batches or (len(batches[-1]) + 1) * longest > 4 * 16_000:
            batches.append([])
            longest = pieces[u][0]
        batches[-1].append(Item(u, pieces[u][1]))
    expected = [batches[i] for i in generator.permutation(len(batches))]
    plan = plan_epoch(np.array(sizes), crop, 4.0, seed, 2)
    assert plan == expected
    middle = len(expected) // 2
    assert plan[middle:] == expected[middle:]  # where a resumed training goes on
    assert plan[-1] == expected[-1]


def test_a_plan_takes_bytes_and_not_objects_an_utterance():
    samples = lengths(300_000)
    tracemalloc.start()
    try:
        plan = plan_epoch(samples, CROP, 30.0, 0, 0)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 15 * len(samples)  # 139 as lists of items
    assert peak < 60 * len(samples)
    assert sum(map(len, plan)) == len(samples)


def test_like_lengths_are_together_and_the_order_is_not_by_length():
    samples = lengths(2_000)
    plan = plan_epoch(samples, FULL, 30.0, seed=0, epoch=0)
    padded = sum(padded_samples(batch, samples) for batch in plan)
    assert samples.sum() / padded > 0.93
    means = [np.mean([samples[i.utterance] for i in batch]) for batch in plan]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.3


def test_crops_reach_the_first_and_the_last_frame():
    samples = np.array([16_000 + 5 * 320])
    starts = {plan_epoch(samples, CROP, 4.0, 0, epoch)[0][0].span.start for epoch in range(200)}
    assert starts == set(range(6))


def test_an_utterance_longer_than_a_batch_is_refused_with_the_way_out():
    with pytest.raises(SettingsError, match=r"batch_seconds is 2 but an utterance has 3\.00 s"):
        plan_epoch(np.array([48_000]), FULL, 2.0, 0, 0)


@pytest.fixture(scope="module")
def world(shared_root):
    return make_world(shared_root)


def open_reader(world, manifest=None):
    stores = [open_receipt(world.root / "receipts" / name) for name in ("waves.json", "hubert.json")]
    return BatchReader(manifest or world.manifest, stores[0], stores[1:], [["layer-03", "layer-01"]]), stores


def tensors_of(batch):
    return [batch.waves, batch.samples, *batch.targets, batch.frames]


def test_a_batch_holds_the_rows_and_samples_of_its_spans(world):
    reader, (waves, features) = open_reader(world)
    plan = plan_epoch(world.manifest.samples, Aligned(kind="aligned", max_seconds=0.5), 3.0, 0, 0)
    assert any(item.span is None for batch in plan for item in batch)
    for items in plan:
        batch = reader.read_clean(items)
        for row, (name, span) in enumerate((world.manifest[i.utterance].id, i.span) for i in items):
            wave = waves.read("wave", name)
            rows = [features.read(array, name) for array in ("layer-03", "layer-01")]
            if span is not None:
                wave, rows = wave[span.samples], [r[span.rows] for r in rows]
            count, length = len(rows[0]), len(wave)
            assert (int(batch.frames[row]), int(batch.samples[row])) == (count, length)
            assert count == num_frames(length)
            np.testing.assert_array_equal(batch.waves[row, :length], wave)
            np.testing.assert_array_equal(batch.targets[0][row, :, :count], np.stack(rows))
            assert not batch.waves[row, length:].any()


@pytest.mark.parametrize("readers", [1, 2])
def test_what_reader_processes_bring_is_what_is_read_here(world, readers):
    reader, _ = open_reader(world)
    plans = [plan_epoch(world.manifest.samples, CROP, 3.0, 0, epoch) for epoch in range(3)]
    planned = [Planned(number, items) for number, items in enumerate(items for plan in plans for items in plan)]
    with reader.ahead(iter(planned), 3.0, readers, torch.device("cpu")) as batches:
        number = 0
        for wanted, batch in zip(planned, batches, strict=True):
            want = reader.read(wanted)
            assert (batch.ids, batch.number) == (want.ids, wanted.number)
            for got, expected in zip(tensors_of(batch), tensors_of(want), strict=True):
                assert got.dtype == expected.dtype
                assert torch.equal(got, expected)
            number += 1
    assert number == len(planned) > 6


def test_a_batch_may_hold_thousands_of_utterances(world):
    reader, _ = open_reader(world)
    planned = Planned(0, [Item(u % len(world.manifest), FrameSpan(u % 7, 1)) for u in range(4_000)])
    with reader.ahead(iter([planned] * 6), 100.0, 1, torch.device("cpu")) as batches:
        (*_, last) = batches
    want = reader.read(planned)
    assert torch.equal(last.targets[0], want.targets[0])
    assert torch.equal(last.waves, want.waves)


def test_damage_that_a_reader_process_meets_is_told_here(world, tmp_path, monkeypatch):
    shutil.copytree(world.root / "store", tmp_path / "store")
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    reader, (_, features) = open_reader(world)
    plan = plan_epoch(world.manifest.samples, FULL, 3.0, 0, 0)
    for shard in features.directory.glob("layer-01/c/*/0"):
        shard.write_bytes(shard.read_bytes()[:-9] + bytes(9))
    with (
        pytest.raises(StoreError, match=r"layer-01/c/\d/0: the shard's index is damaged"),
        reader.ahead(map(Planned, range(len(plan)), plan), 3.0, 1, torch.device("cpu")) as batches,
    ):
        list(batches)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(400, 60_000), min_size=1, max_size=80),
    per_shard=st.integers(1, 12),
    together=st.integers(1, 5),
    epoch=st.integers(0, 3),
)
def test_shuffling_within_shards_finishes_some_shards_before_it_begins_others(sizes, per_shard, together, epoch):
    shards = np.arange(len(sizes)) // per_shard
    plan = plan_epoch(np.array(sizes), FULL, 4.0, 0, epoch, shards, together)
    order = [item.utterance for items in plan for item in items]
    assert sorted(order) == list(range(len(sizes)))
    seen = shards[order]
    begins = [int(np.flatnonzero(seen == s)[0]) for s in range(shards[-1] + 1)]
    ends = [int(np.flatnonzero(seen == s)[-1]) for s in range(shards[-1] + 1)]
    for at in range(len(order)):  # shards that are begun and not finished
        assert sum(b <= at <= e for b, e in zip(begins, ends, strict=True)) <= together
    for items in plan:
        assert len(items) * max(sizes[i.utterance] for i in items) <= 64_000
        assert len({int(shards[i.utterance]) for i in items}) <= together


def test_shards_come_in_another_order_in_every_epoch_and_mixing_all_of_them_is_the_shuffle_of_everywhere():
    samples, shards = lengths(), np.arange(len(lengths())) // 10
    first = [int(shards[plan_epoch(samples, FULL, 30.0, 0, epoch, shards, 1)[0][0].utterance]) for epoch in range(20)]
    assert len(set(first)) > 3

    def batches(*local):
        plan = plan_epoch(samples, FULL, 30.0, 0, 0, *local)
        return sorted(sorted(item.utterance for item in items) for items in plan)

    assert batches(shards, 1_000) == batches()


def test_the_student_gives_a_frame_for_every_target_of_a_batch(world):
    reader, _ = open_reader(world)
    encoder = Encoder(EncoderShape.model_validate(SHAPE))
    for items in plan_epoch(world.manifest.samples, Aligned(kind="aligned", max_seconds=0.4), 3.0, 0, 1):
        batch = reader.read_clean(items)
        with torch.no_grad():
            assert encoder(batch.waves.float() / 32_768, batch.samples).hidden[-1].shape[1] == batch.targets[0].shape[2]


def test_whole_utterances_under_the_teachers_own_weights_give_back_the_stored_targets(world):
    from pipeline.student.checkpoint import load_student

    reader, _ = open_reader(world)
    teacher = load_student(world.root / "teachers/hubert")
    batch = reader.read_clean([Item(u, None) for u in range(len(world.manifest))])
    with torch.no_grad():
        states = teacher(batch.waves.float() / 32_768, batch.samples).hidden
    for row, count in enumerate(batch.frames.tolist()):
        stored = batch.targets[0][row, :, :count].float()
        live = torch.stack([states[3][row, :count], states[1][row, :count]])
        assert float((stored - live).norm() / live.norm()) < 1e-3


def test_an_utterance_that_a_store_lacks_is_named(world):
    import dataclasses

    longer = dataclasses.replace(world.manifest[4], samples=world.manifest[4].samples + 320)
    with pytest.raises(DataError, match=r"utt-04: the manifest says \d+ samples but .*waves.* has \d+ samples"):
        open_reader(world, Manifest((longer,)))
    with pytest.raises(DataError, match=r"other: the manifest says .* has nothing"):
        open_reader(world, Manifest((dataclasses.replace(longer, id="other"),)))
