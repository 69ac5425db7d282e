"""The page about scale says what its script prints, the script what the code does, and the simulation runs on little."""

import json
import sys
from pathlib import Path
from typing import get_args

import pytest

from benchmarks import bench_plan, scale_table
from pipeline.extraction.settings import ExtractParams

PAGE = Path(__file__).parents[1] / "docs" / "scale.md"


def test_the_tables_of_the_page_are_what_the_script_prints():
    between = PAGE.read_text(encoding="utf-8").split("<!-- printed by benchmarks/scale_table.py -->\n\n")[1]
    assert between.split("\n<!-- end -->")[0] == scale_table.page(), "paste what benchmarks/scale_table.py prints"


def test_the_measured_figures_of_the_page_are_those_of_the_stored_run():
    page, run = PAGE.read_text(encoding="utf-8"), json.loads(scale_table.RESULT.read_text())
    for name, (_, promise) in bench_plan.STEPS.items():
        got = run["steps"][name]
        if promise is not None:
            assert f"| {promise} | {got['seconds']:.1f} | {got['peak_bytes'] / 1e9:.2f} GB |" in page
            assert got["seconds"] <= bench_plan.BAR_SECONDS
            assert got["peak_bytes"] <= bench_plan.BAR_BYTES
    for name, (_, limit) in bench_plan.LIMITS.items():
        assert f"| {limit} | {run['limits'][name]['seconds']:.1f} | " in page


def test_the_sizes_agree_with_the_writer_and_with_the_hand():
    steps = json.loads(scale_table.RESULT.read_text())["steps"]
    assert 4 * scale_table.layer_bytes(steps["draw"]["hours"], 1536) == pytest.approx(
        steps["predict"]["bytes"], rel=1e-4
    )
    assert scale_table.layer_bytes(960, 1536) == pytest.approx(960 * 3600 * 50 * 768 * 2, rel=0.002)  # 265 GB
    assert scale_table.rate(770) == 4 * 770 * 50 + 32_000  # 154 kB a second of audio, and its waveform
    assert (scale_table.CODECS["float32"], scale_table.CODECS["int8"], scale_table.CODECS["mvq16"]) == (3072, 770, 16)


def test_the_codecs_that_the_page_calls_existing_are_the_ones_a_person_can_set():
    known = set(get_args(ExtractParams.model_fields["codec"].annotation))
    assert known == set(scale_table.CODECS)
    assert set(scale_table.SHOWN.values()) == known - {"bfloat16"}


def test_the_simulation_reads_right_numbers_from_a_small_corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path))
    monkeypatch.setattr(bench_plan, "BATCHES", 50)
    size = 30_000
    told = {name: step(tmp_path, size) for name, (step, _) in bench_plan.STEPS.items()}
    hours = told["draw"]["hours"]
    assert hours == pytest.approx(60_000 * size / bench_plan.UTTERANCES, rel=0.02)
    assert told["open"] == {"utterances": size, "shards": told["plan"]["shards"]}
    assert told["open-receipt"]["files_checked"] == told["link"]["files"] == told["plan"]["shards"]
    assert told["plan"]["shards"] == pytest.approx(hours * 3600 * 50 / 65_536, rel=0.02)
    assert bench_plan.list_ids(tmp_path, size) == {"ids": size}


@pytest.mark.parametrize(("seconds", "peak"), [(11.0, 1e6), (1.0, 2.1e9), (1.0, 1e6)])
def test_a_promise_that_is_not_kept_ends_with_exit_1(seconds, peak, monkeypatch, capsys):
    def child(name, folder, size):
        if name == "draw":
            (folder / "samples.npy").touch()
        return {"seconds": seconds, "peak_bytes": peak, "utterances": size, "hours": 1}

    monkeypatch.setattr(bench_plan, "child", child)
    monkeypatch.setattr(bench_plan, "write_manifest_text", lambda folder: None)
    monkeypatch.setattr(sys, "argv", ["bench_plan.py"])
    with pytest.raises(SystemExit) as end:
        bench_plan.main()
    kept = (seconds, peak) == (1.0, 1e6)
    assert end.value.code == (not kept)
    assert ("SHORT" not in capsys.readouterr().out) == kept
