"""Stores from elsewhere: a bomb, a forged shape or an endless file is one named error, in little memory and time.

Each attempt runs in a process of its own that may take 96 MB more than it has, and has five seconds.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cache.hdf5 import export_store
from cache.header import write_header
from cache.publish import digest_json, read_json, write_json
from cache.ragged import Store
from cache.receipts import make_receipt, open_receipt, store_key
from cache.zarrshard import CRC_BYTES, array_metadata, crc32c, shard_bytes, shard_path
from tests.cache_fixtures import LAYERS, ROWS, build
from tests.foreign_fixtures import (
    HEADROOM_BYTES,
    LAYER,
    all_ways,
    build_int8,
    capped,
    column,
    forge_column,
    forge_header,
    refused,
    swell,
    wrote,
)

pytestmark = pytest.mark.usefixtures("store_here")


@pytest.fixture
def place(tmp_path):
    place, _ = build()
    write_json(tmp_path / "hubert.json", make_receipt(place, LAYERS))
    return place


@pytest.fixture
def receipt(place, tmp_path):
    return tmp_path / "hubert.json"


def test_a_sound_store_is_read_under_the_same_cap(place, receipt, tmp_path):
    ways = all_ways(place, receipt, tmp_path)
    assert capped(*ways.values()) == ["read"] * len(ways)


def test_the_cap_is_one(place):
    assert "MemoryError" in capped(lambda: np.empty(2 * HEADROOM_BYTES, dtype=np.uint8))[0]


HUGE = [2**62, 2**40, 10**30]
WRONG = [-1, 0, True, 24.0, "24", [24], {}, 1e300, float("nan"), float("inf"), *HUGE]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("width", [*WRONG, None, 23, 25, 2**16]),
        ("chunk_rows", [*WRONG, None, 1, 15, 2**20]),
        ("shard_rows", [*WRONG, None, 255, 16, 2**34, 2**30]),
        ("codec", ["zstd", "int16", "float64", "object", 5, ["float16"], {"name": "blosc"}, None, "f" * 10**5]),
        ("kind", ["../../etc", "wave", 1, None, [], "waves"]),
        ("key", ["../../../tmp/x", "0" * 20, 7, None, {}, "k" * 10**5]),
        ("fingerprint", ["x", None, [], {"a": float("nan")}, {"\ud800": 1}, {"a": [[[[[0] * 100]] * 50]]}]),
        ("format", [True, "1", None, 0, 2, 1.0, [1]]),
    ],
)
def test_a_header_that_cannot_be_is_refused(place, receipt, tmp_path, field, values):
    whole = (place / "zarr.json").read_text()
    for value in values:
        forge_header(place, **{field: value})
        ways = all_ways(place, receipt, tmp_path)
        for told in capped(ways["open"], ways["verify"]):
            assert told.startswith("StoreError: "), (value, told)
            assert str(place) in told
            assert len(told) < 1000
        (place / "zarr.json").write_text(whole)


@pytest.mark.parametrize("name", ["zarr.json", f"{LAYER}/zarr.json"])
@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "5",
        "null",
        '"decant"',
        '{"attributes": []}',
        '{"attributes": {"decant": []}}',
        '{"attributes": {"decant": {"format": 1}}}',
        "[" * 100_000,
        "[" * 900 + "]" * 900,
        '{"attributes":' * 300 + "1" + "}" * 300,
        "1" * 5000,
        "[" + "{}," * 10**6 + "{}]",
        "\ufffe",
        "",
    ],
    ids=range(14),
)
def test_json_that_is_no_header_and_no_metadata_is_refused(place, receipt, tmp_path, name, text):
    (place / name).write_text(text, encoding="utf-8")
    refused(all_ways(place, receipt, tmp_path), str((place / name).parent))


def sparse(place: Path, name: str) -> None:
    swell(place / name, 2**40)


def pipe(place: Path, name: str) -> None:
    (place / name).unlink()
    os.mkfifo(place / name)


@pytest.mark.parametrize("make", [sparse, pipe])
@pytest.mark.parametrize(
    "name",
    [
        "zarr.json",
        f"{LAYER}/zarr.json",
        f"{LAYER}/c/1/0",
        "journal.jsonl",
        "rows/c/0",
        "ids/c/0",
        "id_end/c/0",
        "start/c/0",
    ],
)
def test_a_file_of_a_terabyte_or_without_an_end_is_refused(place, receipt, tmp_path, name, make):
    make(place, name)
    refused(all_ways(place, receipt, tmp_path), name.removesuffix("/c/0"))


def test_a_shard_of_a_terabyte_that_its_journal_vouches_for_is_refused(place, receipt, tmp_path):
    sparse(place, f"{LAYER}/c/1/0")
    lines = [json.loads(line) for line in (place / "journal.jsonl").read_text().splitlines()]
    described = read_json(receipt)
    for line in lines:
        if (line["array"], line["shard"]) == (LAYER, 1):
            line["bytes"] = 2**40
    (place / "journal.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shards = described["arrays"][LAYER]["shards"]
    described["bytes"] += 2**40 - shards[1][0]
    shards[1][0] = 2**40
    described["arrays"][LAYER]["digest"] = digest_json(shards)
    write_json(receipt, described)
    refused(all_ways(place, receipt, tmp_path), f"{LAYER}/c/1/0")


@pytest.mark.parametrize(
    "line",
    [
        '{"array": "layer-04", "shard": 1, "bytes": 5, "xxh3": NaN}',
        '{"array": "layer-04", "shard": [1], "bytes": 5, "xxh3": "x"}',
        '{"array": "layer-04", "shard": 1, "bytes": {"a": "b"}, "xxh3": "x"}',
        "[" * 100_000,
        "1" * 5000,
        "5",
        "\xff",
    ],
    ids=range(7),
)
def test_a_line_of_the_journal_that_is_none_is_refused(place, receipt, tmp_path, line):
    with open(place / "journal.jsonl", "a", encoding="latin1") as file:
        file.write(line + "\n")
    refused(all_ways(place, receipt, tmp_path), "journal.jsonl")


def test_what_a_codec_was_fitted_with_is_refused_if_it_is_a_terabyte_or_another_shape(tmp_path):
    place = build_int8()
    receipt = tmp_path / "int8.json"
    write_json(receipt, make_receipt(place, LAYERS))
    ways = all_ways(place, receipt, tmp_path)
    ways["tables"] = lambda: open_receipt(receipt).tables(LAYER)
    assert capped(*ways.values()) == ["read"] * len(ways)
    for name in ("mean", "std"):
        for file, size in ((f"{LAYER}.{name}/c/0", 2**40), (f"{LAYER}.{name}/c/0", 50)):
            whole = (place / file).read_bytes()
            swell(place / file, size)
            refused(ways, f"{LAYER}.{name}")
            (place / file).write_bytes(whole)
    metadata = read_json(place / f"{LAYER}.mean" / "zarr.json")
    wrote(place / f"{LAYER}.mean" / "zarr.json", {**metadata, "codecs": [{"name": "zstd"}], "fill_value": float("nan")})
    refused({"verify": ways["verify"], "tables": ways["tables"]}, f"{LAYER}.mean")


@pytest.mark.parametrize(
    "rows",
    [
        [2**60] * 10,
        [2**57] * 8 + [1, 1],
        [-5, *ROWS[1:]],
        [0, *ROWS[1:]],
        [257, *ROWS[1:]],
        [1, -(2**63), *ROWS[2:]],
        [],
        [1],
    ],
)
def test_rows_that_cannot_be_are_refused(place, receipt, tmp_path, rows):
    forge_column(place, "rows", np.array(rows, dtype=np.int64))
    refused(all_ways(place, receipt, tmp_path), f"{place / 'rows'}" if len(rows) == len(ROWS) else str(place))


def test_columns_that_agree_on_half_a_billion_utterances_are_refused(place, receipt, tmp_path):
    for name in ("rows", "start", "id_end"):
        swell(place / name / "c" / "0", 8 * 2**29 + CRC_BYTES)
    refused(all_ways(place, receipt, tmp_path), "rows", "memory")


def test_one_utterance_of_sixty_gigabytes_is_refused_when_it_is_read(place, tmp_path):
    """Header, column, journal and a sparse shard agree; there is only no memory for it."""
    shutil.rmtree(place)
    header = {"kind": "features", "key": place.name, "fingerprint": {"model": "long"}, "codec": "float16", "width": 24}
    header |= {"key": store_key("features", {"model": "long"}), "chunk_rows": 2**10, "shard_rows": 2**30}
    place = place.with_name(header["key"])
    write_header(place, header, ["long"], np.array([2**30], dtype=np.int64))
    store = Store(place)
    spec = store.spec(LAYER)
    (place / LAYER).mkdir()
    write_json(place / LAYER / "zarr.json", array_metadata(spec, store.grid, 2**30))
    size = shard_bytes(2**30, spec, store.grid)
    stride = 2**10 * spec.row_bytes + CRC_BYTES
    index = np.stack([np.arange(2**20) * stride, np.full(2**20, stride)], axis=1).astype("<u8").tobytes()
    path = shard_path(place, spec, 0)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")
    swell(path, size - len(index) - CRC_BYTES)
    with open(path, "ab") as file:
        file.write(index + crc32c(index))
    line = {"array": LAYER, "shard": 0, "bytes": size, "xxh3": "0" * 32}
    (place / "journal.jsonl").write_text(json.dumps(line) + "\n")
    write_json(tmp_path / "long.json", make_receipt(place, [LAYER]))
    refused(lambda: open_receipt(tmp_path / "long.json").read(LAYER, 0), "51.5 GB", "memory")
    refused(lambda: open_receipt(tmp_path / "long.json").read_batch([0], [LAYER]), "51.5 GB", "memory")
    refused(lambda: export_store(place, tmp_path / "out.h5"), LAYER, "memory")


def test_ids_that_are_no_ids_are_refused(place, receipt, tmp_path):
    ends, text = column(place, "id_end"), column(place, "ids", "u1")
    down, beyond, early = ends.copy(), ends.copy(), ends.copy()
    down[3], beyond[-1], early[0] = 1, 2**40, -1
    first = text.copy()
    first[4] = 0xFF
    twice = text.copy()
    twice[ends[4] : ends[5]] = twice[ends[3] : ends[4]]
    for name, values in [("id_end", down), ("id_end", beyond), ("id_end", early), ("ids", first), ("ids", twice)]:
        whole = (place / name / "c" / "0").read_bytes()
        forge_column(place, name, values)
        refused(all_ways(place, receipt, tmp_path)["open to batch"], str(place / name))
        refused(all_ways(place, receipt, tmp_path)["verify"], str(place))
        (place / name / "c" / "0").write_bytes(whole)


def with_codecs(*codecs):
    def change(metadata):
        metadata["codecs"][0]["configuration"]["codecs"] = [
            {"name": "bytes", "configuration": {"endian": "little"}},
            *codecs,
        ]

    return change


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("codecs", with_codecs({"name": "zstd", "configuration": {"level": 22, "checksum": False}})),
        ("codecs", with_codecs({"name": "gzip", "configuration": {"level": 9}}, {"name": "crc32c"})),
        ("codecs", with_codecs({"name": "blosc", "configuration": {"cname": "lz4", "clevel": 9, "typesize": 2}})),
        ("codecs", lambda m: m.update(codecs=[{"name": "bytes"}, {"name": "zstd"}])),
        ("shape", lambda m: m.update(shape=[2**60, 24])),
        ("shape", lambda m: m.update(shape=[-1, 24])),
        ("chunk_grid", lambda m: m["chunk_grid"]["configuration"].update(chunk_shape=[2**60, 24])),
        ("data_type", lambda m: m.update(data_type="complex128")),
        ("storage_transformers", lambda m: m.update(storage_transformers=["x"])),
        ("fill_value", lambda m: m.update(fill_value=float("inf"))),
    ],
)
def test_an_array_that_declares_a_compression_or_another_shape_is_refused(place, receipt, tmp_path, key, change):
    metadata = read_json(place / LAYER / "zarr.json")
    change(metadata)
    wrote(place / LAYER / "zarr.json", metadata)
    refused(all_ways(place, receipt, tmp_path), f"{LAYER}/zarr.json", key)


@pytest.fixture
def bomb(place, receipt):
    """A real one: 256 MB of zeros that zarr-python made 8 kB of, where a layer was; journal and receipt vouch for it."""
    import zarr
    from zarr.codecs import ZstdCodec

    shutil.rmtree(place / LAYER)
    array = zarr.create_array(
        str(place / LAYER), shape=(2**17, 1024), chunks=(2**17, 1024), dtype="float16", compressors=[ZstdCodec(level=1)]
    )
    array[:] = np.zeros((), dtype=np.float16) + np.float16(1)
    file = place / LAYER / "c" / "0" / "0"
    size = file.stat().st_size
    assert size < 2**16
    journal = (place / "journal.jsonl").read_text().splitlines()
    kept = [line for line in journal if LAYER not in line]
    described = read_json(receipt)
    shards = described["arrays"][LAYER]["shards"]
    for shard in range(len(shards)):
        if shard:
            shutil.copytree(file.parent, file.parents[1] / str(shard))
        kept.append(json.dumps({"array": LAYER, "shard": shard, "bytes": size, "xxh3": "0" * 32}))
        shards[shard] = [size, "0" * 32]
    (place / "journal.jsonl").write_text("\n".join(kept) + "\n")
    described["arrays"][LAYER]["digest"] = digest_json(shards)
    described["bytes"] = sum(b for a in described["arrays"].values() for b, _ in a["shards"])
    write_json(receipt, described)
    return array


def test_a_zstd_bomb_is_refused(place, receipt, tmp_path, bomb):
    assert "MemoryError" in capped(lambda: bomb[:])[0]  # in other hands it goes off
    refused(all_ways(place, receipt, tmp_path), f"{LAYER}/zarr.json", "chunk_grid")
    store = Store(place)
    write_json(place / LAYER / "zarr.json", array_metadata(store.spec(LAYER), store.grid, store.plan.num_rows))
    refused(all_ways(place, receipt, tmp_path), f"{LAYER}/c/0/0")
    refused(lambda: Store(place).read(LAYER, 0), f"{LAYER}/c/0/0")


CLI = """
import resource, sys
from stages.__main__ import main
import cache.hdf5, cache.repair, cache.collect, rich.console
with open("/proc/self/statm") as file:
    held = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + int(sys.argv.pop(1)),) * 2)
main()
"""


def test_the_commands_refuse_a_bomb_with_exit_code_4_and_one_line(place, receipt, bomb, tmp_path):
    for command in (
        ["verify", "--full"],
        ["verify", "--receipts", str(receipt)],
        ["export", "--out", f"{tmp_path}/x.h5"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", CLI, str(HEADROOM_BYTES), "cache", command[0], place.name, *command[1:]],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        assert done.returncode == 4, (command, done.stderr)
        assert "Traceback" not in done.stderr
        assert "Memory" not in done.stderr
