"""Stores in every codec: extraction, other readers, damage to the tables, and what hangs on them."""

import os
import shutil
import signal

import numpy as np
import pytest
import tensorstore
import torch
import zarr

from cache import codecs
from cache.codecs import CODECS, FEATURE_CODECS
from cache.errors import DataError, SettingsError, StoreError
from cache.receipts import make_receipt, open_receipt
from cache.repair import repair_store
from cache.verify import verify_store
from pipeline import extract as extraction
from pipeline.codecs import Decoder
from pipeline.extract import extract
from pipeline.extraction.settings import Calibration, ExtractParams, Fail, Keep
from pipeline.tasks.features import pool
from pipeline.upstream import LayersAlone
from tests.conftest import make_tiny_corpus

WIDTH, LAYERS = 20, 2
BOUNDS = {"float32": 0, "float16": 3e-4, "bfloat16": 3e-3, "int8": 1.5e-2, "mvq8": 0.5, "mvq16": 0.4, "mvq32": 0.3}


class Projecting(LayersAlone):
    """A model whose layer i is a fixed random projection of each frame's magnitudes: cheap, and full of structure."""

    num_layers, width = LAYERS, WIDTH

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.weights = [torch.randn(201, WIDTH, generator=generator) for _ in range(LAYERS)]

    def describe(self):
        return {"kind": "projecting", "digest": "0"}

    def layers(self, waves, samples):
        spectrum = torch.fft.rfft(waves.unfold(1, 400, 320)).abs().log1p()
        return [(spectrum @ w).tanh() * 3 + i for i, w in enumerate(self.weights)]


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """26 s, so that codebooks can be fitted."""
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    return make_tiny_corpus(tmp_path, [32_000, 48_000, 720, 64_000, 40_000, 16_000, 80_000, 56_000, 24_000, 60_000])


def run(corpus, codec, layers="all", seconds=60, model=None, tick=lambda *_, **__: None):
    params = ExtractParams(
        version=1,
        codec=codec,
        chunk_frames=16,
        shard_frames=512,
        batch_seconds=9.0,
        long=Fail(kind="fail", max_sec=60.0),
        calibration=Calibration(seconds=seconds, seed=0),
    )
    keep = Keep(layers=layers, select="all")
    return extract(model or Projecting(), corpus.manifest, corpus.waves, params, keep, "cpu", tick)


def frames_of(receipt, layer="layer-01"):
    store = open_receipt(receipt, verify=True)
    rows = np.concatenate([store.read(layer, u) for u in range(len(store.rows))])
    return codecs.decode(rows, CODECS[store.codec], store.tables(layer))


@pytest.mark.parametrize("codec", FEATURE_CODECS)
def test_extraction_keeps_frames_within_what_the_codec_promises(corpus, codec):
    exact, kept = frames_of(run(corpus, "float32")), frames_of(run(corpus, codec))
    assert np.linalg.norm(kept - exact) <= BOUNDS[codec] * np.linalg.norm(exact)


@pytest.mark.parametrize("codec", ["bfloat16", "int8", "mvq8"])
def test_zarr_and_tensorstore_read_rows_and_tables(corpus, codec):
    store = open_receipt(receipt := run(corpus, codec))
    names = ["layer-01", *(f"layer-01.{table}" for table in CODECS[codec].tables)]
    for name in names:
        by_zarr = zarr.open_array(store.directory / name, mode="r")[:]
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.directory / name)}}
        np.testing.assert_array_equal(by_zarr, tensorstore.open(spec).result().read().result())
        if name != "layer-01":
            np.testing.assert_array_equal(by_zarr, store.tables("layer-01")[name.partition(".")[2]])
            continue
        for u, start in enumerate(store.plan.start.tolist()):
            np.testing.assert_array_equal(by_zarr[start : start + store.rows[u]], store.read(name, u))
    assert set(receipt["arrays"]["layer-01"].get("tables", {})) == set(CODECS[codec].tables)


def die_after(shards):
    """A progress callback that sends SIGKILL to this process once so many shards are committed."""
    done = []

    def tick(amount, found=False):
        if not found:
            done.append(amount)
        if len(done) == shards:
            os.kill(os.getpid(), signal.SIGKILL)

    return tick


