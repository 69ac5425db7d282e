"""How alike layers are, and which belong together."""

import itertools
import tracemalloc

import dask.system
import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from sklearn.cluster import AgglomerativeClustering
from typer.testing import CliRunner

from cache.errors import SettingsError, StoreError
from cache.publish import read_json, write_json
from cache.ragged import Store
from cache.receipts import make_receipt, store_key, store_path
from cache.writer import open_writer
from pipeline.layers import similarity as module
from pipeline.layers.ensembles import GroupParams
from pipeline.layers.groups import distances, group_layers
from pipeline.layers.similarity import Similarity, SimilarityParams, similarity
from stages.similarity import app

ROWS = [31, 100, 7, 64, 90, 1, 55]
WIDTH = 12
L = 5


def layers_of_a_model(rng):
    """Layer after layer a little further from the first, with an offset and a scale of its own."""
    states = rng.normal(size=(sum(ROWS), WIDTH))
    for layer in range(L):
        states = np.tanh(states @ rng.normal(size=(WIDTH, WIDTH)) * 0.4 + 0.3 * layer) + 0.2 * states
        yield (states * (1 + layer) + layer).astype(np.float32)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    names = [f"layer-{n:02d}" for n in range(L)]
    key = store_key("features", {"model": {"kind": "made up"}})
    header = {"kind": "features", "key": key, "fingerprint": {"model": {"kind": "made up"}}}
    header |= {"codec": "float32", "width": WIDTH, "chunk_rows": 16, "shard_rows": 128}
    data = dict(zip(names, layers_of_a_model(np.random.default_rng(0)), strict=True))
    ends = np.cumsum(ROWS)
    with open_writer(
        store_path("features", key), header, [f"u{n}" for n in range(len(ROWS))], np.array(ROWS), names
    ) as writer:
        for shard, arrays in writer.missing().items():
            for name in arrays:
                some = [data[name][ends[u] - ROWS[u] : ends[u]] for u in writer.plan.utterances(shard)]
                writer.write(name, shard, np.concatenate(some))
    write_json(tmp_path / "receipt.json", make_receipt(store_path("features", key), names))
    return Store(store_path("features", key), names), np.stack(list(data.values())).astype(np.float64)


def params(measure="cka", seconds=1e6, memory_gb=1.0):
    return SimilarityParams(measure=measure, seconds=seconds, seed=0, memory_gb=memory_gb)


def cka_through_kernels(x, y):
    """The definition by n x n kernels: another route, without a cross-covariance."""
    centre = np.eye(len(x)) - 1 / len(x)
    one, other = centre @ (x @ x.T) @ centre, centre @ (y @ y.T) @ centre
    return np.trace(one @ other) / np.sqrt(np.trace(one @ one) * np.trace(other @ other))


@pytest.mark.parametrize("memory_gb", [1.0, 1e-6])
@pytest.mark.parametrize("block", [4096, 40])
def test_cka_is_that_of_its_definition_whatever_the_blocks_and_the_memory(store, monkeypatch, memory_gb, block):
    monkeypatch.setattr(module, "BLOCK_FRAMES", block)
    opened, data = store
    found = similarity(opened, params(memory_gb=memory_gb))
    assert found.frames == sum(ROWS)
    for i, j in itertools.product(range(L), repeat=2):
        assert found.matrix[i, j] == pytest.approx(cka_through_kernels(data[i], data[j]), abs=1e-10)


def test_cka_is_blind_to_rotation_scale_and_offset(store):
    opened, data = store
    rng = np.random.default_rng(1)
    turn, _ = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))
    assert cka_through_kernels(data[1], 3 * data[1] @ turn + 5) == pytest.approx(1)
    found = similarity(opened, params()).matrix
    np.testing.assert_allclose(np.diag(found), 1, atol=1e-12)
    np.testing.assert_array_equal(found, found.T)
    assert found.min() > 0


def test_cosine_and_distance_are_those_of_torch(store):
    opened, data = store
    tensors = torch.from_numpy(data)
    cosine, distance = similarity(opened, params("cosine")).matrix, similarity(opened, params("distance")).matrix
    for i, j in itertools.product(range(L), repeat=2):
        angle = torch.nn.functional.cosine_similarity(tensors[i], tensors[j], dim=1).mean()
        assert cosine[i, j] == pytest.approx(float(angle), abs=1e-10)
        apart = (tensors[i] - tensors[j]).abs().mean() + 1 - angle
        assert distance[i, j] == pytest.approx(float(apart), abs=1e-10)


def test_a_sample_is_some_utterances_and_the_same_ones_again(store):
    opened, _ = store
    found = similarity(opened, params(seconds=3.0))
    assert 150 <= found.frames < sum(ROWS)
    np.testing.assert_array_equal(found.matrix, similarity(opened, params(seconds=3.0)).matrix)
    everything = similarity(opened, params()).matrix
    assert 0 < np.abs(found.matrix - everything).max() < 0.2


def test_one_layer_has_nothing_to_be_compared_with(store):
    opened, _ = store
    with pytest.raises(StoreError, match=r"keeps 1 layer; extract two or more"):
        similarity(Store(opened.place, ["layer-03"]), params())


def drawn(seed, num=9):
    points = np.random.default_rng(seed).normal(size=(num, 4))
    apart = np.linalg.norm(points[:, None] - points[None], axis=2)
    return Similarity(tuple(range(num)), apart, 100)


def groups(found, num_groups, method="average", contiguous=False, leave_out=()):
    settings = GroupParams(num_groups=num_groups, linkage=method, contiguous=contiguous, leave_out=leave_out)
    return group_layers(found, "distance", settings)


