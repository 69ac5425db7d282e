"""What models cost and what fine-tuning makes of them, on the page and in the tables beside it."""

import csv
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

from cache.errors import SettingsError, StoreError
from cache.publish import read_json, write_json
from pipeline.profile import ProfileParams
from pipeline.report import finetuned, page, results, tables, wording
from pipeline.report.gather import gather
from pipeline.report.settings import ReportParams
from pipeline.report.superb import OfModel, SuperbParams
from pipeline.tasks.metrics import Interval
from pipeline.tasks.score import Miss
from pipeline.tasks.textscore import AsrScore
from pipeline.tasks.voicescore import CostScore, SvScore
from pipeline.tasks.worderrors import TextErrors
from tests.report_fixtures import MODELS, write_profile, write_run, write_tuned

ROOT = Path(__file__).parent.parent
SUPERB = SuperbParams.model_validate({"zero": {"kind": "model", "model": "log-mel"}, "thousand": {"kind": "best"}})


@pytest.fixture
def paths(tmp_path):
    return {**write_run(tmp_path), "profile": write_profile(tmp_path / "profile.json")}


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of a Markdown table by its first."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row for row in cells}


def plain(text: str) -> str:
    return text.replace(wording.NARROW, " ")


def test_the_table_tells_what_a_model_costs_at_the_longest_utterance(paths):
    run = gather(**paths, superb=SUPERB)
    rows = rows_of(plain(tables.markdown(run)))
    assert rows["model"] == ["model", "parameters", "weights", "M MACs/s", "ms/s", "KS", "SID", "score"]
    assert rows["hubert (teacher)"] == [
        "hubert (teacher)", "2.51 M", "10.1 MB", "2 765", "0.50", "**93.1** ± 0.6", "**87.4** ± 0.6", "1000",
    ]  # fmt: skip
    assert rows["log-mel (baseline)"][1:5] == ["–", "0 B", "0.00", "2.50"]
    assert rows["log-mel (baseline)"][-1] == "0"
    # keywords (0.8875 - 0.5833) / (0.9312 - 0.5833), speakers (0.8283 - 0.4983) / (0.8742 - 0.4983)
    want = 500 * ((0.8875 - 0.5833) / (0.9312 - 0.5833) + (0.8283 - 0.4983) / (0.8742 - 0.4983))
    assert rows["distil (student)"][-1] == f"{want:.0f}"
    assert "log-mel has 0 and the best teacher of each task 1000" in tables.markdown(run)
    table = plain(results.table(run))
    assert 'title="quartiles 0.4 and 0.7 ms">0.50<' in table
    assert "2.76 G" in table


def test_the_best_of_a_group_is_marked_less_than_the_best_of_all(paths):
    table = results.table(gather(**paths))
    assert re.findall(r"<b>([\d.]+)</b>", table) == ["93.1", "87.4"]
    assert re.findall(r"<strong>([\d.]+)</strong>", table) == ["88.8", "82.8", "58.3", "49.8"]


def test_the_csv_has_costs_and_scores_unrounded(paths):
    rows = list(csv.DictReader(tables.scores_csv(gather(**paths, superb=SUPERB)).splitlines()))
    row = next(row for row in rows if (row["model"], row["task"]) == ("small", "kws"))
    assert float(row["macs_per_second"]) == pytest.approx(1000 * 412_300 * 1.1)
    assert [float(row[name]) for name in ("seconds", "rtf", "rtf_low", "rtf_high")] == pytest.approx(
        [10, 0.0015, 0.0012, 0.0021]
    )
    assert float(row["superb_like"]) < 1000
    assert row["cer"] == row["min_dcf"] == ""


def test_the_second_figure_of_a_task_is_in_the_csv_and_under_the_pointer(paths):
    score = read_json(paths["probes"] / "small-kws.json")
    write_json(paths["probes"] / "small-kws.json", {**score, "cer": 0.1234})
    run = gather(**paths)
    row = next(
        r for r in csv.DictReader(tables.scores_csv(run).splitlines()) if (r["model"], r["task"]) == ("small", "kws")
    )
    assert row["cer"] == "0.1234"
    assert 'title="CER, %: 12.3"' in results.table(run)


def test_the_metrics_for_dvc_have_costs_and_scores(paths):
    found = tables.metrics(gather(**paths, superb=SUPERB))
    assert found["costs"]["hubert"]["parameters"] == MODELS["hubert"][3]
    assert found["superb_like"]["hubert"] == pytest.approx(1000)
    assert found["finetuned"] == {}


def test_figures_of_another_model_of_that_name_are_refused(paths):
    measured = read_json(paths["profile"])
    measured["models"]["small"]["digest"] = "another"
    write_json(paths["profile"], measured)
    with pytest.raises(StoreError, match=r"measured another 'small' than .* run `decant profile` again"):
        gather(**paths)


def test_a_model_that_was_not_measured_has_dashes(paths):
    measured = read_json(paths["profile"])
    del measured["models"]["small"]
    write_json(paths["profile"], measured)
    run = gather(**paths)
    assert rows_of(tables.markdown(run))["small (student)"][3:5] == ["–", "–"]
    assert page.html(run)


def test_a_zero_that_was_not_probed_is_refused_by_its_key(paths):
    wrong = SuperbParams.model_validate({"zero": {"kind": "model", "model": "logmel"}, "thousand": {"kind": "best"}})
    with pytest.raises(SettingsError, match=r"report.superb.zero.model is 'logmel'.* log-mel"):
        gather(**paths, superb=wrong)


