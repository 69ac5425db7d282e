"""The report over a small made-up run: whole, right, the same bytes each time, and legible to a browser."""

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cache.errors import DataError, DecantError, StoreError
from cache.publish import read_json, write_json
from pipeline.report import drawing, figures, page, results, sections, tables, wording
from pipeline.report.gather import gather
from pipeline.report.listening import ListenParams, worst_errors
from pipeline.report.run import Run
from pipeline.report.superb import SuperbParams
from stages.report import main
from tests.report_fixtures import MODELS, receipt, write_profile, write_run, write_tuned

SUPERB = SuperbParams.model_validate({"zero": {"kind": "model", "model": "log-mel"}, "thousand": {"kind": "best"}})
LISTEN = ListenParams.model_validate({"model": {"kind": "best"}, "each": 2, "max_sec": 8.0})


@pytest.fixture(scope="module")
def paths(tmp_path_factory) -> dict[str, Path]:
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def run(paths) -> Run:
    return gather(**paths)


@pytest.fixture(scope="module")
def whole_page(paths, tmp_path_factory) -> str:
    """The page with all that it may have but players."""
    home = tmp_path_factory.mktemp("whole")
    shutil.copytree(paths["models"], home / "models")
    write_tuned(home / "models", "joint", ("student", "small"), False, {"kws": 0.95, "sv": 0.12})
    profile = write_profile(home / "profile.json")
    run = gather(**{**paths, "models": home / "models"}, profile=profile, superb=SUPERB)
    return page.html(run)


@pytest.fixture
def own(paths, tmp_path) -> dict[str, Path]:
    """A copy that a test may break."""
    home = paths["models"].parent
    shutil.copytree(home, tmp_path / "run")
    return {name: tmp_path / "run" / path.relative_to(home) for name, path in paths.items()}


def test_every_product_is_there_and_the_same_bytes_each_time(paths, tmp_path, capsys):
    params = tmp_path / "params.yaml"
    params.write_text("report: {superb: {zero: {kind: model, model: log-mel}, thousand: {kind: best}}, listen: null}\n")
    profile = write_profile(tmp_path / "profile.json")
    for out in ("one", "two"):
        main(**paths, out=tmp_path / out, profile=profile, params=params)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    pictures = ["curves.png", "layer-weights.png", *(f"pareto-{cost}.png" for cost in ("macs", "size", "speed"))]
    assert names == sorted([*pictures, "index.html", "metrics.json", "scores.csv"])
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert "report: 10 scores of 5 models" in capsys.readouterr().out


def test_the_page_asks_for_nothing_and_tells_nothing_of_the_machine(whole_page, paths):
    text = whole_page
    outside = set(re.findall(r"""(?:https?:)?//[^"' )<>]+""", text)) - {
        "http://www.w3.org/2000/svg",  # names, not requests
        "http://www.w3.org/1999/xlink",
    }
    assert not outside
    assert "<script" not in text
    assert "@import" not in text
    assert str(paths["models"].parent) not in text
    assert not re.search(r"20\d\d-\d\d-\d\d|matplotlib", text), "a date or a version would change from run to run"


class Tags(HTMLParser):
    """Collects ids and complains about tags that do not close."""

    VOID = frozenset({"meta", "br", "link", "img", "path", "circle", "use"})

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_markup_closes_what_it_opens_and_no_id_is_used_twice(whole_page):
    tags = Tags()
    tags.feed(whole_page)
    assert tags.open == []
    assert len(set(tags.ids)) == len(tags.ids)
    assert {"probes", "certainty", "finetuned", "corpora", "stores", "students"} <= set(tags.ids)


def test_names_from_outside_are_text_and_never_markup(own):
    evil = "<script>alert(1)</script>"
    manifest = own["manifest"].read_text().replace('"corpus": "espeak"', f'"corpus": {json.dumps(evil)}')
    own["manifest"].write_text(manifest)
    text = page.html(gather(**own))
    assert evil not in text
    assert "&lt;script&gt;" in text


def test_the_csv_holds_every_score_unrounded(run):
    rows = list(csv.DictReader(tables.scores_csv(run).splitlines()))
    assert len(rows) == 10
    row = next(row for row in rows if (row["model"], row["task"]) == ("distil", "sid"))
    assert (float(row["mean"]), row["role"], int(row["num_params"])) == (0.8283, "student", 1_212_960)
    assert (row["lr"], row["lr_at_edge"], row["test"], row["classes"]) == ("0.1", "True", "480", "36")


def test_the_metrics_for_dvc_are_numbers_by_task_and_model(run):
    found = tables.metrics(run)
    assert found["scores"]["kws"] == {name: model[4] for name, model in MODELS.items()}
    assert found["students"]["distil"]["total"] == 0.6278
    assert found["quarantined"] == 1


