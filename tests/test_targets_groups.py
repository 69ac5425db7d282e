"""Groups of layers as targets (SKILL): which arrays they are made of, what is read, and when the targets change."""

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from cache.codecs import decode
from cache.errors import SettingsError, StoreError
from cache.publish import read_json, write_json
from cache.receipts import open_receipt
from pipeline.distill.ensemble import TargetMaker
from pipeline.layers.choose import choose_targets
from pipeline.layers.ensembles import head_groups
from pipeline.layers.groups import group_layers
from pipeline.layers.similarity import Similarity
from pipeline.layers.targets import (
    Adopted,
    Mean,
    Random,
    check_targets,
    open_init,
    open_targets,
    read_targets,
    target_layers,
    targets_json,
)
from stages.similarity import app as similarity_app
from stages.targets import app
from tests.distill_fixtures import EXTRACT, make_world, write_params
from tests.distill_fixtures import write_receipt as run_teacher
from tests.ensemble_fixtures import SAMPLE, parsed, several, single

RANDOM = Random(kind="random")
GROUPS = {"num_groups": 2, "linkage": "average", "contiguous": False, "leave_out": [0]}
NEAR = np.array([[1, 0.1, 0.1, 0.1], [0.1, 1, 0.2, 0.9], [0.1, 0.2, 1, 0.3], [0.1, 0.9, 0.3, 1]])  # 1 and 3 are alike
ALL = ("projection", 0, 1, 2, 3)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    world = make_world(tmp_path)
    run_teacher(world, "hubert", seed=0, layers=ALL)
    write_similarity(world)
    return world


def write_similarity(world, teacher="hubert", matrix=NEAR, **changes):
    """As `decant similarity` writes it, with a matrix of our own."""
    receipt = read_json(world.root / "receipts" / f"{teacher}.json")
    described = {"format": 1, "kind": "similarity", "teacher": teacher, "key": receipt["key"]}
    described["arrays"] = {name: array["digest"] for name, array in receipt["arrays"].items()}
    described |= {
        "settings": {"measure": "cka"},
        "frames": 100,
        "layers": [0, 1, 2, 3],
        "matrix": np.array(matrix).tolist(),
    }
    write_json(world.root / "similarity" / f"{teacher}.json", {**described, **changes})


def grouped(normalise=None, teacher="hubert", **changes):
    return {"kind": "groups", "teacher": teacher, "groups": {**GROUPS, **changes}, "normalise": normalise}


def choose(world, ensemble, similarity="similarity", init=RANDOM):
    where = None if similarity is None else world.root / similarity
    return choose_targets(parsed(ensemble), world.root / "receipts", init, world.root / "init", where)


def made(world, ensemble, utterances=(0, 7, 3)):
    """Targets of some utterances as training makes them, and the frames of each utterance."""
    targets = choose(world, ensemble)
    (store,) = open_targets(targets)
    rows, counts = store.read_batch(list(utterances), list(targets.stores[0].arrays))
    (frames,) = TargetMaker(parsed(ensemble), targets, [store], "cpu")([torch.from_numpy(rows)])
    return frames.numpy(), counts.tolist()


def layer_of(world, layer, utterance):
    store = open_receipt(world.root / "receipts/hubert.json")
    array = f"layer-{layer:02d}"
    return decode(store.read(array, utterance), store.spec(array).coding, store.tables(array)).astype(np.float64)


def test_a_group_is_made_of_its_layers_and_the_order_is_that_of_the_first(world):
    targets = choose(world, grouped())
    assert targets.stores[0].targets == (("layer-01", "layer-03"), ("layer-02",))
    assert list(targets.stores[0].arrays) == ["layer-01", "layer-03", "layer-02"]
    assert group_layers(Similarity((0, 1, 2, 3), NEAR, 1), "cka", parsed(grouped()).groups).groups == ((1, 3), (2,))
    assert target_layers(parsed(grouped()), targets) == [(1, 3), (2,)]
    ((heads, width, share),) = head_groups(parsed(grouped()), targets.widths)
    assert (heads, width, share) == (2, 16, 1.0)
    write_json(world.root / "targets.json", targets_json(targets))
    assert read_targets(world.root / "targets.json") == targets


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_the_target_of_a_group_is_the_mean_of_its_layers(world, codec):
    run_teacher(world, "hubert", seed=0, layers=ALL, params=EXTRACT.model_copy(update={"codec": codec}))
    write_similarity(world)
    frames, counts = made(world, grouped())
    assert frames.shape == (3, 2, max(counts), 16)
    for b, (u, count) in enumerate(zip((0, 7, 3), counts, strict=True)):
        mean = (layer_of(world, 1, u) + layer_of(world, 3, u)) / 2
        np.testing.assert_allclose(frames[b, 0, :count], mean, rtol=0, atol=1e-6)
        np.testing.assert_allclose(frames[b, 1, :count], layer_of(world, 2, u), rtol=0, atol=1e-6)


