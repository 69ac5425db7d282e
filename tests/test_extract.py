"""P2 and P3 of extraction: what is stored is what the model gives alone, and a killed run loses nothing."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError
from typer.testing import CliRunner

from cache.errors import DataError, SettingsError, StoreError
from cache.manifest import Manifest
from cache.receipts import open_receipt
from pipeline.extract import extract
from pipeline.extraction.settings import Calibration, ExtractParams, Fail, Keep
from pipeline.logmel import LogMel, LogMelParams
from pipeline.padding import LengthMaskedGroupNorm, pad_waves
from pipeline.upstream import LayersAlone
from stages.extract import app

SAMPLE = Calibration(seconds=60, seed=0)  # more than there is: all of it

PARAMS = ExtractParams(
    version=1,
    codec="float32",
    chunk_frames=16,
    shard_frames=128,
    batch_seconds=4.0,
    long=Fail(kind="fail", max_sec=60.0),
    calibration=SAMPLE,
)
ALL = Keep(layers="all", select="all")


@pytest.fixture
def logmel():
    return LogMel(LogMelParams(model="log-mel", num_mels=40, floor=1e-6))


class Shifting(LayersAlone):
    """A model whose layer i is the framed wave plus i; `calls` counts its forwards."""

    num_layers, width = 3, 400

    def __init__(self, bad=None):
        self.calls, self.bad = 0, bad

    def describe(self):
        return {"kind": "shifting", "digest": "0"}

    def layers(self, waves, samples):
        self.calls += 1
        frames = waves.unfold(1, 400, 320)
        if self.bad is not None and waves.shape[1] == self.bad:
            frames = frames * float("nan")
        return [frames + i for i in range(3)]


def run(model, corpus, params=PARAMS, keep=ALL, manifest=None):
    return extract(model, manifest or corpus.manifest, corpus.waves, params, keep, "cpu", lambda *_, **__: None)


@pytest.mark.parametrize("batch_seconds", [0.01, 1.7, 100.0])
def test_a_stored_frame_is_what_the_model_gives_for_that_utterance_alone(tiny_corpus, logmel, batch_seconds):
    receipt = run(logmel, tiny_corpus, PARAMS.model_copy(update={"batch_seconds": batch_seconds}))
    store = open_receipt(receipt, verify=True)
    assert store.plan.num_shards > 2
    for u in tiny_corpus.manifest:
        wave, samples = pad_waves([tiny_corpus.waves.read("wave", u.id)])
        alone = logmel.layers(wave, samples)[0][0].numpy()
        assert alone.shape == (u.num_frames, 40)
        np.testing.assert_allclose(store.read("layer-00", u.id), alone, rtol=0, atol=1e-5)


def test_float16_keeps_a_thousandth(tiny_corpus, logmel):
    exact = open_receipt(run(logmel, tiny_corpus))
    half = open_receipt(run(logmel, tiny_corpus, PARAMS.model_copy(update={"codec": "float16"})))
    for u in range(len(tiny_corpus.manifest)):
        want, got = exact.read("layer-00", u), half.read("layer-00", u).astype(np.float32)
        assert np.linalg.norm(got - want) / np.linalg.norm(want) <= 1e-3


def test_a_finished_store_is_found_again_without_a_forward(tiny_corpus):
    model = Shifting()
    receipt = run(model, tiny_corpus)
    done = model.calls
    assert run(model, tiny_corpus) == receipt
    assert model.calls == done > 0


def test_layers_asked_for_later_are_added_and_the_first_receipt_stays(tiny_corpus):
    first = run(Shifting(), tiny_corpus, keep=Keep(layers=(1,), select="all"))
    both = run(Shifting(), tiny_corpus, keep=Keep(layers=(2, 1), select="all"))
    assert first["key"] == both["key"]
    assert first["arrays"]["layer-01"] == both["arrays"]["layer-01"]
    store = open_receipt(both)
    np.testing.assert_array_equal(store.read("layer-02", 3), store.read("layer-01", 3) + 1)


def test_a_corrected_label_makes_no_new_store(tiny_corpus):
    from dataclasses import replace

    model = Shifting()
    receipt = run(model, tiny_corpus)
    done = model.calls
    relabelled = Manifest(tuple(replace(u, keyword="stop", split="test") for u in tiny_corpus.manifest))
    assert run(model, tiny_corpus, manifest=relabelled) == receipt
    assert model.calls == done


def test_only_the_labelled_are_kept_when_asked(tiny_corpus):
    from dataclasses import replace

    some = Manifest(tuple(replace(u, tasks={} if i % 2 else u.tasks) for i, u in enumerate(tiny_corpus.manifest)))
    receipt = run(Shifting(), tiny_corpus, keep=Keep(layers=(0,), select="labelled"), manifest=some)
    assert open_receipt(receipt).ids == [u.id for u in some if u.tasks]
    none = Manifest(tuple(replace(u, tasks={}) for u in some))
    with pytest.raises(DataError, match="no utterance of the manifest has a probe label"):
        run(Shifting(), tiny_corpus, keep=Keep(layers=(0,), select="labelled"), manifest=none)


def test_what_a_model_must_not_do_is_named(tiny_corpus):
    with pytest.raises(DataError, match=r"tiny/010: layer-00 has values that are not finite in float32"):
        run(Shifting(bad=25_600), tiny_corpus)
    with pytest.raises(SettingsError, match=r"layer 7 is not one of the model's layers 0 to 2"):
        run(Shifting(), tiny_corpus, keep=Keep(layers=(7,), select="all"))
    slow = Shifting()
    slow.layers = lambda waves, samples: [waves.unfold(1, 400, 640)] * 3
    with pytest.raises(DataError, match=r"the model gave \d+ frames and the manifest says \d+; is its hop 320"):
        run(slow, tiny_corpus)


def test_shards_are_whole_chunks():
    with pytest.raises(ValidationError, match=r"shard_frames 1000 is no multiple of chunk_frames 64; take 1024"):
        ExtractParams.model_validate({**PARAMS.model_dump(), "chunk_frames": 64, "shard_frames": 1000})


def test_a_manifest_of_another_wave_store_is_refused(tiny_corpus):
    from dataclasses import replace

    longer = Manifest(tuple(replace(u, samples=u.samples + 320) for u in tiny_corpus.manifest))
    with pytest.raises(StoreError, match=r"tiny/000 has 400 samples in .*the manifest says 720"):
        run(Shifting(), tiny_corpus, manifest=longer)


def test_group_norm_does_not_see_the_padding():
    torch.manual_seed(0)
    reference = torch.nn.GroupNorm(6, 6)
    torch.nn.init.normal_(reference.weight)
    norm = LengthMaskedGroupNorm(6)
    norm.load_state_dict(reference.state_dict())
    waves = [torch.randn(1, 6, n) * (n / 50) + 3 for n in (50, 80, 31)]
    padded = torch.zeros(3, 6, 80)
    for row, wave in zip(padded, waves, strict=True):
        row[:, : wave.shape[2]] = wave[0]
    norm.valid = torch.tensor([50, 80, 31])
    out = norm(padded)
    for row, wave in zip(out, waves, strict=True):
        torch.testing.assert_close(row[:, : wave.shape[2]], reference(wave)[0], rtol=0, atol=2e-6)
    norm.valid = None
    torch.testing.assert_close(norm(waves[1]), reference(waves[1]), rtol=0, atol=0)


def test_a_log_mel_frame_lies_on_the_models_grid(logmel):
    wave = torch.zeros(1, 16_000)
    silent = logmel.layers(wave, torch.tensor([16_000]))[0]
    wave[0, 320 * 5 + 200] = 1.0  # the middle of frame 5, and outside the 400 samples of 4 and 6 but for their edges
    heard = logmel.layers(wave, torch.tensor([16_000]))[0] - silent
    assert heard.shape[1] == 49
    assert heard[0].sum(1).argmax() == 5
    assert (heard[0, :5].abs().sum(), heard[0, 6:].abs().sum()) == (0, 0)


STOP_AFTER_TWO_COMMITS = """
import signal, sys
from cache.journal import Journal
from stages.extract import app
append = Journal.append
def stopping(self, *row):
    append(self, *row)
    if len(self.rows) == 2:
        print("two", flush=True)
        signal.alarm(300)  # not for ever, should the test itself be killed
        signal.pause()  # its writing ahead goes on, and no machine is so fast that it ends