def test_counts_are_those_of_the_manifest_and_the_receipts(run):
    (corpus,) = run.corpora
    assert (corpus.utterances, corpus.speakers, corpus.quarantined) == (600, 36, 1)
    assert corpus.splits == {"train": 360, "dev": 120, "test": 120}
    assert corpus.tasks == {"kws": 300, "sid": 600}
    assert corpus.hours == pytest.approx(sum(16_000 + 40 * n for n in range(600)) / 16_000 / 3600)
    waves, kept, *others = run.stores
    assert (waves.purposes, waves.rows, len(others)) == (("waveforms",), 66_101_344, 4)
    # the teacher's targets (layers 1, 3, 5) and its features (all six) are one store, and are counted once
    assert (kept.name, kept.purposes, kept.shards) == ("hubert", ("targets", "features"), 24)
    assert kept.bytes == 6 * 204_812 * 192 * 2


def test_an_utterance_in_many_folds_takes_part_once(own):
    folds = '"tasks": {"er-1": "train", "er-2": "test", "er-x": "dev", "sid"'
    own["manifest"].write_text(own["manifest"].read_text().replace('"tasks": {"sid"', folds))
    (corpus,) = gather(**own).corpora
    assert corpus.tasks == {"er": 300, "er-x": 300, "kws": 300, "sid": 600}


def test_models_stand_in_groups_with_the_larger_first_and_the_untrained_last(run):
    assert [model.name for model in run.models] == ["hubert", "distil", "small", "untrained", "log-mel"]
    assert [model.role for model in run.models] == ["teacher", "student", "student", "student", "baseline"]
    sizes = {model.name: model.weight_bytes for model in run.models}
    assert sizes == {
        "hubert": 4 * 2_513_408,
        "distil": 4 * 1_212_960 + 4000,
        "small": 4 * 412_300 + 4000,
        "untrained": 4 * 1_212_960 + 4000,
        "log-mel": None,
    }


def test_the_best_of_each_task_and_of_each_group_is_marked(run):
    table = results.table(run)
    assert re.findall(r"<b>([\d.]+)</b>", table) == ["93.1", "87.4"]
    assert tables.markdown(run).count("**") == 4


def test_the_headline_compares_the_best_student_with_its_teacher(run):
    text = re.sub(r"<[^>]+>", " ", sections.headline(run))
    assert "6.1×" in text
    assert "distil, the best student; hubert 93.1, log-mel 58.3, chance 10.0" in text


def test_the_headline_compares_a_student_with_the_teachers_it_learned_from(own):
    facts = json.loads((own["models"] / "distil" / "shape.json").read_text())
    facts["settings"]["ensemble"] = {"kind": "heads", "teachers": [{"teacher": "hubert"}, {"teacher": "spare"}]}
    write_json(own["models"] / "distil" / "shape.json", facts)
    run = gather(**own)
    assert next(student for student in run.students if student.name == "distil").teachers == ("hubert", "spare")
    better = replace(run.models[0], name="wavlm")
    score = run.scores["hubert", "kws"]
    louder = {**run.scores, ("wavlm", "kws"): score.model_copy(update={"model": "wavlm", "mean": 0.99})}
    text = re.sub(r"<[^>]+>", " ", sections.headline(replace(run, models=(better, *run.models), scores=louder)))
    assert "distil, the best student; hubert 93.1, log-mel 58.3" in text


def test_the_drawing_carries_the_counts_of_this_run(run):
    drawn = {station.name: station for station in drawing.stations(run)}
    assert list(drawn) == ["corpus", "teacher", "store", "targets", "student", "probe", "report"]
    assert drawn["probe"].figure == "10 scores"
    assert drawn["store"].details[0] == "6 layers, float16"
    assert drawn["targets"].details[0] == "distil, 3 layers"


def test_a_probe_that_was_not_run_leaves_a_dash(own):
    (own["probes"] / "small-sid.json").unlink()
    run = gather(**own)
    row = next(line for line in tables.markdown(run).splitlines() if line.startswith("| small"))
    assert row.endswith("| – |")
    assert len(tables.scores_csv(run).splitlines()) == 1 + 9
    assert page.html(run)


