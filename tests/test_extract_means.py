"""What can be kept in place of layers: means of layers, and means over models."""

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from cache.errors import SettingsError
from cache.names import array_name, keeps_layers, layers_of
from cache.publish import read_json
from cache.receipts import open_receipt
from pipeline.blend import Blend
from pipeline.distill.settings import StudentParams
from pipeline.distill.train import distil
from pipeline.extract import extract
from pipeline.extraction.settings import Keep
from pipeline.layers.choose import choose_targets
from pipeline.layers.ensembles import SingleTeacher
from pipeline.layers.targets import Random, open_targets
from pipeline.logmel import LogMel, LogMelParams
from pipeline.models import open_models
from pipeline.student.upstream import load_student_upstream
from stages._models import model_paths
from stages._params import read_params
from stages.extract import app
from tests.distill_fixtures import EXTRACT, make_world, write_params, write_receipt


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    return make_world(tmp_path)


def run(world, model, layers, **changes):
    keep = Keep(layers=layers, select="all")
    waves = open_receipt(world.root / "receipts/waves.json")
    params = EXTRACT.model_copy(update={"codec": "float32", **changes})
    return extract(model, world.manifest, waves, params, keep, "cpu", lambda *_, **__: None)


def models(world, *names):
    for seed, name in enumerate(names):
        write_receipt(world, name, seed)
    return [load_student_upstream(world.root / "teachers" / name) for name in names]


def test_a_name_says_which_layers_an_array_keeps():
    assert [array_name(3), array_name((12, 4, 5))] == ["layer-03", "mean-04-05-12"]
    assert [layers_of("layer-03"), layers_of("mean-04-05-12")] == [(3,), (4, 5, 12)]
    names = ["layer-3", "layer-03", "layer-03.mean", "mean-04", "mean-04-05", "mean-04-", "wave"]
    assert [name for name in names if keeps_layers(name)] == ["layer-03", "mean-04-05"]


def test_a_stored_mean_of_layers_is_the_mean_of_the_stored_layers(world):
    (model,) = models(world, "hubert")
    receipt = run(world, model, (1, [2, 0], (1, 2, 3), 2, 0, 3))
    assert sorted(receipt["arrays"]) == ["layer-00", "layer-01", "layer-02", "layer-03", "mean-00-02", "mean-01-02-03"]
    assert receipt["arrays"]["mean-01-02-03"]["mean_of_layers"] == [1, 2, 3]
    assert "mean_of_layers" not in receipt["arrays"]["layer-01"]
    store = open_receipt(receipt, verify=True)
    for u in world.manifest:
        for name in ("mean-00-02", "mean-01-02-03"):
            apart = np.mean([store.read(array_name(i), u.id).astype(np.float64) for i in layers_of(name)], axis=0)
            np.testing.assert_allclose(store.read(name, u.id), apart, rtol=0, atol=1e-6)


def test_a_mean_alone_needs_none_of_the_layers_it_averages(world):
    (model,) = models(world, "hubert")
    receipt = run(world, model, ((1, 3),), codec="int8")
    assert list(receipt["arrays"]) == ["mean-01-03"]
    assert sorted(p.name for p in open_receipt(receipt).directory.glob("layer-*")) == []
    assert receipt["bytes"] < run(world, model, (1, 3), codec="int8")["bytes"]


@pytest.mark.parametrize("layers", [[[1]], [[1, 1]], [[]], ["early"]])
def test_a_mean_of_one_layer_is_no_mean(layers):
    with pytest.raises(ValidationError):
        Keep(layers=layers, select="all")


def test_a_mean_with_a_layer_the_model_lacks_is_refused(world):
    with pytest.raises(SettingsError, match=r"layer 9 is not one of the model's layers 0 to 3"):
        run(world, *models(world, "hubert"), ((1, 9),))