@pytest.mark.parametrize("method", ["average", "complete", "single"])
@pytest.mark.parametrize("seed", range(5))
def test_groups_are_those_of_scikit_learn(method, seed):
    found = drawn(seed)
    for num_groups in range(1, 10):
        labels = AgglomerativeClustering(num_groups, metric="precomputed", linkage=method).fit_predict(found.matrix)
        theirs = {tuple(np.flatnonzero(labels == g).tolist()) for g in set(labels.tolist())}
        assert set(groups(found, num_groups, method).groups) == theirs


@pytest.mark.parametrize("method", ["average", "complete", "single"])
@pytest.mark.parametrize("seed", range(5))
def test_groups_of_neighbours_are_stretches_and_nest(method, seed):
    found = drawn(seed)
    before = [(n,) for n in range(9)]
    for num_groups in range(9, 0, -1):
        now = list(groups(found, num_groups, method, contiguous=True).groups)
        assert [layer for group in now for layer in group] == list(range(9))  # stretches, in order
        assert all(any(set(group) <= set(larger) for larger in now) for group in before)
        before = now
    # the first to join are the two neighbours that are nearest
    nearest = int(np.argmin(np.diag(found.matrix, 1)))
    assert (nearest, nearest + 1) in groups(found, 8, method, contiguous=True).groups


def test_neighbours_join_by_all_their_pairs_and_not_by_those_that_touch():
    matrix = np.array([[0, 1, 9, 9], [1, 0, 2, 9], [9, 2, 0, 3], [9, 9, 3, 0]], dtype=np.float64)
    found = Similarity((3, 4, 5, 6), matrix, 10)
    assert groups(found, 2, "complete", contiguous=True).groups == ((3, 4), (5, 6))
    assert groups(found, 2, "single", contiguous=True).groups == ((3, 4, 5), (6,))


def test_layers_that_lie_in_clusters_are_found_from_similarities():
    block = np.kron(np.eye(3), np.full((4, 4), 0.8)) + 0.1
    np.fill_diagonal(block, 1.0)
    settings = GroupParams(num_groups=3, linkage="average", contiguous=False, leave_out=(0,))
    found = group_layers(Similarity(tuple(range(12)), block, 10), "cka", settings)
    assert found.groups == ((1, 2, 3), (4, 5, 6, 7), (8, 9, 10, 11))
    assert found.layers == tuple(range(1, 12))
    want = fcluster(linkage(squareform(distances(block, "cka")[1:, 1:], checks=False), "average"), 3, "maxclust")
    assert [len(set(want[list(np.array(g) - 1)].tolist())) for g in found.groups] == [1, 1, 1]


def test_groups_that_cannot_be_are_refused():
    with pytest.raises(SettingsError, match=r"num_groups is 9 and there are 8 layers to group"):
        groups(drawn(0), 9, leave_out=(0,))
    with pytest.raises(SettingsError, match=r"leave_out names layer 12; the matrix has \[0, 1"):
        groups(drawn(0), 2, leave_out=(12,))
    assert groups(Similarity((4,), np.ones((1, 1)), 1), 1).groups == ((4,),)


def test_the_stage_writes_the_matrix_and_a_picture(store, tmp_path):
    settings = "similarity: {measure: cka, seconds: 3600, seed: 0, memory_gb: 1.0}\n"
    (tmp_path / "params.yaml").write_text(settings)
    options = {"receipt": "receipt.json", "out": "s/hubert.json", "picture": "s/hubert.png", "params": "params.yaml"}
    arguments = ["hubert", *(text for key, path in options.items() for text in (f"--{key}", str(tmp_path / path)))]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.output.startswith(f"similarity hubert: 5 layers, cka over {sum(ROWS)} frames, from 0.")
    written = read_json(tmp_path / "s/hubert.json")
    opened, _ = store
    np.testing.assert_allclose(written["matrix"], similarity(opened, params()).matrix, atol=1e-9)
    assert written["layers"] == list(range(L))
    assert (tmp_path / "s/hubert.png").read_bytes().startswith(b"\x89PNG")
    first = {name: (tmp_path / "s" / name).read_bytes() for name in ("hubert.json", "hubert.png")}
    CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert {name: (tmp_path / "s" / name).read_bytes() for name in first} == first


def test_memory_is_what_was_asked_for_and_a_long_recording_is_cut(tmp_path, monkeypatch):
    """About: four blocks and a dozen sums are under way, and a recording of two minutes is no block of its own."""
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(dask.system, "CPU_COUNT", 32)
    rows, width, names = [300] * 20 + [6_000], 96, [f"layer-{n:02d}" for n in range(6)]
    fingerprint = {"model": {"kind": "noise"}}
    header = {"kind": "features", "key": store_key("features", fingerprint), "fingerprint": fingerprint}
    header |= {"codec": "float16", "width": width, "chunk_rows": 64, "shard_rows": 8_192}
    place, rng = store_path("features", header["key"]), np.random.default_rng(0)
    with open_writer(place, header, [f"u{n}" for n in range(len(rows))], np.array(rows), names) as writer:
        for shard, arrays in writer.missing().items():
            for name in arrays:
                count = sum(rows[u] for u in writer.plan.utterances(shard))
                writer.write(name, shard, rng.normal(size=(count, width)).astype(np.float16))
    peaks, found = [], []
    for asked in (0.02, 0.2):
        tracemalloc.start()
        found.append(similarity(Store(place, names), params(memory_gb=asked)))
        peaks.append(tracemalloc.get_traced_memory()[1] / 1e9)
        tracemalloc.stop()
    assert peaks[0] < 0.03
    assert peaks[1] > 0.03, "less memory must have made a difference"
    np.testing.assert_allclose(found[0].matrix, found[1].matrix, rtol=1e-9)