def test_many_models_and_deep_ones_still_make_a_page(own):
    for number in range(12):
        write_json(own["features"] / f"m{number}.json", read_json(own["features"] / "hubert.json"))
        score = read_json(own["probes"] / "hubert-kws.json")
        layers = [f"layer-{layer:02d}" for layer in range(25)]
        score |= {"model": f"m{number}", "layers": layers, "layer_weights": [1 / 25] * 25}
        write_json(own["probes"] / f"m{number}-kws.json", score)
    run = gather(**own)
    assert len(run.models) == 17
    assert page.html(run)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("probes", r"probe holds no score; run `decant probe`"),
        ("features", r"features holds no receipt of features; run `decant extract`"),
        ("models", r"models holds no student .* run `decant distill`"),
        ("receipts", r"receipts holds no receipt of a teacher; run `decant extract`"),
        ("waves", r"waves.json does not exist"),
        ("quarantine", r"quarantine.json does not exist; `decant prepare` writes it"),
        ("manifest", r"manifest.jsonl does not exist; write it with `decant prepare`"),
    ],
)
def test_an_input_that_is_missing_is_refused_by_name_with_the_stage_that_writes_it(own, broken, message):
    path = own[broken]
    if path.is_dir():
        shutil.rmtree(path)
        if broken == "receipts":
            write_json(own["waves"], receipt("waves", {}, ["wave"], None, "int16"))
    else:
        path.unlink()
    with pytest.raises(DecantError, match=message):
        gather(**own)


def test_a_score_of_other_features_is_refused(own):
    score = read_json(own["probes"] / "distil-kws.json")
    score["description"]["store"] = "0123456789"
    write_json(own["probes"] / "distil-kws.json", score)
    with pytest.raises(StoreError, match=r"made from features 0123456789 .* run `decant probe distil kws` again"):
        gather(**own)


def test_a_score_of_a_model_without_features_is_refused(own):
    (own["features"] / "small.json").unlink()
    with pytest.raises(StoreError, match="a score of 'small', which has no receipt"):
        gather(**own)


def test_a_product_that_does_not_read_is_refused_with_its_field(own):
    score = read_json(own["probes"] / "distil-kws.json")
    del score["mean"]
    write_json(own["probes"] / "distil-kws.json", score)
    with pytest.raises(StoreError, match=r"distil-kws.json: mean: field required"):
        gather(**own)


def test_a_curve_that_does_not_read_is_refused(own):
    (own["models"] / "small" / "curves.csv").write_text("step,total\n1,abc\n")
    with pytest.raises(
        StoreError, match=r"small/curves.csv is not a training curve .* run `decant distill small` again"
    ):
        gather(**own)


