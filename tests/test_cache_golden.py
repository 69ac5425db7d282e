"""The golden store of format 1 is read for ever: by our reader, by zarr, by tensorstore, and from the format's page alone.

It was made once with `python -m tests.golden.make_store_v1` and is never made anew. What it holds is written down here
as a formula of utterance, frame and channel.
"""

import struct
import subprocess
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import xxhash
import zarr

from cache.frames import FrameSpan
from cache.header import FORMAT
from cache.publish import read_json
from cache.receipts import open_receipt
from tests.golden.make_store_v1 import make

GOLDEN = Path(__file__).parent / "golden" / "store-v1"
FRAMES = [5, 30, 40, 1, 20]
STARTS = [0, 5, 64, 104, 105]  # 35 rows in shard 0; 40 more would end at 75, past 64
SAMPLES = [400, 2_000, 3_000]
WAVE_STARTS = [0, 400, 4_096]
SPECIAL = "0080 ff7b 0100 007c 00fc 007e"  # -0, the largest, the smallest, two infinities, NaN: bits of float16
LAYERS = {"layer-00": 0, "layer-04": 4}


def value(layer: int, utterance: int, frame: int, channel: int) -> float:
    return ((37 * utterance + 11 * frame + 5 * channel + 101 * layer) % 2039 - 1019) / 16


def expected_rows(layer: int, utterance: int) -> bytes:
    """The bytes of one utterance: little-endian float16, a frame after the other."""
    if utterance == 3:
        return bytes.fromhex(SPECIAL)
    values = [value(layer, utterance, t, c) for t in range(FRAMES[utterance]) for c in range(6)]
    return struct.pack(f"<{len(values)}e", *values)


def expected_wave(utterance: int) -> list[int]:
    return [(7_919 * utterance + 104_729 * s) % 65_536 - 32_768 for s in range(SAMPLES[utterance])]


@pytest.fixture(autouse=True)
def store_here(monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(GOLDEN))


def folder(kind: str) -> Path:
    return GOLDEN / kind / read_json(GOLDEN / "receipts" / f"{kind}.json")["key"]


@pytest.mark.parametrize("verify", [False, True])
def test_our_reader_reads_the_golden_store_through_its_receipts(verify):
    store = open_receipt(GOLDEN / "receipts" / "features.json", verify)
    assert store.ids == [f"golden/{u} é" for u in range(5)]
    assert store.rows.tolist() == FRAMES
    assert store.plan.start.tolist() == STARTS
    for name, layer in LAYERS.items():
        for u in range(5):
            assert store.read(name, u).tobytes() == expected_rows(layer, u)
        cut = store.read(name, "golden/2 é", FrameSpan(6, 29))  # from inside a chunk to inside another
        assert cut.tobytes() == expected_rows(layer, 2)[12 * 6 : 12 * 35]
    out, counts = store.read_batch([4, 1], ["layer-04", "layer-00"])
    assert counts.tolist() == [20, 30]
    assert out[1, 0].tobytes() == expected_rows(4, 1)
    assert out[0, 1].tobytes() == expected_rows(0, 4) + bytes(12 * 10)
    waves = open_receipt(GOLDEN / "receipts" / "waves.json", verify)
    assert [waves.read("wave", u).tolist() for u in range(3)] == [expected_wave(u) for u in range(3)]


def through_zarr(kind: str, array: str) -> np.ndarray:
    return zarr.open_group(folder(kind), mode="r")[array][:]


def through_tensorstore(kind: str, array: str) -> np.ndarray:
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(folder(kind) / array)}}
    return tensorstore.open(spec).result().read().result()


@pytest.mark.parametrize("read", [through_zarr, through_tensorstore])
def test_foreign_readers_read_the_golden_store(read):
    assert read("features", "start").tolist() == STARTS
    assert read("features", "rows").tolist() == FRAMES
    assert read("features", "ids").tobytes() == "".join(f"golden/{u} é" for u in range(5)).encode()
    assert read("features", "id_end").tolist() == [11, 22, 33, 44, 55]
    for name, layer in LAYERS.items():
        rows = read("features", name)
        assert (rows.dtype, rows.shape) == (np.float16, (125, 6))
        for u, (start, count) in enumerate(zip(STARTS, FRAMES, strict=True)):
            assert rows[start : start + count].tobytes() == expected_rows(layer, u)
        assert np.isnan(rows[35:64]).all()  # nobody's
    wave = read("waves", "wave")
    for u, start in enumerate(WAVE_STARTS):
        assert wave[start : start + SAMPLES[u]].tolist() == expected_wave(u)


def crc32c(data: bytes) -> int:
    """CRC-32C, Castagnoli's polynomial reflected, a bit at a time."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def test_the_page_of_the_format_is_enough_to_read_it():
    assert crc32c(b"123456789") == 0xE3069283  # the check value of the CRC catalogue
    store, width, chunk, shard = folder("features"), 6, 8, 64
    for name, layer in LAYERS.items():
        for u, (start, count) in enumerate(zip(STARTS, FRAMES, strict=True)):
            data = (store / name / "c" / str(start // shard) / "0").read_bytes()
            index, check = data[-4 - 16 * shard // chunk : -4], data[-4:]
            assert struct.unpack("<I", check)[0] == crc32c(index)
            got = b""
            for row in range(start % shard, start % shard + count):
                at, size = struct.unpack_from("<QQ", index, 16 * (row // chunk))
                assert (at, size) == (row // chunk * (chunk * width * 2 + 4), chunk * width * 2 + 4)
                assert struct.unpack("<I", data[at + size - 4 : at + size])[0] == crc32c(data[at : at + size - 4])
                got += data[at + row % chunk * width * 2 :][: width * 2]
            assert got == expected_rows(layer, u)


@pytest.mark.parametrize("kind", ["features", "waves"])
def test_the_receipts_name_every_shard_with_its_size_and_hash(kind):
    receipt = read_json(GOLDEN / "receipts" / f"{kind}.json")
    for name, array in receipt["arrays"].items():
        files = sorted(p for p in (folder(kind) / name / "c").rglob("*") if p.is_file())
        assert array["shards"] == [[p.stat().st_size, xxhash.xxh3_128_hexdigest(p.read_bytes())] for p in files]
    assert receipt["rows"] == sum(FRAMES if kind == "features" else SAMPLES)


@pytest.mark.skipif(FORMAT != 1, reason="the writer writes a newer format; the golden store is only read")
def test_the_writer_still_makes_the_same_bytes(tmp_path):
    make(tmp_path)
    made = {p.relative_to(tmp_path).as_posix(): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    kept = {p.relative_to(GOLDEN).as_posix(): p.read_bytes() for p in GOLDEN.rglob("*") if p.is_file()}
    assert sorted(made) == sorted(kept)
    assert [name for name in kept if kept[name] != made[name]] == []
    assert sum(map(len, kept.values())) < 60_000


def test_git_hides_no_file_of_the_golden_store():
    files = [str(p) for p in GOLDEN.rglob("*") if p.is_file()]
    try:
        ignored = subprocess.run(
            ["git", "check-ignore", "--no-index", *files], capture_output=True, text=True, cwd=GOLDEN
        )
    except FileNotFoundError:
        pytest.skip("git is not installed")
    if ignored.returncode == 128:
        pytest.skip("not a git checkout")
    assert ignored.stdout == ""
