"""Targets of several teachers: what is written, when it changes, and what is refused."""

import numpy as np
import pytest
import torch

from cache.errors import SettingsError, StoreError
from cache.publish import write_json
from cache.ragged import Store
from cache.zarrshard import ArraySpec
from pipeline.distill.ensemble import TargetMaker
from pipeline.distill.settings import StudentParams
from pipeline.layers.ensembles import Channel
from pipeline.layers.statistics import channel_statistics, draw
from pipeline.layers.targets import open_targets, read_targets, targets_json
from stages._params import read_params
from tests.distill_fixtures import make_world, write_params
from tests.distill_fixtures import write_receipt as run_teacher
from tests.ensemble_fixtures import MIXED, PAIRED, SAMPLE, choose, make_teachers, parsed, several


@pytest.fixture(scope="module")
def world(shared_root):
    return make_teachers(shared_root)


@pytest.fixture
def own_world(tmp_path, monkeypatch):
    """One that a test may change, with hubert and wavlm."""
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    world = make_world(tmp_path)
    run_teacher(world, "wavlm", seed=9)
    return world


def test_normalised_targets_have_mean_0_and_deviation_1_over_the_sample(world):
    ensemble = several("heads", ("hubert", (3, 1), 1.0), ("wavlm", (0,), 1.0), normalise=SAMPLE)
    targets = choose(world, ensemble)
    stores = open_targets(targets)
    settings = parsed(ensemble)
    make = TargetMaker(settings, targets, stores, "cpu")
    drawn = draw(stores[0].rows, settings.normalise)
    assert 1 < len(drawn) < len(world.manifest)
    assert stores[0].rows[drawn].sum() >= 150 > stores[0].rows[drawn].sum() - stores[0].rows[drawn].max()
    groups = [
        make(
            [
                torch.from_numpy(s.read_batch([u], list(t.arrays))[0])
                for s, t in zip(stores, targets.stores, strict=True)
            ]
        )
        for u in drawn
    ]
    for g in range(2):
        frames = torch.cat([group[g][0] for group in groups], dim=1).double()
        torch.testing.assert_close(frames.mean(1), torch.zeros_like(frames[:, 0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(frames.std(1, correction=0), torch.ones_like(frames[:, 0]), rtol=0, atol=1e-5)


def test_statistics_are_those_of_frames_added_one_by_one(world):
    targets = choose(world, several("heads", ("hubert", (3, 1), 1.0), ("narrow", (0,), 1.0), normalise=SAMPLE))
    (floats, coded), stores = targets.stores, open_targets(targets)
    utterances = draw(stores[0].rows, Channel(**SAMPLE))
    for n, array in enumerate(floats.arrays):
        frames = [frame.astype(np.float64) for u in utterances for frame in stores[0].read(array, u)]
        mean = sum(frames) / len(frames)
        std = np.sqrt(sum(np.square(frame - mean) for frame in frames) / len(frames))
        np.testing.assert_array_max_ulp(floats.statistics.mean[n], mean.astype(np.float32), 1)
        np.testing.assert_array_max_ulp(floats.statistics.std[n], std.astype(np.float32), 1)
    np.testing.assert_array_equal(coded.statistics.mean[0], stores[1].tables("layer-00")["mean"])
    np.testing.assert_array_equal(coded.statistics.std[0], stores[1].tables("layer-00")["std"])
    several_frames = np.random.default_rng(0).standard_normal((1_001, 12))
    one_by_one = np.zeros(12)
    for frame in several_frames:
        one_by_one += frame
    np.testing.assert_array_equal(several_frames.sum(0), one_by_one)  # so that the bits are the same everywhere


def test_a_channel_that_never_moves_stays_near_0_when_normalised():
    class Still(Store):
        """One utterance of three channels: one moves, one hardly, one not at all."""

        rows, width = np.array([400]), 3

        def __init__(self):
            """Without a folder."""

        def spec(self, array):
            return ArraySpec(array, 3, "float32")

        def tables(self, array):
            return {}

        def read(self, array, utterance, span=None):
            wave = np.sin(np.arange(400, dtype=np.float32))
            return np.stack([wave, 1e-6 * wave, np.full(400, 7, np.float32)], axis=1)

    statistics = channel_statistics(Still(), ["layer-00"], Channel(**SAMPLE))
    mean, std = statistics.mean[0], statistics.std[0]
    np.testing.assert_allclose(std, [0.5**0.5, 0.01 * (0.5 / 3) ** 0.5, 0.01 * (0.5 / 3) ** 0.5], rtol=2e-3)
    assert np.abs((Still().read("layer-00", "u") - mean) / std).max(0)[1:].max() < 1e-3


def test_targets_change_only_with_what_is_read_and_name_no_teacher(own_world):
    path = own_world.root / "targets.json"
    ensemble = several("heads", ("wavlm", (1,), 1.0), ("hubert", (3, 1), 1.0), normalise=SAMPLE)

    def chosen(settings=ensemble):
        write_json(path, targets_json(choose(own_world, settings)))
        return path.read_bytes()

    before = chosen()
    assert b"wavlm" not in before
    assert b"hubert" not in before
    targets = choose(own_world, ensemble)
    assert read_targets(path) == targets
    assert [list(store.arrays) for store in targets.stores] == [["layer-01"], ["layer-03", "layer-01"]]
    run_teacher(own_world, "spare", seed=7)
    run_teacher(own_world, "hubert", seed=0, layers=(0, 1, 2, 3))
    assert chosen() == before
    heavier = several("heads", ("wavlm", (1,), 5.0), ("hubert", (3, 1), 1.0), normalise=SAMPLE)
    assert chosen(heavier) == before  # how much a teacher counts is a setting of the student
    assert chosen(several("heads", *[(t, ls, 1.0) for t, ls in (("hubert", (3, 1)), ("wavlm", (1,)))])) != before
    assert chosen({**ensemble, "normalise": {**SAMPLE, "seed": 2}}) != before
    run_teacher(own_world, "wavlm", seed=10)
    assert chosen() != before
    damaged = targets_json(targets)
    damaged["stores"][0]["statistics"]["mean"] = damaged["stores"][0]["statistics"]["mean"][:-4]
    write_json(path, damaged)
    with pytest.raises(StoreError, match=r"statistics are not \(1, 16\) numbers .*; run `decant targets` again"):
        read_targets(path)


def test_teachers_that_cannot_be_combined_are_refused_with_the_way_out(world):
    with pytest.raises(SettingsError, match="one width, and there are hubert 16, narrow 12; choose heads or concat"):
        choose(world, several("average", *PAIRED))
    write_params(world, ensemble=several("concat", *MIXED))
    with pytest.raises(SettingsError, match="hubert has 2, narrow has 3; list as many of each, or choose kind: heads"):
        read_params("students.distil", StudentParams, world.root / "params.yaml")
    write_params(world, ensemble=several("heads", ("hubert", (1,), 0.0)))
    with pytest.raises(
        SettingsError, match=r"students\.distil\.ensemble\.teachers\.0\.weight is 0\.0: .* greater than 0"
    ):
        read_params("students.distil", StudentParams, world.root / "params.yaml")
    with pytest.raises(SettingsError, match="asks for 'nobody' but .* has receipts of hubert, narrow, twin, wavlm;"):
        choose(world, several("heads", ("hubert", (1,), 1.0), ("nobody", (1,), 1.0)))