@pytest.fixture
def with_tuned(paths):
    models = paths["models"]
    write_tuned(models, "joint", ("student", "small"), False, {"kws": 0.95, "sv": 0.12})
    write_tuned(models, "keywords", ("student", "small"), False, {"kws": 0.96})
    write_tuned(models, "frozen", ("student", "small"), True, {"kws": 0.84, "sv": 0.30})
    write_tuned(models, "reference", ("teacher", "hubert"), False, {"kws": 0.97, "sv": 0.10})
    return paths


def test_a_fine_tuned_folder_is_not_taken_for_a_distilled_student(with_tuned):
    run = gather(**with_tuned)
    assert {student.name for student in run.students} == {"distil", "small", "untrained"}
    assert [tuned.name for tuned in finetuned.ordered(run)] == ["frozen", "keywords", "joint", "reference"]


def test_the_table_of_fine_tuned_models_has_scores_and_the_costs_of_their_encoders(with_tuned):
    run = gather(**with_tuned)
    rows = rows_of(plain(finetuned.markdown(run)))
    assert rows["joint"][:5] == ["joint", "small", "tuned", finetuned.learns(run.tuned[1]), "412 k"]
    assert rows["frozen"][2] == "frozen"
    assert rows["joint"][5:7] == ["454", "1.50"]  # of `small`, which has its shape
    assert rows["reference"][5:7] == ["2 765", "0.50"]
    assert rows["keywords"][7] == "96.0 ± 1.0"
    assert rows["reference"][7] == "**97.0** ± 1.0"
    assert tables.metrics(run)["finetuned"]["frozen"] == {"kws": 0.84, "sv": 0.3}
    text = page.html(run)
    assert 'id="finetuned"' in text
    assert "Fine-tuned" in text


def test_a_fine_tuned_encoder_that_was_measured_has_its_own_costs(with_tuned):
    measured = read_json(with_tuned["profile"])
    own = read_json(with_tuned["profile"])["models"]["distil"]
    measured["models"]["joint"] = {**own, "digest": "joint"}
    write_json(with_tuned["profile"], measured)
    rows = rows_of(plain(finetuned.markdown(gather(**with_tuned))))
    assert rows["joint"][5:7] == ["1 334", "1.00"]


def test_a_page_without_fine_tuned_models_has_no_such_table(paths):
    assert 'id="finetuned"' not in page.html(gather(**paths))


COMMON = {
    "higher_is_better": False,
    "sd": 0.02,
    "interval": Interval(0.18, 0.25),
    "chance": 0.5,
    "majority": 0.5,
    "lr": 0.001,
    "lr_at_edge": False,
    "dev_by_lr": ((0.001, 0.2),),
    "seeds": (),
    "layers": ("layer-00", "layer-01"),
    "layer_weights": (0.4, 0.6),
    "classes": ("a", "b"),
    "counts": {"train": 10, "dev": 5, "test": 6},
}


def as_probes_score(mean: float) -> dict[str, AsrScore | SvScore]:
    errors = TextErrors(2, 1, 1)
    recognised = AsrScore(
        **{**COMMON, "metric": "WER", "misses": (Miss(("espeak/0004",), "one two", "on to", 1.0),)},
        mean=mean,
        cer=0.085,
        errors=errors,
        character_errors=errors,
        test_words=20,
        test_characters=99,
        left_out=0,
        beam=None,
    )
    verified = SvScore(
        **{**COMMON, "metric": "EER", "misses": (Miss(("espeak/0004", "espeak/0009"), "same", "different", 0.4),)},
        mean=mean,
        headline="espeak/test",
        min_dcf=(CostScore(0.01, 1.0, 1.0, 0.913, None), CostScore(0.05, 1.0, 1.0, 0.6, None)),
        trials={"dev": 9, "espeak/test": 9},
        speakers={"train": 5, "dev": 3, "test": 3},
        lists=(),
    )
    return {"asr": recognised, "sv": verified}


def test_scores_of_recognition_and_verification_stand_in_every_table(paths):
    for name, mean in (("hubert", 0.21), ("small", 0.25)):
        like = read_json(paths["probes"] / f"{name}-kws.json")
        kept = {key: like[key] for key in ("format", "model", "description", "params")}
        for task, score in as_probes_score(mean).items():
            write_json(paths["probes"] / f"{name}-{task}.json", {**kept, "task": task, **asdict(score)})
    run = gather(**paths)
    assert run.tasks == ("asr", "kws", "sid", "sv")
    rows = {(r["model"], r["task"]): r for r in csv.DictReader(tables.scores_csv(run).splitlines())}
    assert rows["small", "asr"]["cer"] == "0.085"
    assert rows["small", "sv"]["min_dcf"] == "0.913"
    table = results.table(run)
    assert 'title="CER, %: 8.5"' in table
    assert 'title="minDCF at 0.01: 0.913"' in table
    scores = rows_of(tables.markdown(run))["hubert (teacher)"][-4:]
    assert scores == ["**21.0** ± 2.0", "**93.1** ± 0.6", "**87.4** ± 0.6", "**21.0** ± 2.0"]
    assert run.scores["small", "sv"].misses[0].ids == ("espeak/0004", "espeak/0009")
    text = page.html(run)
    assert "the bootstrap’s for EER over test speakers" in text
    assert "ASV: a linear layer, an x-vector" in text


@pytest.mark.parametrize(
    "path", [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))], ids=lambda path: path.stem
)
def test_the_settings_of_every_recipe_can_be_read_and_its_zero_is_a_model_of_it(path):
    params = yaml.safe_load(path.read_text(encoding="utf-8"))
    report = ReportParams.model_validate(params["report"])
    assert (
        report.superb is None
        or not isinstance(report.superb.zero, OfModel)
        or report.superb.zero.model in params["models"]
    )
    ProfileParams.model_validate(params["profile"])