@pytest.mark.parametrize("codec", ["int8", "mvq8"])
def test_a_killed_extraction_ends_in_the_same_bytes_and_fits_nothing_twice(corpus, codec, monkeypatch):
    whole = run(corpus, codec)
    directory = open_receipt(whole).directory
    shutil.rmtree(directory)
    for committed in (1, 2):
        if (pid := os.fork()) == 0:
            try:
                torch.set_num_threads(1)  # the threads of its pool were not forked, and it would wait for them
                run(corpus, codec, tick=die_after(committed))
            finally:
                os._exit(1)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    monkeypatch.setattr(extraction, "fit_tables", lambda *_: pytest.fail("fitted again"))
    assert run(corpus, codec) == whole


def test_a_layer_asked_for_later_is_fitted_alone_and_the_sample_is_part_of_the_key(corpus):
    first = run(corpus, "int8", layers=(0,))
    both = run(corpus, "int8", layers=(0, 1))
    assert both["key"] == first["key"]
    assert both["arrays"]["layer-00"] == first["arrays"]["layer-00"]
    assert both == run(corpus, "int8")
    assert run(corpus, "int8", seconds=5)["key"] != both["key"]
    assert run(corpus, "float16", seconds=5)["key"] == run(corpus, "float16")["key"]


@pytest.mark.parametrize("harm", ["flipped", "cut", "deleted", "swapped", "metadata"])
@pytest.mark.parametrize("codec", ["int8", "mvq8"])
def test_a_damaged_table_is_found_before_a_number_is_returned_and_only_its_layer_is_made_again(corpus, codec, harm):
    receipt = run(corpus, codec)
    directory = open_receipt(receipt).directory
    table = directory / "layer-01.std" / "c" / "0"
    data = bytearray(table.read_bytes())
    if harm == "flipped":
        data[7] ^= 16
        table.write_bytes(data)
    elif harm == "cut":
        table.write_bytes(data[:-5])
    elif harm == "deleted":
        table.unlink()
    elif harm == "swapped":  # sound in itself
        table.write_bytes((directory / "layer-00.std" / "c" / "0").read_bytes())
    else:
        meta = directory / "layer-01.std" / "zarr.json"
        meta.write_text(meta.read_text().replace("float32", "float64"))
    with pytest.raises(StoreError, match=r"layer-01\.std"):
        frames_of(receipt)
    found = verify_store(directory).damage
    assert [f.kind for f in found] == ["table"]
    assert "layer-01.std" in found[0].place
    untouched = {p: p.stat().st_mtime_ns for p in directory.glob("layer-00/c/*/0")}
    _, repaired = repair_store(directory)
    there = len(CODECS[codec].tables) - (harm == "deleted")
    assert len(repaired.dropped) == len(receipt["arrays"]["layer-01"]["shards"]) + there
    assert not [path for path in directory.glob("layer-01*/c/**/0") if path.is_file()]
    assert run(corpus, codec) == receipt
    assert {p: p.stat().st_mtime_ns for p in directory.glob("layer-00/c/*/0")} == untouched
    assert not verify_store(directory, full=True).findings


def test_extraction_itself_replaces_a_layer_whose_table_is_lost(corpus):
    receipt = run(corpus, "int8")
    directory = open_receipt(receipt).directory
    (directory / "layer-01.mean" / "c" / "0").unlink()
    with pytest.raises(StoreError, match="cannot be decoded without it"):
        make_receipt(directory, ["layer-01"])
    assert run(corpus, "int8") == receipt


def test_probes_pool_decoded_frames(corpus):
    ids = [u.id for u in corpus.manifest]
    means = {}
    for codec in ("float32", "int8"):
        store = open_receipt(run(corpus, codec))
        means[codec] = pool(store, ["layer-00", "layer-01"], corpus.manifest, ids, normalise_layers=True).means
        decoded = Decoder(store, ["layer-01"], "cpu")(torch.from_numpy(store.read_batch([3], ["layer-01"])[0]))
        by_hand = torch.nn.functional.layer_norm(decoded[0, 0], (WIDTH,)).mean(0)
        torch.testing.assert_close(means[codec][3, 1], by_hand)
    assert 0 < float((means["int8"] - means["float32"]).abs().max()) < 0.02


def test_values_that_the_codec_cannot_hold_and_samples_that_are_too_small_are_named(corpus):
    class Overflowing(Projecting):
        def describe(self):
            return {"kind": "overflowing"}

        def layers(self, waves, samples):
            return [layer * 1e6 for layer in super().layers(waves, samples)]

    with pytest.raises(DataError, match=r"tiny/\d+: layer-00 has values that are not finite in float16"):
        run(corpus, "float16", model=Overflowing())
    run(corpus, "int8", model=Overflowing())  # its scale is relative to the channels
    with pytest.raises(SettingsError, match="too few to fit mvq8"):
        run(corpus, "mvq8", seconds=0.1)
