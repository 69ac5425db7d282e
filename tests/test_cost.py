"""The plan of an extraction: its bytes and files are those that the extraction then writes."""

import shutil

import pytest

from cache.errors import ResourceError
from cache.receipts import open_receipt
from pipeline.cost import cost_of
from pipeline.extract import extract
from pipeline.extraction.settings import Calibration, ExtractParams, Fail, Keep
from pipeline.logmel import load_logmel
from stages.cacheplan import main

SAMPLE = Calibration(seconds=60, seed=0)  # more than there is: all of it


@pytest.fixture
def logmel(tmp_path):
    (tmp_path / "logmel.json").write_text('{"model": "log-mel", "num_mels": 20, "floor": 1e-6}')
    return load_logmel(tmp_path / "logmel.json")


@pytest.mark.parametrize("codec", ["float16", "float32", "int8"])
@pytest.mark.parametrize("shard_frames", [96, 8192])
def test_planned_bytes_and_files_are_those_written(tiny_corpus, logmel, codec, shard_frames):
    params = ExtractParams(
        version=1,
        codec=codec,
        chunk_frames=16,
        shard_frames=shard_frames,
        batch_seconds=4.0,
        long=Fail(kind="fail", max_sec=60.0),
        calibration=SAMPLE,
    )
    keep = Keep(layers="all", select="all")
    cost = cost_of(logmel, tiny_corpus.manifest, tiny_corpus.waves, params, keep, "cpu", 2.0, seed=0)
    receipt = extract(logmel, tiny_corpus.manifest, tiny_corpus.waves, params, keep, "cpu", lambda *_, **__: None)
    directory = open_receipt(receipt).directory
    files, tables = list(directory.glob("layer-*/c/*/0")), list(directory.glob("layer-*.*/c/0"))
    assert len(tables) == (2 if codec == "int8" else 0)
    assert cost.chosen.bytes == receipt["bytes"] == sum(f.stat().st_size for f in files + tables)
    assert cost.chosen.files == len(files)
    sizes = {c.codec: c.bytes for c in (*cost.alternatives, cost.chosen) if c.arrays == cost.chosen.arrays}
    assert sorted(sizes, key=sizes.__getitem__) in (
        ["int8", "float16", "float32", "mvq16"],  # of so little audio: its codebooks are larger than the frames
        ["int8", "float16", "mvq16", "float32"],
    )
    assert cost.sample_seconds >= 2.0
    assert cost.hours == pytest.approx(cost.hours_of_audio / cost.rate)


def test_what_does_not_fit_is_printed_and_refused(tiny_corpus, logmel, tmp_path, monkeypatch, capsys):
    settings = "{version: 1, codec: float16, chunk_frames: 64, shard_frames: 8192, batch_seconds: 30, long: {kind: fail, max_sec: 60}"
    settings += ", calibration: {seconds: 60, seed: 0}}"
    (tmp_path / "params.yaml").write_text(f"extract: {settings}\nkeep: {{layers: all, select: all}}\n")
    places = (
        [tmp_path / "logmel.json"],
        tiny_corpus.manifest_path,
        tiny_corpus.waves_path,
        "keep",
        tmp_path / "params.yaml",
    )
    main(*places, device="cpu", sample_sec=1.0, as_json=False)
    assert "does not fit" not in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1000))
    with pytest.raises(ResourceError, match="keep takes 0.00 GB; keep fewer layers, or set DECANT_STORE"):
        main(*places, device="cpu", sample_sec=1.0, as_json=False)
    printed = capsys.readouterr().out
    assert printed.count("does not fit") == 4
    assert printed.splitlines()[3].startswith("* 0 ")
