"""The recipes: every setting of each is one that a stage takes, DVC makes stages of it, sizes are the published ones."""

import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.distill.predictor import LayerToLayer, make_predictor
from pipeline.distill.settings import StudentParams, phases_of
from pipeline.layers.ensembles import Groups, SingleTeacher, head_groups, members
from pipeline.student.size import full_parameters

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
FULL = [ROOT / "recipes" / f"librispeech{hours}.yaml" for hours in (100, 960)]
WIDTH = 768  # of every teacher in the full-size recipes

PUBLISHED = {  # parameters without heads (DeepVersusWide, ARMHuBERT: their tables and code, docs/methods/)
    "distilhubert": 23_491_200,
    "wide-shallow": 30_579_072,
    "thin-deep": 26_871_936,
    "armhubert-s": 18_403_120,
    "ekd-heads": 23_491_200,
    "ekd-average": 23_491_200,
    "ekd-concat": 23_491_200,
    "dphubert": 94_370_944,  # before pruning
    "random": 23_491_200,
}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def students(path: Path) -> dict[str, StudentParams]:
    return {name: StudentParams.model_validate(of) for name, of in read(path)["students"].items()}


def layers_of(student: StudentParams) -> list[tuple[Any, ...]]:
    """Of each target, the teacher's layers; groups are only known once a teacher is there, so some are made up."""
    if isinstance(student.ensemble, Groups):
        return [(layer,) for layer in range(1, student.ensemble.groups.num_groups + 1)]
    each = [member.layers for member in members(student.ensemble)]
    return [(layer,) for layers in each for layer in layers]


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_the_full_size_shapes_have_the_published_numbers_of_parameters(path):
    sizes = {name: full_parameters(student.shape) for name, student in students(path).items()}
    assert {name: sizes[name] for name in PUBLISHED} == PUBLISHED


@pytest.mark.parametrize("path", [ROOT / "params.yaml", *RECIPES], ids=lambda path: path.stem)
def test_every_student_finds_its_teachers_its_layers_and_its_predictions(path):
    """What a training would refuse only after hours of extraction."""
    import torch

    kept = {name: teacher["keep"]["layers"] for name, teacher in read(path)["teachers"].items()}
    for name, student in students(path).items():
        for member in members(student.ensemble):
            assert member.teacher in kept, name
            there = kept[member.teacher]
            assert there == "all" or set(member.layers) <= {tuple(k) if isinstance(k, list) else k for k in there}, name
        starts = getattr(student.init, "teacher", None)
        assert starts is None or starts in kept, name
        groups = head_groups(student.ensemble, [student.shape.width] * len(members(student.ensemble)))
        targets = layers_of(student)
        predictor = make_predictor(student.predict, student.shape, groups, targets, torch.Generator())
        if isinstance(student.predict, LayerToLayer):
            assert len(predictor.chosen) == len(targets), name
        weights = student.train.target_weights
        assert weights is None or len(weights) == sum(group.heads for group in groups), name


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_the_heads_have_the_published_numbers_of_parameters(path):
    import torch

    counted = {}
    for name, student in students(path).items():
        groups = head_groups(student.ensemble, [WIDTH] * len(members(student.ensemble)))
        made = make_predictor(student.predict, student.shape, groups, layers_of(student), torch.Generator())
        counted[name] = sum(parameter.numel() for parameter in made.parameters())
    assert counted["distilhubert"] == 3_543_552  # three heads, by hand: 768 * 2304 + 2304 + 3 * (768 * 768 + 768)
    assert counted["ekd-heads"] == 3 * 3_543_552
    assert 18_403_120 + counted["armhubert-s"] == 22_393_648  # what ARMHuBERT publishes counts its linears
    assert counted["dphubert"] == 2 * (768 * 768 + 768)


@pytest.mark.parametrize("path", FULL, ids=lambda path: path.stem)
def test_pruned_students_have_the_schedule_of_dphubert(path):
    pruned = {name: student for name, student in students(path).items() if student.prune is not None}
    assert set(pruned) == {"dphubert", "dpwavlm", "skill"}
    for name, student in pruned.items():
        prune, final = phases_of(student)
        assert (prune.steps, prune.learning_rate, round(prune.warmup * prune.steps)) == (50_000, 2e-4, 15_000), name
        assert (final.steps, final.learning_rate, round(final.warmup * final.steps)) == (25_000, 1e-4, 5_000), name
        assert (student.prune.sparsity, student.prune.rounding) == (0.75, "each"), name


def test_the_embedded_default_has_a_student_of_every_method():
    of = students(ROOT / "params.yaml")
    kinds = {name: student.ensemble.kind for name, student in of.items()}
    assert kinds == {
        "distil": "single",
        "ekd-heads": "heads",
        "ekd-average": "average",
        "ekd-concat": "concat",
        "skill": "groups",
        "dp": "single",
        "random": "single",
    }
    assert isinstance(of["dp"].ensemble, SingleTeacher)
    assert "projection" in of["dp"].ensemble.layers
    assert {name for name, student in of.items() if student.prune} == {"skill", "dp"}
    assert [name for name, student in of.items() if student.train.steps == 0] == ["random"]


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def overrides(page: Path) -> list[list[str]]:
    """What every `dvc exp run` of a page sets; sweeps of --queue apart, whose values are lists of values."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for line in re.findall(r"^dvc exp run .*$", text, re.M)]
    return [[b for a, b in pairwise(words) if a == "-S"] for words in lines if "--queue" not in words]


def test_every_ablation_that_a_page_names_is_one_that_the_stages_take(tmp_path):
    """DVC's own merge, so what it refuses (a key of another kind) is refused here."""
    hydra = pytest.importorskip("dvc.utils.hydra", reason="dvc is an optional part: pip install 'decant[dvc]'")
    named = [(page, line) for page in PAGES for line in overrides(page)]
    assert len(named) >= 10
    before = students(ROOT / "params.yaml")
    for page, line in named:
        shutil.copy(ROOT / "params.yaml", tmp_path / "params.yaml")
        hydra.apply_overrides(tmp_path / "params.yaml", line)
        changed = students(tmp_path / "params.yaml")
        assert changed.keys() == before.keys(), (page.name, line)
        assert changed != before, f"{page.name}: {line} changes nothing"


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("path", [ROOT / "params.yaml", *RECIPES], ids=lambda path: path.stem)
def test_dvc_makes_a_stage_of_every_student(path, tmp_path):
    pytest.importorskip("dvc", reason="dvc is an optional part: pip install 'decant[dvc]'")
    for name in ("dvc.yaml", ".dvcignore", ".dvc/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copy(path, tmp_path / "params.yaml")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    listed = subprocess.run(
        [sys.executable, "-m", "dvc", "stage", "list", "--name-only"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert listed.returncode == 0, listed.stderr
    stages, params = set(listed.stdout.split()), read(path)
    assert {f"distill@{name}" for name in params["students"]} <= stages
    assert {f"probe@{m}-{t}" for m in params["models"] for t in params["probes"]} <= stages
    assert {f"teacher@{name}" for name in params["teachers"]} <= stages
