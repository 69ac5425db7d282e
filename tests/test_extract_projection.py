"""The projection, DPHuBERT's layer 0: the same alone and in a batch, kept under its own name, and no hidden state."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
import yaml

from cache.errors import SettingsError
from cache.manifest import Manifest, write_manifest
from cache.names import array_name, in_order, in_words, keeps_layers, layers_of
from cache.publish import read_json, write_json
from cache.receipts import open_receipt
from cache.repair import repair_store
from cache.verify import verify_store
from pipeline.blend import Blend
from pipeline.cost import cost_of
from pipeline.extract import extract
from pipeline.extraction.settings import Keep
from pipeline.layers.similarity import SimilarityParams, similarity
from pipeline.student.adopt import adopt, copy_adopted, read_shape, save_adopted
from pipeline.student.checkpoint import save_student
from pipeline.student.encoder import Encoder
from pipeline.student.upstream import load_student_upstream
from stages.cacheplan import main as plan
from stages.probe import main as probe
from tests.distill_fixtures import EXTRACT, make_world, write_receipt
from tests.test_tasks_probe import PARAMS as PROBE
from tests.test_teachers_families import MODELS, SPECTRAL, make_teacher
from tests.test_teachers_forward import speech_like

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
WITH = [name for name in MODELS if name not in SPECTRAL]


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    return make_world(tmp_path)


def run(world, model, layers, **changes):
    waves = open_receipt(world.root / "receipts/waves.json")
    params = EXTRACT.model_copy(update={"codec": "float32", **changes})
    keep = Keep(layers=layers, select="all")
    return extract(model, world.manifest, waves, params, keep, "cpu", lambda *_, **__: None)


def model_of(world, name="hubert", seed=0):
    write_receipt(world, name, seed)
    return load_student_upstream(world.root / "teachers" / name)


def test_the_name_is_its_own_and_comes_before_the_layers():
    names = ["mean-01-02", "layer-10", "projection", "layer-00"]
    assert in_order(names) == ["projection", "layer-00", "layer-10", "mean-01-02"]
    assert (array_name("projection"), layers_of("projection"), keeps_layers("projection")) == ("projection", (), True)
    assert not keeps_layers("projection-00")
    assert [in_words(name) for name in names] == ["[1, 2]", "10", "projection", "0"]


@pytest.mark.parametrize("name", WITH)
def test_the_projection_is_what_transformers_projects(tmp_path, name):
    teacher, model = make_teacher(tmp_path, name)
    wave, samples = speech_like(8_000)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "source")
    prepared = extractor(wave[0].numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        projected = model.feature_projection(model.feature_extractor(prepared).transpose(1, 2))
    expected = projected if isinstance(projected, torch.Tensor) else projected[0]
    projection, layers = teacher.outputs(wave, samples)
    torch.testing.assert_close(projection, expected, rtol=0, atol=1e-5)
    assert (projection - layers[0]).abs().max() > 0.1  # positions, and in base models a norm, lie between


@pytest.mark.parametrize("name", WITH)
def test_no_company_or_padding_changes_the_projection_and_padded_frames_are_zero(tmp_path, name):
    teacher, _ = make_teacher(tmp_path, name)
    lengths = [400, 719, 3_333, 9_999, 12_345]
    waves, samples = speech_like(*lengths)
    alone = [teacher.outputs(waves[u : u + 1, :n], samples[u : u + 1]).projection[0] for u, n in enumerate(lengths)]
    rng = np.random.default_rng(0)
    for _ in range(4):
        batch = rng.permutation(len(lengths))[: rng.integers(2, len(lengths) + 1)].tolist()
        width = int(samples[batch].max()) + int(rng.choice([0, 160, 7_000]))
        given = torch.nn.functional.pad(waves, (0, 8_000))[batch, :width]
        given += 3.0 * (torch.arange(width) >= samples[batch][:, None])
        together = teacher.outputs(given, samples[batch]).projection
        for row, u in enumerate(batch):
            frames = (lengths[u] - 400) // 320 + 1
            torch.testing.assert_close(together[row, :frames], alone[u], rtol=1e-5, atol=1e-5)
            assert not together[row, frames:].any()


@pytest.mark.parametrize("name", [name for name in WITH if name.startswith(("hubert", "wav2vec2"))])
def test_a_student_that_adopts_a_teacher_projects_as_it_does(tmp_path, name):
    teacher, _ = make_teacher(tmp_path, name)
    shape = read_shape(tmp_path / "teacher", teacher.pinned.normalise)
    save_adopted(tmp_path / "init.safetensors", adopt(tmp_path / "teacher"), shape, teacher.pinned.digest)
    encoder = Encoder(shape)
    copy_adopted(encoder, [tmp_path / "init.safetensors"], True)
    (tmp_path / "student").mkdir()
    save_student(tmp_path / "student", encoder, {})
    student = load_student_upstream(tmp_path / "student")
    assert student.has_projection
    waves, samples = speech_like(9_999, 3_333)
    ours, theirs = student.outputs(waves, samples).projection, teacher.outputs(waves, samples).projection
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", sorted(SPECTRAL))
def test_a_model_without_one_refuses_it_and_says_what_to_take(world, name):
    teacher, _ = make_teacher(world.root / "spectral", name)
    assert teacher.outputs(*speech_like(9_999)).projection is None
    with pytest.raises(SettingsError, match="no projection before its positions; take layer 0, .*keep.layers"):
        run(world, teacher, ("projection", 1))


@pytest.mark.parametrize("codec", ["float32", "int8"])
def test_a_store_keeps_its_key_and_arrays_when_the_projection_joins_it(world, codec):
    model = model_of(world)
    before = run(world, model, "all", codec=codec)
    assert list(before["arrays"]) == [f"layer-0{n}" for n in range(4)]
    files = {p: p.stat().st_mtime_ns for p in open_receipt(before).directory.glob("layer-0*/c/**/0")}
    after = run(world, model, ("projection", 0, 1, 2, 3), codec=codec)
    assert after["key"] == before["key"]
    assert {name: array for name, array in after["arrays"].items() if name != "projection"} == before["arrays"]
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert run(world, model, "all", codec=codec) == before


def test_a_stored_projection_is_what_the_model_gives_for_the_utterance_alone(world):
    model = model_of(world)
    store = open_receipt(run(world, model, ("projection",)), verify=True)
    waves = open_receipt(world.root / "receipts/waves.json")
    for u in world.manifest:
        wave = torch.from_numpy(waves.read("wave", u.id).astype(np.float32) / 32_768)[None]
        alone = model.outputs(wave, torch.tensor([u.samples])).projection[0].numpy()
        np.testing.assert_allclose(store.read("projection", u.id), alone, rtol=0, atol=1e-5)


def test_the_projection_of_a_blend_is_the_mean_of_theirs(world):
    models = [model_of(world, name, seed) for seed, name in enumerate(("hubert", "wavlm"))]
    apart = [open_receipt(run(world, model, ("projection", 2))) for model in models]
    together = open_receipt(run(world, Blend(models), ("projection", 2)))
    for u, name in itertools.product(world.manifest, ("projection", "layer-02")):
        want = np.mean([store.read(name, u.id).astype(np.float64) for store in apart], axis=0)
        np.testing.assert_allclose(together.read(name, u.id), want, rtol=0, atol=1e-6)


def test_a_blend_with_a_model_that_has_none_has_none(world):
    class Layers:
        has_projection, num_layers, width = False, 4, 16

        def __init__(self, model):
            self.model = model

        def describe(self):
            return {"kind": "layers"}

        def layers(self, waves, samples):
            return self.model.layers(waves, samples)

        def outputs(self, waves, samples):
            return self.model.outputs(waves, samples)._replace(projection=None)

    model = model_of(world)
    for models in ([Layers(model), model], [model, Layers(model)]):
        blend = Blend(models)
        assert not blend.has_projection
        projection, layers = blend.outputs(*speech_like(9_999))
        assert projection is None
        for ours, theirs in zip(layers, model.layers(*speech_like(9_999)), strict=True):
            assert torch.equal(ours, theirs)


def test_the_projection_is_no_layer_to_compare(world):
    model = model_of(world)
    params = SimilarityParams(measure="cka", seconds=60, seed=0, memory_gb=1.0)
    found = similarity(open_receipt(run(world, model, ("projection", 1, 3))), params)
    assert found.layers == (1, 3)
    np.testing.assert_array_equal(found.matrix, similarity(open_receipt(run(world, model, (1, 3))), params).matrix)


def test_a_probe_weighs_hidden_states_alone(world, tmp_path):
    splits = itertools.cycle(("train", "train", "dev", "dev", "test", "test"))
    labelled = [
        replace(u, keyword="yn"[n % 2], split=split, tasks={"kws": split}, speaker=split)
        for n, (u, split) in enumerate(zip(world.manifest, splits, strict=False))
    ]
    write_manifest(tmp_path / "labelled.jsonl", Manifest(tuple(labelled)))
    params = PROBE.model_copy(update={"steps": 2, "validate_every": 1})
    (tmp_path / "probes.yaml").write_text(f"probes: {{kws: {params.model_dump_json()}}}")
    model = model_of(world)
    scores = []
    for layers in ((0, 1, 2, 3), ("projection", 0, 1, 2, 3)):
        write_json(tmp_path / "features.json", run(world, model, layers))
        probe(
            *("hubert", "kws", tmp_path / "features.json", tmp_path / "labelled.jsonl", tmp_path / "score.json"),
            params=tmp_path / "probes.yaml",
            device="cpu",
        )
        scores.append(read_json(tmp_path / "score.json"))
    assert scores[0] == scores[1]
    assert scores[1]["layers"] == [f"layer-0{n}" for n in range(4)]


def test_a_damaged_projection_is_found_dropped_and_made_again(world):
    model = model_of(world)
    receipt = run(world, model, ("projection", 1))
    directory = open_receipt(receipt).directory
    shard = next(directory.glob("projection/c/*/0"))
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    assert any("projection" in finding.place for finding in verify_store(directory, full=True).damage)
    repair_store(directory)
    assert not shard.exists()
    assert run(world, model, ("projection", 1)) == receipt
    assert not verify_store(directory, full=True).findings


def test_the_plan_counts_the_projection(world, capsys):
    model = model_of(world)
    params, keep = EXTRACT.model_copy(update={"codec": "float16"}), Keep(layers=("projection", 2), select="all")
    waves = open_receipt(world.root / "receipts/waves.json")
    cost = cost_of(model, world.manifest, waves, params, keep, "cpu", 2.0, seed=0)
    assert cost.chosen.arrays == ("projection", "layer-02")
    assert cost.chosen.bytes == run(world, model, keep.layers, codec="float16")["bytes"]
    settings = {"extract": params.model_dump(mode="json"), "keep": keep.model_dump(mode="json")}
    (world.root / "keep.yaml").write_text(yaml.safe_dump(settings))
    plan(
        *([world.root / "teachers/hubert"], world.root / "manifest.jsonl", world.root / "receipts/waves.json", "keep"),
        params=world.root / "keep.yaml",
        device="cpu",
        sample_sec=1.0,
        as_json=False,
    )
    assert [line.split()[:4] for line in capsys.readouterr().out.splitlines() if line.startswith("*")] == [
        ["*", "projection,", "2", "float16"]
    ]