def test_a_mean_that_the_store_keeps_is_read_in_place_of_its_layers(world):
    apart, counts = made(world, grouped())
    params = EXTRACT.model_copy(update={"codec": "float32"})
    run_teacher(world, "hubert", seed=0, layers=(*ALL, (1, 3), (1, 2)), params=params)
    write_similarity(world)
    targets = choose(world, grouped())
    assert targets.stores[0].targets == (("mean-01-03",), ("layer-02",))
    assert target_layers(parsed(grouped()), targets) == [(1, 3), (2,)]
    together, _ = made(world, grouped())
    for b, count in enumerate(counts):
        np.testing.assert_allclose(together[b, :, :count], apart[b, :, :count], rtol=0, atol=5e-3)  # float16 before
    # without the layers it averages, too: the similarity was found when they were there
    run_teacher(world, "hubert", seed=0, layers=((1, 3), 2), params=params)
    assert choose(world, grouped()) == targets


@pytest.mark.parametrize("codec", ["float16", "int8"])
def test_a_normalised_group_has_mean_0_and_deviation_1_in_every_channel(world, codec):
    run_teacher(world, "hubert", seed=0, layers=ALL, params=EXTRACT.model_copy(update={"codec": codec}))
    write_similarity(world)
    ensemble = grouped(normalise={**SAMPLE, "seconds": 1e6})
    frames, counts = made(world, ensemble, range(len(world.manifest)))
    group = np.concatenate([frames[b, 0, :count] for b, count in enumerate(counts)]).astype(np.float64)
    np.testing.assert_allclose(group.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(group.std(0), 1, atol=1e-5)
    assert choose(world, ensemble).stores[0].statistics.mean.shape == (2, 16)


def test_the_projection_and_means_are_targets_of_chosen_layers(world):
    run_teacher(world, "hubert", seed=0, layers=(*ALL, (1, 2)))
    ensemble = single(layers=("projection", 3, [2, 1]))
    targets = choose(world, ensemble, similarity=None)
    assert targets.stores[0].targets == (("projection",), ("layer-03",), ("mean-01-02",))
    assert target_layers(parsed(ensemble), targets) == [("projection",), (3,), (1, 2)]
    with pytest.raises(
        SettingsError, match=r"asks for layer \[1, 3\] of hubert, .* layers projection, 0, 1, 2, 3, \[1, 2\];"
    ):
        choose(world, single(layers=([1, 3],)))


def test_layers_of_several_teachers_are_listed_head_by_head_or_position_by_position(world):
    run_teacher(world, "wavlm", seed=9, layers=ALL)
    heads = several("heads", ("hubert", (3, 1), 1.0), ("wavlm", ("projection", 2, 1), 3.0))
    assert target_layers(parsed(heads), choose(world, heads)) == [(3,), (1,), ("projection",), (2,), (1,)]
    for kind in ("average", "concat"):
        alike = several(kind, ("hubert", (3, 1), 1.0), ("wavlm", (3, 1), 1.0))
        assert target_layers(parsed(alike), choose(world, alike)) == [(3,), (1,)]
        other = several(kind, ("hubert", (3, 1), 1.0), ("wavlm", (3, 2), 1.0))
        assert target_layers(parsed(other), choose(world, other)) == [(3,), (1, 2)]
        mixed = several(kind, ("hubert", (3, 1), 1.0), ("wavlm", (1, "projection"), 1.0))
        assert target_layers(parsed(mixed), choose(world, mixed)) == [(1, 3), ("projection", 1)]


def stage(world, *more):
    options = {"receipts": "receipts", "init": "init", "out": "targets.json", "params": "params.yaml"}
    arguments = ["distil", *(text for key, path in options.items() for text in (f"--{key}", str(world.root / path)))]
    return CliRunner().invoke(app, [*arguments, *more], catch_exceptions=False)


def test_the_stage_takes_what_decant_similarity_wrote_and_changes_only_with_the_groups(world):
    params = world.root / "params.yaml"
    write_params(world, ensemble=grouped(), init={"kind": "random"})
    settings = yaml.safe_load(params.read_text())
    similarity = {"measure": "cosine", "seconds": 60, "seed": 0, "memory_gb": 1.0}
    params.write_text(yaml.safe_dump({**settings, "similarity": similarity}))
    where = {name: str(world.root / f"similarity/hubert.{name}") for name in ("json", "png")}
    receipt = str(world.root / "receipts/hubert.json")
    done = CliRunner().invoke(
        similarity_app,
        ["hubert", "--receipt", receipt, "--out", where["json"], "--picture", where["png"], "--params", str(params)],
        catch_exceptions=False,
    )
    assert done.exit_code == 0
    found = read_json(world.root / "similarity/hubert.json")
    assert found["layers"] == [0, 1, 2, 3]  # without the projection
    folder = ("--similarity", str(world.root / "similarity"))
    assert "of hubert: 2 heads 16 wide" in stage(world, *folder).output
    before = (world.root / "targets.json").read_bytes()
    matrix = Similarity((0, 1, 2, 3), np.array(found["matrix"]), 1)
    groups = group_layers(matrix, "cosine", parsed(grouped()).groups).groups
    assert target_layers(parsed(grouped()), read_targets(world.root / "targets.json")) == list(groups)
    # other numbers, the same groups; another teacher; one more layer kept
    write_json(world.root / "similarity/hubert.json", {**found, "matrix": np.sqrt(np.array(found["matrix"])).tolist()})
    run_teacher(world, "wavlm", seed=9)
    run_teacher(world, "hubert", seed=0, layers=(*ALL, (0, 1, 2, 3)))
    stage(world, *folder)
    assert (world.root / "targets.json").read_bytes() == before
    write_similarity(world, matrix=np.array([[1, 0, 0, 0], [0, 1, 0.9, 0], [0, 0.9, 1, 0], [0, 0, 0, 1]]))
    stage(world, *folder)
    one = target_layers(parsed(grouped()), read_targets(world.root / "targets.json"))
    write_similarity(world)
    stage(world, *folder)
    other = target_layers(parsed(grouped()), read_targets(world.root / "targets.json"))
    assert (one, other) == ([(1, 2), (3,)], [(1, 3), (2,)])


def test_what_groups_cannot_be_made_of_is_refused_with_the_way_out(world):
    with pytest.raises(SettingsError, match="pass --similarity reports/similarity, where `decant similarity hubert`"):
        choose(world, grouped(), similarity=None)
    with pytest.raises(SettingsError, match="num_groups is 4 and there are 3 layers to group"):
        choose(world, grouped(num_groups=4))
    run_teacher(world, "wavlm", seed=9, layers=ALL)
    with pytest.raises(
        SettingsError, match="layers of 'wavlm' but .* has similarities of hubert; .*`decant similarity wavlm`"
    ):
        choose(world, grouped(teacher="wavlm"))
    run_teacher(world, "hubert", seed=0, layers=(0, 2, 3))
    with pytest.raises(
        SettingsError, match=r"layers \[1, 3\], and its store has layers 0, 2, 3; add 1 to .*\(leave_out\)"
    ):
        choose(world, grouped())
    run_teacher(world, "hubert", seed=5, layers=ALL)
    with pytest.raises(
        StoreError, match="another store than the receipt of hubert names; run `decant similarity hubert`"
    ):
        choose(world, grouped())
    write_similarity(world, settings={})
    with pytest.raises(StoreError, match=r"hubert.json is damaged \('measure'\); run `decant similarity hubert` again"):
        choose(world, grouped())
    write_similarity(world, format=2)
    with pytest.raises(StoreError, match="similarity format 2, not similarity 1"):
        choose(world, grouped())


def test_targets_of_other_groups_are_refused(world):
    three = choose(world, grouped(num_groups=3))
    for asked, chosen in (
        (grouped(), three),
        (grouped(normalise=SAMPLE), choose(world, grouped())),
        (single(layers=(1, 2, 3)), choose(world, grouped())),
    ):
        with pytest.raises(StoreError, match="another ensemble than .*; run `decant targets` again"):
            check_targets(parsed(asked), chosen)
    check_targets(parsed(grouped(num_groups=3)), three)


def test_several_starts_are_listed_by_their_digests_in_order(world):
    run_teacher(world, "wavlm", seed=9)
    mean = Mean(kind="mean", teachers=("wavlm", "hubert"), final_norm=False)
    targets = choose(world, single(), init=mean)
    files = [world.root / "init" / f"{name}.safetensors" for name in mean.teachers]
    assert open_init(targets, mean, world.root / "init") == files
    assert targets_json(targets)["init"] == list(targets.init)
    assert len(set(targets.init)) == 2
    alone = Adopted(kind="adopted", teacher="wavlm", final_norm=True)
    assert choose(world, single(), init=alone).init == targets.init[:1]
    with pytest.raises(
        StoreError, match="chosen with 2 files of weights and init asks for 1; run `decant targets` again"
    ):
        open_init(targets, alone, world.root / "init")
    with pytest.raises(
        SettingsError, match="init.teachers is 'nobody' but .*init has weights of hubert, wavlm; choose one"
    ):
        choose(world, single(), init=Mean(kind="mean", teachers=("hubert", "nobody"), final_norm=False))
    for teachers in (("hubert",), ("hubert", "hubert")):
        with pytest.raises(ValueError, match="has no mean: name two teachers or more"):
            Mean(kind="mean", teachers=teachers, final_norm=False)
