import pytest
import yaml
from typer.testing import CliRunner

from cache.errors import SettingsError, StoreError
from cache.publish import read_json, write_json
from pipeline.layers.choose import choose_targets
from pipeline.layers.ensembles import SingleTeacher
from pipeline.layers.targets import Adopted, Random, open_init, open_targets, read_targets, targets_json
from stages.targets import app
from tests.distill_fixtures import make_world, write_receipt

HUBERT = Adopted(kind="adopted", teacher="hubert", final_norm=False)


@pytest.fixture
def world(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    return make_world(tmp_path)


def choose(world, teacher="hubert", layers=(3, 1)):
    ensemble = SingleTeacher(kind="single", teacher=teacher, layers=layers, normalise=None)
    return choose_targets(ensemble, world.root / "receipts", HUBERT, world.root / "init")


def run_stage(world):
    options = [
        "--receipts",
        world.root / "receipts",
        "--init",
        world.root / "init",
        "--out",
        world.root / "targets.json",
        "--params",
        world.root / "params.yaml",
    ]
    result = CliRunner().invoke(app, ["distil", *map(str, options)], catch_exceptions=False)
    assert result.exit_code == 0
    return (world.root / "targets.json").read_bytes()


def test_targets_keep_the_order_of_the_heads_and_open_the_store(world):
    targets = choose(world)
    assert list(targets.stores[0].arrays) == ["layer-03", "layer-01"]
    write_json(world.root / "targets.json", targets_json(targets))
    again = read_targets(world.root / "targets.json")
    assert again == targets
    assert list(again.stores[0].arrays) == ["layer-03", "layer-01"]
    (store,) = open_targets(again)
    assert store.read("layer-03", "utt-00").shape == (world.manifest[0].num_frames, targets.stores[0].width)


def test_another_teacher_or_another_layer_leaves_the_bytes_as_they_are(world):
    before = run_stage(world)
    write_receipt(world, "wavlm", seed=9)
    assert run_stage(world) == before
    write_receipt(world, "hubert", seed=0, layers=(0, 1, 2, 3))  # one more layer is kept
    assert "layer-02" in read_json(world.root / "receipts/hubert.json")["arrays"]
    assert run_stage(world) == before
    params = yaml.safe_load((world.root / "params.yaml").read_text())
    params["students"]["distil"]["train"]["steps"] = 99
    (world.root / "params.yaml").write_text(yaml.safe_dump(params))
    assert run_stage(world) == before
    write_receipt(world, "hubert", seed=1)  # another revision of the teacher in use
    assert run_stage(world) != before


def test_an_unknown_teacher_is_answered_with_those_there_are(world):
    with pytest.raises(SettingsError, match="'hubbert' but .* has receipts of hubert;"):
        choose(world, teacher="hubbert")


def test_a_layer_that_was_not_kept_is_answered_with_those_that_were(world):
    with pytest.raises(SettingsError, match="layer 2 of hubert, whose store has layers 0, 1, 3"):
        choose(world, layers=(1, 2))
    with pytest.raises(SettingsError, match="names a layer twice"):
        choose(world, layers=(1, 1))


def test_a_store_that_is_not_what_was_meant_is_refused(world):
    targets = choose(world)
    shard = next((world.root / "store/features" / targets.stores[0].key / "layer-03").rglob("c/*/0"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(StoreError, match="committed with"):
        open_targets(targets)
    write_json(world.root / "targets.json", {**targets_json(targets), "format": 2})
    with pytest.raises(StoreError, match="format 2, not targets format 3; run `decant targets` again"):
        read_targets(world.root / "targets.json")


def test_the_start_is_the_file_that_was_chosen_or_it_is_refused(world):
    targets = choose(world)
    assert open_init(targets, HUBERT, world.root / "init") == [world.root / "init" / "hubert.safetensors"]
    with pytest.raises(StoreError, match="chosen with 1 files of weights and init asks for 0"):
        open_init(targets, Random(kind="random"), world.root / "init")
    write_receipt(world, "hubert", seed=5)
    with pytest.raises(
        StoreError, match="is not the file that the targets were chosen with; run `decant targets` again"
    ):
        open_init(targets, HUBERT, world.root / "init")
    with pytest.raises(SettingsError, match=r"init.teacher is 'nobody' but .*init has weights of hubert; choose one"):
        open_init(targets, Adopted(kind="adopted", teacher="nobody", final_norm=False), world.root / "init")


def test_a_student_drawn_at_random_does_not_depend_on_the_weights_of_a_teacher(world):
    ensemble = SingleTeacher(kind="single", teacher="hubert", layers=(1,), normalise=None)
    assert choose_targets(ensemble, world.root / "receipts", Random(kind="random"), world.root / "gone").init == ()
