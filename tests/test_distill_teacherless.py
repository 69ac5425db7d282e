"""No teacher is needed to train a student, whatever the method: from the stores alone it comes out the same."""

import subprocess
import sys

import pytest

from cache.publish import read_json, write_json
from cache.receipts import open_receipt
from pipeline.distill.settings import StudentParams
from pipeline.distill.train import distil
from pipeline.layers.choose import choose_targets
from pipeline.layers.targets import open_init, targets_json
from stages._params import read_params
from tests.distill_fixtures import without_teachers
from tests.methods_fixtures import METHODS, make_methods

SHORT = {"steps": 4, "validate_every": 4, "log_every": 2, "checkpoint_every": 10}
ALL = """
import sys
from stages.__main__ import main
sys.argv, methods = sys.argv[:1], sys.argv[1:]
try:
    import transformers
except ImportError as error:
    print(error)
for method in methods:
    where = ["--targets", f"targets/{method}.json", "--manifest", "manifest.jsonl", "--waves", "receipts/waves.json"]
    sys.argv[1:] = ["distill", method, *where, "--init", "init", "--out", f"models/{method}", "--device", "cpu"]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (method, end.code)
loaded = {name for name in sys.modules if name.startswith(("transformers", "pipeline.teachers", "pipeline.extraction"))}
print("loaded", sorted(loaded - {"pipeline.extraction", "pipeline.extraction.settings"}))
"""
"""`decant distill` of one method after another, as one process: torch is imported once."""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A world where every student was trained beside its teachers, into beside/, and which then lost them."""
    root = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECANT_STORE", str(root / "store"))
        world = make_methods(root, **SHORT)
        waves = open_receipt(root / "receipts/waves.json")
        for method in METHODS:
            params = read_params(f"students.{method}", StudentParams, root / "params.yaml")
            targets = choose_targets(
                params.ensemble, root / "receipts", params.init, root / "init", root / "similarity"
            )
            write_json(root / "targets" / f"{method}.json", targets_json(targets))
            init = open_init(targets, params.init, root / "init")
            nothing = [lambda *_, **__: None] * 2
            distil(params, targets, world.manifest, waves, init, root / "beside" / method, "cpu", *nothing)
        environment = without_teachers(world)
        command = [sys.executable, "-c", ALL, *METHODS]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        yield world, done


def test_all_run_where_transformers_cannot_be_imported_and_ask_for_nothing_of_the_teachers(world):
    world, done = world
    assert done.returncode == 0, done.stderr
    assert not (world.root / "teachers").exists()
    assert "transformers is not installed here" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[-1] == "loaded []"
    assert sorted(p.name for p in (world.root / "models").iterdir()) == sorted(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_student_is_the_one_that_was_trained_beside_its_teachers(world, method):
    world, _ = world
    beside, alone = world.root / "beside" / method, world.root / "models" / method
    files = sorted(p.name for p in beside.iterdir())
    assert {"curves.csv", "heads.safetensors", "metrics.json", "shape.json", "weights.safetensors"} <= set(files)
    for name in files:
        assert (alone / name).read_bytes() == (beside / name).read_bytes(), name
    settings = read_json(alone / "shape.json")["settings"]
    assert settings["ensemble"]["kind"] == METHODS[method]["ensemble"]["kind"]
