"""The golden stores of the codecs are read for ever: by our reader, and by hand from what docs/store-format.md says.

They were made once with `python -m tests.golden.make_store_v1_codecs` and are never made anew. What they hold is written
down here as formulas of utterance, frame and channel.
"""

import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from cache import codecs
from cache.codecs import CODECS
from cache.header import FORMAT
from cache.publish import read_json
from cache.receipts import open_receipt
from pipeline.codecs import Decoder
from tests.golden.make_store_v1_codecs import make

GOLDEN = Path(__file__).parent / "golden" / "store-v1-codecs"
FRAMES, WIDTH = [5, 30, 40], 6
SPREAD = [1, 2, 4, 1, 2, 4]


@pytest.fixture(autouse=True)
def store_here(monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(GOLDEN))


def value(utterance, frame, channel):
    return ((37 * utterance + 11 * frame + 5 * channel) % 2039 - 1019) / 16


def entry(book, number, channel):
    return ((31 * book + 17 * number + 13 * channel) % 255 - 127) / 2**book


def by_hand(codec, row):
    """A row's frame, worked out with Python's numbers."""
    if codec == "bfloat16":
        return list(struct.unpack("<6f", b"".join(b"\0\0" + row[2 * c : 2 * c + 2] for c in range(WIDTH))))
    if codec == "int8":
        *codes, scale = struct.unpack("<6be", row)
        return [c - 2 + SPREAD[c] * scale * codes[c] for c in range(WIDTH)]
    return [c - 2 + SPREAD[c] * sum(entry(m, k, c) for m, k in enumerate(row)) for c in range(WIDTH)]


@pytest.mark.parametrize("codec", ["bfloat16", "int8", "mvq8"])
def test_golden_rows_decode_to_the_frames_that_went_in(codec):
    store = open_receipt(GOLDEN / "receipts" / f"{codec}.json", verify=True)
    assert (store.codec, store.width, store.rows.tolist()) == (codec, WIDTH, FRAMES)
    tables = store.tables("layer-07")
    decode = Decoder(store, ["layer-07"], "cpu")
    for u, count in enumerate(FRAMES):
        rows = store.read("layer-07", u)
        want = np.array([by_hand(codec, row.tobytes()) for row in rows])
        np.testing.assert_allclose(codecs.decode(rows, CODECS[codec], tables), want, rtol=1e-6, atol=1e-5)
        np.testing.assert_allclose(decode(torch.from_numpy(rows.copy())[None, None])[0, 0], want, rtol=1e-6, atol=1e-5)
        if codec == "mvq8":
            t, m = np.mgrid[:count, :8]
            assert rows.tolist() == ((61 * u + 29 * t + 83 * m) % 256).tolist()
            continue
        frames = np.array([[value(u, t, c) for c in range(WIDTH)] for t in range(count)])
        bound = np.abs(frames) * 2**-8 if codec == "bfloat16" else np.array(SPREAD) * 0.26
        assert (np.abs(want - frames) <= bound).all()


@pytest.mark.skipif(FORMAT != 1, reason="the writer writes a newer format; the golden stores are only read")
def test_the_writer_still_makes_the_same_bytes(tmp_path):
    make(tmp_path)
    made = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    kept = {p.relative_to(GOLDEN).as_posix(): p.read_bytes() for p in GOLDEN.rglob("*") if p.is_file()}
    assert sorted(made) == sorted(kept)
    assert [name for name in kept if kept[name] != made[name]] == []
    assert sum(map(len, kept.values())) < 120_000


def test_the_receipts_name_the_tables():
    assert set(read_json(GOLDEN / "receipts" / "mvq8.json")["arrays"]["layer-07"]["tables"]) == {
        "mean",
        "std",
        "codebooks",
    }
    assert "tables" not in read_json(GOLDEN / "receipts" / "bfloat16.json")["arrays"]["layer-07"]