Journal.append = stopping
app(sys.argv[1:])
"""


def test_kill_9_during_extraction_is_made_good_by_the_same_command(tiny_corpus, tmp_path, monkeypatch):
    params = {"extract": {**PARAMS.model_dump(), "shard_frames": 96}, "keep": {"layers": "all", "select": "all"}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "logmel.json").write_text('{"model": "log-mel", "num_mels": 20, "floor": 1e-6}')

    def command(out):
        return [
            *("tiny", "--keep", "keep", "--params", str(tmp_path / "params.yaml"), "--out", str(tmp_path / out)),
            *("--model", str(tmp_path / "logmel.json"), "--manifest", str(tiny_corpus.manifest_path)),
            *("--waves", str(tiny_corpus.waves_path)),
        ]

    def run_stage(out):
        CliRunner().invoke(app, command(out), catch_exceptions=False)

    for store in ("whole", "killed"):
        (tmp_path / store).mkdir()
        (tmp_path / store / "waves").symlink_to(tiny_corpus.root / "store" / "waves")
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "whole"))
    run_stage("whole.json")
    killed = tmp_path / "killed"
    monkeypatch.setenv("DECANT_STORE", str(killed))
    child = subprocess.Popen(
        [sys.executable, "-c", STOP_AFTER_TWO_COMMITS, *command("killed.json")], stdout=subprocess.PIPE, text=True
    )
    told = child.stdout.readline()
    child.send_signal(signal.SIGKILL)
    assert (told, child.wait()) == ("two\n", -signal.SIGKILL)
    child.stdout.close()
    assert not (tmp_path / "killed.json").exists()
    journal = next(killed.glob("features/*/journal.jsonl"))
    committed = journal.read_text().splitlines()
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in shards(killed, committed)}
    assert len(before) == 2
    run_stage("killed.json")
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    after = journal.read_text().splitlines()
    assert after[:2] == committed  # no shard was committed twice, and what was committed was not made again
    assert len({(row["array"], row["shard"]) for row in map(json.loads, after)}) == len(after)
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in before} == before


def shards(store, journal):
    rows = map(json.loads, journal)
    return [next(store.glob(f"features/*/{row['array']}/c/{row['shard']}/0")) for row in rows]
