"""Batches side by side: the same bytes by any number of lanes, of every family, and an error ends all of them."""

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from cache.errors import DataError
from cache.frames import frames_of
from cache.manifest import Manifest
from cache.plan import plan_rows
from cache.receipts import open_receipt
from pipeline.extract import extract
from pipeline.extraction.settings import Calibration, ExtractParams, Fail, Keep
from pipeline.padding import LengthMaskedGroupNorm
from pipeline.perthread import PerThread
from pipeline.teachers.families import PAIRS
from pipeline.upstream import LayersAlone
from tests.test_teachers_families import MODELS, make_teacher

pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask"),
    pytest.mark.filterwarnings("ignore:__array_wrap__"),
]
PARAMS = ExtractParams(
    version=1,
    codec="float32",
    chunk_frames=16,
    shard_frames=128,
    batch_seconds=1.7,
    long=Fail(kind="fail", max_sec=60.0),
    calibration=Calibration(seconds=60, seed=0),
)
ALL = Keep(layers="all", select="all")


class Framed(LayersAlone):
    """A model whose one layer is the framed wave; `before` is called in the lane, with the batch."""

    num_layers, width = 1, 400

    def __init__(self, before=lambda waves: None):
        self.before = before

    def describe(self):
        return {"kind": "framed", "digest": "0"}

    def layers(self, waves, samples):
        self.before(waves)
        return [waves.unfold(1, 400, 320)]


@pytest.fixture
def lanes(monkeypatch):
    """Sets how many lanes the next extractions have, and has threads take turns a thousand times as often."""
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield torch.set_num_threads
    torch.set_num_threads(threads)
    sys.setswitchinterval(interval)


def run(model, corpus, store, monkeypatch, params=PARAMS, writers=None, tick=lambda *_, **__: None):
    (corpus.root / store).mkdir()
    (corpus.root / store / "waves").symlink_to(corpus.root / "store" / "waves")
    monkeypatch.setenv("DECANT_STORE", str(corpus.root / store))
    return extract(model, corpus.manifest, corpus.waves, params, ALL, "cpu", tick, writers)


@pytest.mark.parametrize("name", MODELS)
def test_no_number_of_lanes_changes_a_bit_of_any_family(name, tiny_corpus, tmp_path, lanes, monkeypatch):
    some = Manifest(tuple(u for u in tiny_corpus.manifest if u.samples >= PAIRS.field))  # what w2v-BERT can hear
    corpus = replace(tiny_corpus, manifest=some)
    teacher, _ = make_teacher(tmp_path, name)
    lanes(1)
    alone = run(teacher, corpus, "one", monkeypatch)
    assert open_receipt(alone).plan.num_shards > 2
    for number in (2, 5):
        lanes(number)
        assert run(teacher, corpus, f"lanes-{number}", monkeypatch) == alone  # hashes of all shards are in it


@pytest.mark.parametrize("writers", [0, 1])
def test_batches_of_one_shard_and_of_the_next_are_computed_at_the_same_time(tiny_corpus, lanes, monkeypatch, writers):
    lanes(6)
    together = threading.Barrier(6, timeout=60)  # whoever comes alone is not let through, and the test fails
    met = []

    def before(waves):
        if len(met) < 6:
            met.append(waves.shape)
            together.wait()

    # a batch for each utterance, and five of them in the first shard
    params = PARAMS.model_copy(update={"batch_seconds": 0.01, "shard_frames": 96})
    receipt = run(Framed(before), tiny_corpus, "side-by-side", monkeypatch, params, writers)
    store = open_receipt(receipt, verify=True)
    assert len(store.plan.utterances(0)) == 5
    for u in tiny_corpus.manifest:
        wave = tiny_corpus.waves.read("wave", u.id).astype(np.float32) / 32768
        frames = np.lib.stride_tricks.sliding_window_view(wave, 400)[::320]
        np.testing.assert_array_equal(store.read("layer-00", u.id), frames)


def test_no_more_than_two_shards_are_begun_and_not_written(tiny_corpus, lanes, monkeypatch):
    lanes(4)
    params = PARAMS.model_copy(update={"batch_seconds": 0.01, "shard_frames": 96})
    done, begun = [], []
    shard_of = {}

    def before(waves):
        shard = shard_of[waves.shape[1]]
        begun.append(shard)
        assert len(set(begun)) - len(done) <= 2

    def tick(*_, found=False):
        if not found:
            done.append(None)

    plan = plan_rows(frames_of(tiny_corpus.manifest.samples), 96)
    for shard in range(plan.num_shards):
        for u in plan.utterances(shard):
            shard_of[tiny_corpus.manifest[u].samples] = shard
    assert plan.num_shards > 4
    assert len(shard_of) == len(tiny_corpus.manifest)
    run(Framed(before), tiny_corpus, "bounded", monkeypatch, params, tick=tick)
    assert len(done) == plan.num_shards == len(set(begun))


def test_an_error_in_one_lane_is_the_error_of_the_run_and_ends_the_others(tiny_corpus, lanes, monkeypatch):
    lanes(2)
    made = []

    def before(waves):
        made.append(waves.shape[1])
        if waves.shape[1] == 24_000:
            waves *= float("nan")

    params = PARAMS.model_copy(update={"batch_seconds": 0.01, "shard_frames": 256})
    with pytest.raises(DataError, match=r"^tiny/005: layer-00 has values that are not finite in float32"):
        run(Framed(before), tiny_corpus, "bad", monkeypatch, params)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane")]
    assert torch.get_num_threads() == 2
    with ThreadPoolExecutor(1) as later:
        assert later.submit(torch.get_num_threads).result() == 2


def test_what_a_forward_leaves_in_a_norm_is_seen_by_its_thread_alone_and_by_no_copy():
    norm = LengthMaskedGroupNorm(3)
    norm.valid = torch.tensor([5])
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: norm.valid).result() is None
        other.submit(setattr, norm, "valid", torch.tensor([7])).result()
    assert norm.valid.tolist() == [5]
    assert copy.deepcopy(norm).valid is None
    held = PerThread()
    held.value = 3
    assert copy.copy(held).value is None