def test_the_mean_over_models_is_the_mean_of_their_stores(world):
    one, other, third = models(world, "hubert", "wavlm", "robust")
    apart = [open_receipt(run(world, model, (1, 3))) for model in (one, other, third)]
    receipt = run(world, Blend([one, other, third]), (1, 3))
    together = open_receipt(receipt)
    for u in world.manifest:
        for name in ("layer-01", "layer-03"):
            want = np.mean([store.read(name, u.id).astype(np.float64) for store in apart], axis=0)
            np.testing.assert_allclose(together.read(name, u.id), want, rtol=0, atol=1e-6)
    said = receipt["fingerprint"]["model"]
    assert (said["kind"], len(said["of"])) == ("mean", 3)
    assert said["num_params"] == sum(model.describe().get("num_params", 0) for model in (one, other, third))
    assert run(world, Blend([third, one, other]), (1, 3)) == receipt  # the order of the models is none of the store's


def test_models_of_other_shapes_have_no_mean(world):
    (model,) = models(world, "hubert")
    other = LogMel(LogMelParams(model="log-mel", num_mels=40, floor=1e-6))
    with pytest.raises(SettingsError, match="4 layers of width 16, 1 layers of width 40: there is no mean of them"):
        Blend([model, other])
    with pytest.raises(SettingsError, match="two models or more"):
        Blend([model])


def test_a_student_learns_from_a_mean_of_layers_over_two_teachers(world):
    """EKD's layerwise average of SKILL's group means: one array, no teacher's own layer on the disk."""
    models(world, "hubert", "wavlm")
    (world.root / "keep.yaml").write_text(
        yaml.safe_dump(
            {
                "extract": EXTRACT.model_dump(),
                "keep": {"layers": [[1, 2], 3], "select": "all"},
                "means": {"ekd": {"teachers": ["hubert", "wavlm"]}},
            }
        )
    )
    done = CliRunner().invoke(
        app,
        [
            *("both", "--keep", "keep", "--params", str(world.root / "keep.yaml"), "--device", "cpu"),
            *("--model", str(world.root / "teachers/hubert"), "--model", str(world.root / "teachers/wavlm")),
            *("--manifest", str(world.root / "manifest.jsonl"), "--waves", str(world.root / "receipts/waves.json")),
            *("--out", str(world.root / "receipts/both.json")),
        ],
        catch_exceptions=False,
    )
    assert "2 arrays x" in done.output
    named = read_json(world.root / "receipts/both.json")
    paths = model_paths([world.root / "teachers"], "means.ekd.teachers", world.root / "keep.yaml")
    assert paths == [world.root / "teachers" / name for name in ("hubert", "wavlm")]
    assert open_models(paths, "cpu").describe() == named["fingerprint"]["model"]
    ensemble = SingleTeacher(kind="single", teacher="both", layers=((2, 1), 3), normalise=None)
    targets = choose_targets(ensemble, world.root / "receipts", Random(kind="random"), world.root / "init")
    assert list(targets.stores[0].arrays) == ["mean-01-02", "layer-03"]
    assert open_targets(targets)[0].key == read_json(world.root / "receipts/both.json")["key"]
    of_both = ensemble.model_dump(mode="json")
    write_params(world, ensemble=of_both, train={"steps": 2, "validate_every": 2}, init={"kind": "random"})
    settings = read_params("students.distil", StudentParams, world.root / "params.yaml")
    waves = open_receipt(world.root / "receipts/waves.json")
    torch.manual_seed(0)
    metrics = distil(
        settings, targets, world.manifest, waves, [], world.root / "m", "cpu", lambda *_, **__: None, lambda _: None
    )
    assert metrics["steps"] == 2
    assert metrics["dev"]["l1"] > 0
    with pytest.raises(SettingsError, match=r"asks for layer \[1, 3\] of both, whose store has layers 3, \[1, 2\]"):
        choose_targets(
            SingleTeacher(kind="single", teacher="both", layers=((1, 3),), normalise=None),
            world.root / "receipts",
            Random(kind="random"),
            world.root / "init",
        )