def test_the_table_goes_between_the_marks_of_a_readme_and_nowhere_else(paths, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_bytes(b"# Title\r\n\n<!-- results:begin -->\nold\n<!-- results:end -->\ntail, no newline")
    params = tmp_path / "params.yaml"
    params.write_text("report: {superb: null, listen: null}\n")
    for _ in range(2):  # doing it again changes nothing
        main(**paths, out=tmp_path / "reports", readme=readme, params=params)
        text = readme.read_bytes().decode()
        assert text.startswith("# Title\r\n\n<!-- results:begin -->\n| model |")
        assert text.endswith("<!-- results:end -->\ntail, no newline")
        assert "old" not in text
        assert text.count("| distil (student) |") == 1


@pytest.mark.parametrize("text", ["no marks", "<!-- results:end --> <!-- results:begin -->", "<!-- results:begin -->"])
def test_a_readme_without_its_marks_is_left_alone(run, tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(DataError, match="must have one line"):
        tables.splice(readme, tables.markdown(run))
    assert readme.read_text() == text


def test_a_run_of_untrained_students_alone_still_draws_its_curves(run):
    untrained = [student for student in run.students if student.metrics.steps == 0]
    assert figures.png(figures.curves(untrained)).startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("written", "want"),
    [
        (wording.count(66_101_344), "66 101 344"),
        (wording.params(23_491_200), "23.5 M"),
        (wording.params(412_300), "412 k"),
        (wording.params(999), "999"),
        (wording.params(None), "–"),
        (wording.size(265_000_000_000), "265 GB"),
        (wording.size(0), "0 B"),
        (wording.hours(960.0), "960 h"),
        (wording.hours(0.29), "17.4 min"),
        (wording.significant(99.96), "100"),
        (wording.significant(9.996), "10.0"),
        (wording.percent(0.88754), "88.8"),
        (wording.loss(-0.83366), "−0.834"),
        (wording.loss(0.5, 4), "0.5000"),
        (wording.rate(1e-5), "1e-5"),
        (wording.rate(2.5e-5), "2.5e-5"),
        (wording.rate(0.0001), "0.0001"),
        (wording.plural(1, "shard"), "1 shard"),
        (wording.spelled(3, "student"), "three students"),
        (wording.spelled(13, "student"), "13 students"),
        (wording.listed(["a", "b", "c"]), "a, b and c"),
    ],
)
def test_numbers_are_written_one_way(written, want):
    assert written.replace(wording.NARROW, " ") == want


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is not opened")
def test_a_browser_finds_the_table_and_has_nothing_to_complain_about(run, tmp_path):
    tone = (8000 * np.sin(np.arange(16_000) / 5)).astype(np.int16)
    heard = worst_errors(run, lambda _: tone, LISTEN)
    (tmp_path / "index.html").write_text(page.html(run, heard), encoding="utf-8")
    shown = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000", "--enable-logging=stderr", "--dump-dom",
            (tmp_path / "index.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert '<table class="results" id="probes">' in shown.stdout
    assert shown.stdout.count('<th scope="row">') >= 5 + 1 + 7
    assert "</html>" in shown.stdout
    complaints = [line for line in shown.stderr.splitlines() if "CONSOLE" in line]
    assert complaints == []


@pytest.fixture
def with_phones(own) -> dict[str, Path]:
    """The run with a third task, in which less is better; the worst model answers more phones than there are."""
    rates = {"hubert": 0.4312, "distil": 0.4021, "small": 0.6, "untrained": 1.02, "log-mel": 0.8}
    for name, rate in rates.items():
        score = read_json(own["probes"] / f"{name}-kws.json")
        score |= {"task": "pr", "mean": rate, "interval": [rate - 0.02, rate + 0.03], "chance": 1.0, "majority": 0.926}
        score |= {"metric": "PER", "higher_is_better": False, "classes": ["a", "b", "k"]}
        write_json(own["probes"] / f"{name}-pr.json", score)
    return own


def test_an_error_rate_is_marked_and_the_lowest_is_the_best(with_phones):
    run = gather(**with_phones)
    assert run.tasks == ("pr", "kws", "sid")
    assert run.best("pr") == 0.4021
    head, _, *rows = tables.markdown(run).splitlines()
    assert head.endswith("| weights | PR, PER ↓ | KS | SID |")
    assert [row.split("|")[4].strip() for row in rows[:2]] == ["43.1 ± 0.6", "**40.2** ± 0.6"]
    assert "↓ is an error rate, lower is better; without listening it is 92.6 (PR)." in rows[-1]
    table = results.table(run)
    assert re.findall(r"<b>([\d.]+)</b>", table) == ["93.1", "87.4", "40.2"]
    assert '<th class="num task">PER, % ↓</th>' in table
    assert '<th class="num task">accuracy, %</th>' in table
    assert "↓: an error rate, lower is better." in page.html(run)


def test_the_best_student_of_an_error_rate_is_the_one_with_the_fewest(with_phones):
    text = re.sub(r"<[^>]+>", " ", sections.headline(gather(**with_phones)))
    assert "phone recognition: PER, lower is better" in text
    assert re.search(r"40\.2 *% .*distil, the best student; hubert 43\.1, log-mel 80\.0", text)


def test_an_error_rate_above_all_phones_stays_on_its_axis(with_phones):
    table = results.certainty(gather(**with_phones))
    assert "95 % interval 100.0 to 105.0, not listening 92.6" in table
    places = [float(place) for place in re.findall(r'cx="([\d.]+)"|H([\d.]+)"', table) for place in place if place]
    assert max(places) <= 100


def test_a_page_without_an_error_rate_has_no_arrow(run):
    assert "↓" not in page.html(run)
    assert "↓" not in tables.markdown(run)


def test_the_protocol_says_how_each_kind_of_task_is_scored(run, with_phones):
    assert "CTC" not in sections.protocol(run)
    text = sections.protocol(gather(**with_phones))
    assert "PR: a linear layer and a linear classifier of every frame under CTC, greedy answers." in text
    assert "the bootstrap’s for PER over 480 test utterances" in text


def test_a_run_of_phone_recognition_alone_still_makes_a_page(with_phones):
    for path in (*with_phones["probes"].glob("*-kws.json"), *with_phones["probes"].glob("*-sid.json")):
        path.unlink()
    run = gather(**with_phones)
    assert run.tasks == ("pr",)
    assert "mean over frames" not in sections.protocol(run)
    assert page.html(run)
    assert tables.markdown(run)


def test_a_run_in_which_only_teachers_were_tuned_has_a_page_without_distillation(own):
    for folder in own["models"].iterdir():
        for product in (own["features"] / f"{folder.name}.json", *own["probes"].glob(f"{folder.name}-*.json")):
            product.unlink()
        shutil.rmtree(folder)
    write_tuned(own["models"], "joint", ("teacher", "hubert"), False, {"kws": 0.95, "sv": 0.12})
    run = gather(**own)
    assert run.students == ()
    assert "<h2>Distillation</h2>" not in page.html(run)
    assert figures.png(figures.curves(run.students)).startswith(b"\x89PNG")
