"""How students were trained and what teachers' layers have in common, over a small made-up run."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cache.errors import StoreError
from cache.publish import write_json
from pipeline.report import figures, page, training, wording
from pipeline.report.gather import gather
from pipeline.report.run import Run
from tests.report_fixtures import write_run


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run(paths) -> Run:
    return gather(**paths)


@pytest.fixture
def own(paths, tmp_path) -> dict[str, Path]:
    """A copy that a test may break."""
    home = paths["models"].parent
    shutil.copytree(home, tmp_path / "run")
    return {name: tmp_path / "run" / path.relative_to(home) for name, path in paths.items()}


def with_similarity(own, key="0", teacher="hubert") -> dict[str, Path]:
    """The same run, whose teacher's layers were compared."""
    matrix = [[1.0, 0.9, 0.2], [0.9, 1.0, 0.3], [0.2, 0.3, 1.0]]
    described = {
        "teacher": teacher,
        "settings": {"measure": "cka"},
        "frames": 500,
        "layers": [0, 2, 5],
        "matrix": matrix,
    }
    folder = own["probes"].parent / "similarity"
    real = json.loads((own["receipts"] / "hubert.json").read_text())["key"]
    write_json(folder / "hubert.json", {"kind": "similarity", "key": real if key == "0" else key, **described})
    return {**own, "similarity": folder}


def test_compared_layers_are_drawn_and_a_page_without_has_no_such_section(run, own):
    shown = page.html(gather(**with_similarity(own)))
    assert "Layers of the teachers" in shown
    assert 'aria-label="Layers of hubert"' in shown
    assert "<image" not in shown
    assert "Layers of the teachers" not in page.html(run)


def test_layers_of_another_store_are_refused(own):
    with pytest.raises(StoreError, match=r"hubert.json compares layers of the store other, which no receipt of hubert"):
        gather(**with_similarity(own, key="other"))


SHAPE = {
    "conv_channels": [8] * 7,
    "conv_spans": None,
    "conv_bias": False,
    "front_norm": "group",
    "feature_norm": True,
    "feature_norm_width": None,
    "feature_scale": False,
    "projection": True,
    "normalise": False,
    "width": 16,
    "heads": [2, 2],
    "head_width": 8,
    "ffn": [32, 32],
    "position_bias": None,
    "kept_heads": None,
    "shares_attention": None,
    "position_kernel": 4,
    "position_groups": 2,
    "pre_norm": False,
    "dropout": {"features": 0.0, "hidden": 0.0, "attention": 0.0, "activation": 0.0},
}
# seven convolutions of 8 channels, a group norm, a norm and a projection to 16; positions; norms; two blocks of attention
# and 32 units each
UNPRUNED = (
    (80 + 4 * 8 * 8 * 3 + 2 * 8 * 8 * 2 + 16 + 16 + 9 * 16)
    + (4 * 16 * 8 + 4 + 16)
    + 2 * 16
    + 2 * (4 * 16 + 4 * (16 * 16 + 16) + 2 * 16 * 32 + 32 + 16)
)


def pruned(own, name="small") -> dict[str, Path]:
    """The same run, in which one student was pruned to 40 % after 800 of its 1 200 steps, and every target was validated."""
    folder = own["models"] / name
    facts = json.loads((folder / "shape.json").read_text())
    ensemble = {"kind": "groups", "teacher": "hubert"}
    facts["settings"] |= {"prune": {"sparsity": 0.6}, "shape": SHAPE, "ensemble": ensemble}
    facts["settings"]["train"]["steps"] = 800
    write_json(folder / "shape.json", facts)
    parameters = {"student": round(0.4 * UNPRUNED), "heads": 2048}
    dev = {"l1": 0.2, "cosine": -0.9, "total": -0.7}
    write_json(folder / "metrics.json", {"steps": 1200, "dev": dev, "parameters": parameters, "epochs": 1})
    targets = ["hubert.projection", "hubert.layer-01+layer-02+layer-03", "hubert.layer-10"]
    head = ["step", "rate", "l1", "cosine", "total", "sparsity", "grad_norm", "dev_l1", "dev_cosine", "dev_total"]
    lines = [",".join([*head, *(f"dev_{target}" for target in targets)])]
    for step in range(100, 1201, 100):
        sparsity = f"{min(0.6, step / 1000):.3f}" if step <= 800 else ""
        total = f"{-0.6 - step / 12000:.3f}"
        lines.append(f"{step},0.001,0.2,-0.9,{total},{sparsity},1.0,0.2,-0.9,{total},-0.9,{-step / 2000},-0.5")
    (folder / "curves.csv").write_text("\n".join(lines) + "\n")
    return own


def test_a_pruned_student_shows_its_phases_and_its_size_before_and_after(own):
    run = gather(**pruned(own))
    small = next(student for student in run.students if student.name == "small")
    assert (small.unpruned, small.pruned_at) == (UNPRUNED, 800)
    assert [point.sparsity for point in small.curve][6:9] == [0.6, 0.6, None]
    row = next(line for line in training.losses(run).split("<tr>") if ">small<" in line)
    sizes = f"{wording.params(UNPRUNED)} → {wording.params(round(0.4 * UNPRUNED))}"
    assert f">{sizes}<" in row
    assert ">800 + 400<" in row
    assert ">hubert (groups)<" in row
    assert "60.0 % pruned" in figures.svg(figures.curves(run.students), "curves", "")
    assert "Dashes: where a student was pruned" in page.html(run)


def test_the_size_before_pruning_is_that_of_the_encoder():
    from pipeline.student.encoder import Encoder, count_parameters
    from pipeline.student.shape import EncoderShape

    assert count_parameters(Encoder(EncoderShape.model_validate(SHAPE))) == UNPRUNED


def test_a_pruned_student_without_a_shape_is_refused(own):
    folder = pruned(own)["models"] / "small"
    facts = json.loads((folder / "shape.json").read_text())
    facts["settings"]["shape"]["width"] = "wide"
    write_json(folder / "shape.json", facts)
    with pytest.raises(StoreError, match=r"shape.json: settings.shape is no shape .* run `decant distill small` again"):
        gather(**own)


def test_losses_of_single_targets_are_told_by_teacher_and_layer(run, own):
    table = training.target_losses(gather(**pruned(own)))
    assert re.findall(r'<th class="num">([^<]+)</th>', table) == ["projection", "1–3", "10"]
    assert re.findall(r'<td class="num">([^<]+)</td>', table) == ["−0.900", "−0.600", "−0.500"]
    assert training.target_losses(run) == ""
    assert 'id="targets"' not in page.html(run)


def test_a_page_without_pruning_does_not_speak_of_it(run):
    assert "Dashes:" not in page.html(run)
    assert "→ " not in training.losses(run)


def test_the_curves_of_a_dozen_students_stand_in_rows_of_three(run):
    trained = next(student for student in run.students if student.name == "distil")
    figure = figures.curves([replace(trained, name=f"student-{n:02d}") for n in range(12)])
    assert {axis.get_subplotspec().get_gridspec().get_geometry() for axis in figure.axes} == {(4, 3)}
    assert figure.get_size_inches()[1] == pytest.approx(4 * 2.7)
