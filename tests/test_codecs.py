"""Codecs: what a row means, in numpy, in torch and worked out by hand; and within which bound it comes back."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cache import codecs
from cache.codecs import CODECS, CODEWORDS, FEATURE_CODECS
from cache.errors import DataError, SettingsError
from cache.frames import FrameSpan
from cache.ragged import Store
from cache.receipts import make_receipt, open_receipt, store_key, store_path
from cache.writer import open_writer
from pipeline import codecs as on_device
from pipeline.calibrate import fit_tables

pytestmark = pytest.mark.usefixtures("store_here")

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_CUDA])]


def speechlike(frames, width, seed=0):
    """Features as trained models have them: a falling spectrum, and channels far larger than the rest."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(width, width)) * (1 + np.arange(width)[:, None]) ** -0.7
    features = rng.normal(size=(frames, width)) @ mixing
    features[:, width // 2] = 40 + 30 * features[:, width // 2]
    return features.astype(np.float32)


def tables_of(codec, width, seed=0):
    """Tables of the right shapes, of any numbers."""
    rng = np.random.default_rng(seed)
    tables = {
        "mean": rng.normal(size=width).astype(np.float32),
        "std": rng.uniform(0.1, 3, width).astype(np.float32),
    }
    if codec.codebooks:
        books = rng.normal(size=codec.table_shape("codebooks", width)).astype(np.float32)
        tables["codebooks"] = books * (0.6 ** np.arange(codec.codebooks, dtype=np.float32))[:, None, None]
    return {name: tables[name] for name in codec.tables}


def bound(frames, rows, codec, tables):
    """Largest error that the codec's definition allows, for each number."""
    if codec.name == "float32":
        return np.zeros_like(frames)
    if codec.name == "float16":
        return np.maximum(np.abs(frames) * 2.0**-11, 2.0**-25)
    if codec.name == "bfloat16":
        return np.abs(frames) * 2.0**-8
    assert codec.name == "int8"
    scale = rows[..., -2:].copy().view("<f2").astype(np.float64)
    return tables["std"] * scale / 2 + 1e-5 * (np.abs(frames) + np.abs(tables["mean"]))


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(FEATURE_CODECS),
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    width=st.integers(1, 24),
    chunk=st.sampled_from([1, 7, 16]),
    verify=st.booleans(),
    data=st.data(),
)
def test_any_corpus_in_any_codec_comes_back_within_its_bound(tmp_path_factory, name, rows, width, chunk, verify, data):
    codec = CODECS[name]
    place = store_path("features", store_key("features", {"at": str(tmp_path_factory.mktemp("any"))}))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    size = 10.0 ** data.draw(st.integers(-6, 4))
    frames = [(rng.normal(size=(r, width)) * size).astype(np.float32) for r in rows]
    tables = tables_of(codec, width)
    header = {"kind": "features", "key": place.name, "fingerprint": {"at": place.name}, "codec": name, "width": width}
    header |= {"chunk_rows": chunk, "shard_rows": chunk * -(-max(rows) // chunk)}
    with open_writer(place, header, [f"u{u}" for u in range(len(rows))], np.array(rows), ["layer-00"]) as writer:
        if codec.tables:
            assert writer.tables("layer-00") is None
            writer.write_tables("layer-00", tables)
        for shard in writer.missing():
            encoded = [codecs.encode(frames[u], codec, tables) for u in writer.plan.utterances(shard)]
            writer.write("layer-00", shard, np.concatenate(encoded))
    store = Store(place, ["layer-00"], verify=verify)
    u = data.draw(st.integers(0, len(rows) - 1))
    begin = data.draw(st.integers(0, rows[u] - 1))
    span = FrameSpan(begin, data.draw(st.integers(1, rows[u] - begin)))
    stored = store.read("layer-00", u, span)
    wanted = frames[u][span.rows]
    got = codecs.decode(stored, codec, store.tables("layer-00"))
    assert got.dtype == np.float32
    assert got.shape == wanted.shape
    np.testing.assert_array_equal(stored, codecs.encode(frames[u], codec, tables)[span.rows])
    if codec.codebooks:
        chosen = sum(tables["codebooks"][m][stored[:, m]].astype(np.float64) for m in range(codec.codebooks))
        np.testing.assert_allclose(got, chosen * tables["std"] + tables["mean"], rtol=1e-4, atol=1e-4)
    else:
        assert (np.abs(got.astype(np.float64) - wanted) <= bound(wanted, stored, codec, tables)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FEATURE_CODECS)
def test_torch_makes_the_rows_and_the_frames_of_the_numpy_reference(name, device):
    codec, frames = CODECS[name], speechlike(300, 24)
    frames[7] = 0
    frames[8] = 1e-7 * frames[9]
    frames[9] *= 3000
    tables = tables_of(codec, 24)
    held = on_device.to_device(tables, device)
    rows = on_device.encode(torch.from_numpy(frames).to(device), codec, held).cpu().numpy()
    reference = codecs.encode(frames, codec, tables)
    assert rows.dtype == reference.dtype == codec.dtype
    assert rows.shape == reference.shape == (300, codec.row_width(24))
    if codec.codebooks:  # two entries may be equally near up to rounding
        assert (rows == reference).mean() > 0.99
    else:
        np.testing.assert_array_equal(rows, reference)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", FEATURE_CODECS)
def test_the_decoder_brings_several_layers_of_a_batch_to_the_device(name, device):
    codec, width, layers = CODECS[name], 12, ["layer-00", "layer-03"]
    place = store_path("features", store_key("features", {}))
    header = {"kind": "features", "key": place.name, "fingerprint": {}, "codec": name, "width": width}
    header |= {"chunk_rows": 8, "shard_rows": 64}
    lengths = np.array([20, 5, 30])
    frames = {layer: speechlike(55, width, seed) for seed, layer in enumerate(layers)}
    with open_writer(place, header, ["a", "b", "c"], lengths, layers) as writer:
        for seed, layer in enumerate(layers):
            tables = tables_of(codec, width, seed)
            if codec.tables:
                writer.write_tables(layer, tables)
            writer.write(layer, 0, codecs.encode(frames[layer], codec, tables))
    store = open_receipt(make_receipt(place, layers))
    rows, counts = store.read_batch([2, 0], layers)
    decoded = on_device.Decoder(store, layers, device)(torch.from_numpy(rows).to(device)).cpu().numpy()
    assert decoded.shape == (2, 2, 30, width)
    for n, layer in enumerate(layers):
        for b, (u, count) in enumerate(zip([2, 0], counts, strict=True)):
            want = codecs.decode(store.read(layer, u), codec, tables_of(codec, width, n))
            np.testing.assert_allclose(decoded[b, n, :count], want, rtol=1e-5, atol=1e-5)


def test_an_int8_row_worked_out_by_hand():
    tables = {"mean": np.array([1, 0, 0, -2], dtype=np.float32), "std": np.array([1, 2, 1, 0.5], dtype=np.float32)}
    frame = np.array([[128.0, -2.0, 0.5, -2.0]], dtype=np.float32)  # standardised: 127, -1, 0.5, 0
    row = codecs.encode(frame, CODECS["int8"], tables)
    assert row.tobytes() == struct.pack("<4be", 127, -1, 0, 0, 1.0)  # a half rounds to even
    np.testing.assert_array_equal(codecs.decode(row, CODECS["int8"], tables), [[128, -2, 0, -2]])


def test_bfloat16_rounds_to_even_and_keeps_infinities_and_nan():
    bits = np.array([0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x7F80_0000, 0xFF80_0000, 0x7FFF_FFFF, 0x7F80_0001])
    frames = bits.astype(np.uint32).view(np.float32)[None]
    row = codecs.encode(frames, CODECS["bfloat16"], {})
    assert row[0, :5].tolist() == [0x3F80, 0x3F82, 0x3F81, 0x7F80, 0xFF80]
    assert np.isnan(codecs.decode(row, CODECS["bfloat16"], {})[0, 5:]).all()
    torch_row = on_device.encode(torch.from_numpy(frames[:, :5].copy()), CODECS["bfloat16"], {})
    assert torch_row.numpy().tolist() == row[:, :5].tolist()


@pytest.mark.parametrize("name", ["mvq8", "mvq32"])
def test_no_other_entry_of_one_codebook_brings_a_frame_nearer(name):
    """Where choosing has settled; MAX_SWEEPS leaves a few frames unsettled."""
    codec, frames = CODECS[name], speechlike(200, 16)
    tables = fit_tables(torch.from_numpy(speechlike(2_000, 16, seed=1)), codec, seed=0)
    rows = codecs.encode(frames, codec, tables)
    standard = (frames - tables["mean"]) / tables["std"]
    books = tables["codebooks"].astype(np.float64)
    total = sum(books[m][rows[:, m]] for m in range(codec.codebooks))
    error = np.square(standard - total).sum(-1)
    settled = np.ones(len(frames), dtype=bool)
    for m in range(codec.codebooks):
        others = standard - total + books[m][rows[:, m]]  # (F, D)
        least = np.square(others[:, None] - books[m]).sum(-1).min(-1)
        settled &= error <= least + 1e-5
    assert settled.mean() > 0.9


def test_more_codebooks_lose_less_and_fitted_ones_less_than_drawn_frames():
    sample, held_out = torch.from_numpy(speechlike(4_000, 16)), speechlike(500, 16, seed=2)
    held_out = speechlike(4_500, 16)[4_000:]
    standard = (held_out - sample.numpy().mean(0)) / sample.numpy().std(0)
    errors = {}
    for name in ("mvq8", "mvq16", "mvq32"):
        codec = CODECS[name]
        tables = fit_tables(sample, codec, seed=0)
        back = codecs.decode(codecs.encode(held_out, codec, tables), codec, tables)
        errors[name] = np.square((back - held_out) / tables["std"]).mean()
    assert errors["mvq32"] < errors["mvq16"] < errors["mvq8"] < 0.5 * np.square(standard).mean()
    drawn = dict(fit_tables(sample, CODECS["mvq8"], seed=0))
    rng = np.random.default_rng(0)
    picked = ((sample.numpy() - drawn["mean"]) / drawn["std"])[rng.integers(0, 4_000, (8, CODEWORDS))]
    drawn["codebooks"] = (picked / 8).astype(np.float32)
    back = codecs.decode(codecs.encode(held_out, CODECS["mvq8"], drawn), CODECS["mvq8"], drawn)
    assert errors["mvq8"] < 0.7 * np.square((back - held_out) / drawn["std"]).mean()


def test_statistics_are_those_of_the_sample_and_a_silent_channel_does_not_decide_the_scale():
    sample = speechlike(2_000, 16)
    sample[:, 5] = 3
    tables = fit_tables(torch.from_numpy(sample), CODECS["int8"], seed=0)
    np.testing.assert_allclose(tables["mean"], sample.astype(np.float64).mean(0), rtol=1e-5, atol=1e-6)
    std = sample.astype(np.float64).std(0)
    np.testing.assert_allclose(np.delete(tables["std"], 5), np.delete(std, 5), rtol=1e-5)
    assert tables["std"][5] == pytest.approx(0.01 * np.sqrt(np.square(std).mean()), rel=1e-4)
    same = fit_tables(torch.from_numpy(np.full((10, 3), 2.0, np.float32)), CODECS["int8"], seed=0)
    np.testing.assert_array_equal(same["std"], 1)


def test_a_sample_that_cannot_be_fitted_is_refused():
    with pytest.raises(SettingsError, match=r"40 frames are too few to fit mvq8 to; raise extract.calibration.seconds"):
        fit_tables(torch.zeros(40, 4), CODECS["mvq8"], seed=0)
    with pytest.raises(DataError, match="not finite"):
        fit_tables(torch.full((40, 4), float("nan")), CODECS["int8"], seed=0)
    assert fit_tables(torch.zeros(0, 4), CODECS["float16"], seed=0) == {}


@pytest.mark.parametrize("name", FEATURE_CODECS)
def test_what_a_codec_cannot_hold_is_told_before_it_is_written(name):
    codec, tables = CODECS[name], tables_of(CODECS[name], 4)
    frames = np.ones((4, 4), dtype=np.float32)
    frames[1, 2], frames[2, 0], frames[3, 3] = np.nan, np.inf, 3e38
    rows = codecs.encode(frames, codec, tables)
    held = codecs.can_hold(frames, rows, codec).tolist()
    theirs = torch.from_numpy(frames)
    encoded = on_device.encode(theirs, codec, on_device.to_device(tables, "cpu"))
    assert on_device.can_hold(theirs, encoded, codec).tolist() == held
    assert held[:3] == [True, False, False]
    assert held[3] is (name not in ("float16", "int8"))
    if not codec.codebooks:
        with np.errstate(over="ignore", invalid="ignore"):
            back = codecs.decode(codecs.encode(frames, codec, tables), codec, tables)
        assert np.isfinite(back).all(-1).tolist() == held
