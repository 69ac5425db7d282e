"""Stores and exports from elsewhere: a bomb, a forged shape or an endless file is one named error, in little memory and time.

Each attempt runs in a process of its own that may take 96 MB more than it has, and has five seconds.
"""

import json
import os
import resource
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import StoreError
from cache.hdf5 import export_store, import_store
from cache.header import write_header
from cache.publish import canonical_json, digest_json, read_json, write_json
from cache.ragged import Store
from cache.receipts import make_receipt, open_receipt, store_key, store_path
from cache.verify import verify_store
from cache.writer import open_writer
from cache.zarrshard import CRC_BYTES, array_metadata, crc32c, shard_bytes, shard_path
from tests.cache_fixtures import LAYERS, ROWS, build

HEADROOM_BYTES = 96 * 2**20
SECONDS = 5
LAYER = "layer-04"


@pytest.fixture(autouse=True)
def store_here(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))


@pytest.fixture
def place(tmp_path):
    place, _ = build()
    write_json(tmp_path / "hubert.json", make_receipt(place, LAYERS))
    return place


@pytest.fixture
def receipt(place, tmp_path):
    return tmp_path / "hubert.json"


def capped(*works, headroom=HEADROOM_BYTES) -> list[str]:
    """What each of `works` comes to in a child with little memory and time: "read", or "StoreError: ..." or another error."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        told = []
        try:
            with open("/proc/self/statm", encoding="ascii") as file:
                held = int(file.read().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + headroom, held + headroom))
            for work in works:
                told.append("read")
                try:
                    work()
                except Exception as error:  # whatever it is, it is told: only a StoreError may be
                    told[-1] = f"{type(error).__name__}: {error}"[:4000]
        finally:
            with os.fdopen(theirs, "w", errors="replace") as file:
                json.dump(told, file)
            os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as file:
        if not select.select([file], [], [], SECONDS)[0]:
            os.kill(pid, signal.SIGKILL)
        text = file.read()
    os.waitpid(pid, 0)
    assert text, "still running after 5 seconds, or killed"
    return json.loads(text)


def refused(works, *names: str) -> None:
    """Each ends in a StoreError of one line that names all of `names`."""
    works = list(works.values()) if isinstance(works, dict) else [works]
    for told in capped(*works):
        assert told.startswith("StoreError: "), told
        assert "\n" not in told
        assert len(told) < 1000
        for name in names:
            assert name in told


def wrote(path: Path, value) -> None:
    path.write_text(json.dumps(value))


def forge_header(place: Path, **changes) -> None:
    group = read_json(place / "zarr.json")
    group["attributes"]["decant"].update(changes)
    wrote(place / "zarr.json", group)


def forge_column(place: Path, name: str, values: np.ndarray) -> None:
    """Put other values into a column, checksum included."""
    body = values.tobytes()
    (place / name / "c" / "0").write_bytes(body + crc32c(body))


def column(place: Path, name: str, dtype="<i8") -> np.ndarray:
    return np.frombuffer((place / name / "c" / "0").read_bytes()[:-CRC_BYTES], dtype=dtype).copy()


def swell(path: Path, size: int) -> None:
    """A file of any size that takes no room on the disk."""
    with open(path, "r+b") as file:
        file.truncate(size)


def all_ways(place: Path, receipt: Path, tmp_path: Path):
    """Every command that reads a store, by name; to verify is to find the damage."""

    def verify():
        damage = verify_store(place, [receipt], full=True).damage
        if damage:
            raise StoreError(f"{place}: {damage[0].place}: {damage[0].detail.splitlines()[0]}")

    return {
        "open": lambda: [open_receipt(receipt).read(LAYER, u) for u in range(len(ROWS))],
        "open to batch": lambda: open_receipt(receipt).read_batch([f"utt-é{u}" for u in range(len(ROWS))], LAYERS),
        "describe": lambda: make_receipt(place, LAYERS),
        "verify": verify,
        "export": lambda: export_store(place, tmp_path / "out.h5"),
    }


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
    (place / name).write_text(text)
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


def build_int8():
    """A store with tables beside its layers."""
    fingerprint = {"model": "int8"}
    key = store_key("features", fingerprint)
    header = {"kind": "features", "key": key, "fingerprint": fingerprint, "codec": "int8", "width": 24}
    header |= {"chunk_rows": 16, "shard_rows": 256}
    place, ids = store_path("features", key), [f"utt-é{u}" for u in range(len(ROWS))]
    rng = np.random.default_rng(5)
    with open_writer(place, header, ids, np.array(ROWS, dtype=np.int64), LAYERS) as writer:
        for name in LAYERS:
            tables = {"mean": rng.normal(size=24), "std": rng.uniform(1, 2, size=24)}
            writer.write_tables(name, {table: values.astype(np.float32) for table, values in tables.items()})
        for shard, names in writer.missing().items():
            for name in names:
                writer.write(name, shard, rng.integers(0, 256, (writer.plan.used_rows(shard), 26), dtype=np.uint8))
    return place


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
            timeout=30,
            cwd=Path(__file__).parents[1],
        )
        assert done.returncode == 4, (command, done.stderr)
        assert "Traceback" not in done.stderr
        assert "Memory" not in done.stderr


# any JSON, with a bias to what a header's reader could trip over
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from([0, 1, 8, 12, 16, 24, 32, 48, 128, 256, 512, 2**31, 2**63])
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["float16", "float32", "bfloat16", "int16", "int8", "waves", "features"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


def mutate(data, value, depth=0):
    """One place of a JSON value replaced, taken away or added."""
    keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    if not keys or (depth and data.draw(st.integers(0, 3)) == 0):
        return data.draw(VALUES)
    key = data.draw(st.sampled_from(keys))
    match data.draw(st.sampled_from(["within", "within", "within", "delete", "add"])):
        case "within":
            value[key] = mutate(data, value[key], depth + 1)
        case "delete":
            del value[key]
        case "add" if isinstance(value, dict):
            value[data.draw(st.text(max_size=8))] = data.draw(VALUES)
        case "add":
            value.insert(key, data.draw(VALUES))
    return value


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One store for many examples, each of which puts back what it changed."""
    root = tmp_path_factory.mktemp("foreign")
    os.environ["DECANT_STORE"] = str(root / "store")
    place, _ = build()
    receipt = make_receipt(place, LAYERS)
    store = open_receipt(receipt)
    return root, place, receipt, [store.read(LAYER, u) for u in range(len(ROWS))]


@settings(max_examples=200, deadline=None)
@given(data=st.data(), name=st.sampled_from(["zarr.json"] * 3 + [f"{LAYER}/zarr.json"]), times=st.integers(1, 3))
def test_no_mutation_of_the_header_gives_anything_but_an_error_or_the_right_numbers(shared, data, name, times):
    root, place, receipt, wanted = shared
    os.environ["DECANT_STORE"] = str(root / "store")
    whole = (place / name).read_bytes()
    value = json.loads(whole)
    for _ in range(times):
        value = mutate(data, value)

    def right():
        store = open_receipt(receipt)
        for u, rows in enumerate(wanted):
            assert np.array_equal(store.read(LAYER, f"utt-é{u}"), rows)

    try:
        (place / name).write_text(json.dumps(value))
        (told,) = capped(right)
        assert told == "read" or told.startswith("StoreError: "), told
        assert told == "read" or "\n" not in told
    finally:
        (place / name).write_bytes(whole)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), name=st.sampled_from(["rows", "id_end", "start"]))
def test_no_mutation_of_a_column_gives_anything_but_an_error_or_a_reading_of_it(shared, data, name):
    root, place, receipt, _ = shared
    os.environ["DECANT_STORE"] = str(root / "store")
    path = place / name / "c" / "0"
    whole = path.read_bytes()
    values = column(place, name).tolist()
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(len(values) - 1, 0)))
        match data.draw(st.sampled_from(["replace", "delete", "insert"])):
            case "replace" if values:
                values[at] = data.draw(st.integers(-(2**63), 2**63 - 1) | st.integers(-5, 300))
            case "delete" if values:
                del values[at]
            case _:
                values.insert(at, data.draw(st.integers(1, 300)))

    def read():  # rows moved from one utterance to another in one shard are seen by nobody
        store = open_receipt(receipt)
        for u in range(len(store.ids)):
            assert store.read(LAYER, u).shape == (values[u] if name == "rows" else ROWS[u], 24)

    try:
        forge_column(place, name, np.array(values, dtype=np.int64))
        (told,) = capped(read)
        assert told == "read" or told.startswith("StoreError: "), told
    finally:
        path.write_bytes(whole)


def test_an_export_with_tables_comes_back_and_forged_tables_are_refused(tmp_path):
    place, exported = build_int8(), tmp_path / "store.h5"
    wanted = make_receipt(place, LAYERS)
    tables = Store(place).tables(LAYER)
    export_store(place, exported)
    shutil.rmtree(place)
    import_store(exported)
    assert make_receipt(place, LAYERS) == wanted
    assert {k: v.tolist() for k, v in Store(place).tables(LAYER).items()} == {k: v.tolist() for k, v in tables.items()}
    shutil.rmtree(place)
    whole = exported.read_bytes()
    for forged in ({"data": np.zeros(24, dtype="f4")}, {"shape": (2**40,), "dtype": "f4", "chunks": (1024,)}, None):
        exported.write_bytes(whole)
        with h5py.File(exported, "r+") as file:
            del file[f"{LAYER}.mean"]
            if forged:
                file.create_dataset(f"{LAYER}.mean", **forged)
        import_refused(exported, *([f"{LAYER}.mean"] if forged else []))


# ---- HDF5


@pytest.fixture
def exported(place, tmp_path):
    export_store(place, tmp_path / "store.h5")
    shutil.rmtree(place)
    return tmp_path / "store.h5"


def import_refused(source: Path, *names: str) -> None:
    refused(lambda: import_store(source), str(source), *names)
    left = [p for p in Path(os.environ["DECANT_STORE"]).rglob("*") if p.name != "writer.lock" and not p.is_dir()]
    assert left == []


def test_a_sound_export_is_imported_under_the_same_cap(exported):
    assert capped(lambda: import_store(exported)) == ["read"]


def early(shape, dtype, file, name):
    """A contiguous dataset of terabytes that takes no room: allocated at once, never filled."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    space = h5py.h5s.create_simple(shape)
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), space, plist)


def chunked_early(file, name, shape, chunks, dtype="f2"):
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_chunk(chunks)
    plist.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))  # zstd, which a plugin would read
    h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(np.dtype(dtype)), h5py.h5s.create_simple(shape), plist)


def virtual(file, name, shape, source):
    layout = h5py.VirtualLayout(shape=shape, dtype="f2")
    layout[:] = h5py.VirtualSource(str(source), "x", shape=shape)
    file.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("name", ["rows", LAYER])
@pytest.mark.parametrize(
    "kind",
    [
        "gzip",
        "lzf",
        "zstd",
        "scaleoffset",
        "sparse",
        "virtual",
        "external",
        "external-link",
        "soft-link",
        "group",
        "type",
    ],
)
def test_a_dataset_that_grows_or_points_elsewhere_is_refused(exported, tmp_path, name, kind):
    secret = tmp_path / "secret.h5"
    with h5py.File(exported, "r+") as file:
        shape, dtype = file[name].shape, file[name].dtype
        values = file[name][:]
        large = (2**38,) if name == "rows" else (2**38, 24)
        chunks = (1024,) if name == "rows" else (16, 24)
        with h5py.File(secret, "w") as other:
            other["x"] = values
        del file[name]
        match kind:
            case "gzip" | "lzf":
                file.create_dataset(name, shape=large, dtype=dtype, chunks=chunks, compression=kind)
            case "scaleoffset":
                file.create_dataset(name, shape=large, dtype="i8", chunks=chunks, scaleoffset=1)
            case "zstd":
                chunked_early(file, name, shape, chunks if name != "rows" else shape, dtype)
            case "sparse":
                early((2**36,) if name == "rows" else (2**30, 24), dtype, file, name)
            case "virtual":
                virtual(file, name, shape, secret)
            case "external":
                file.create_dataset(name, shape=shape, dtype=dtype, external=[(str(secret), 0, h5py.h5f.UNLIMITED)])
            case "external-link":
                file[name] = h5py.ExternalLink(str(secret), "x")
            case "soft-link":
                file["elsewhere"] = values
                file[name] = h5py.SoftLink("/elsewhere")
            case "group":
                file.create_group(name)
            case "type":
                file.create_dataset(name, shape=shape, dtype="V1048576")
    import_refused(exported, name)


@pytest.mark.parametrize(
    "dtype", ["S1073741824", "f8", "<u2", ">f2", [("a", "f2"), ("b", "S100000000")], "vlen", "ref"]
)
def test_a_forged_type_is_refused(exported, dtype):
    with h5py.File(exported, "r+") as file:
        shape = file[LAYER].shape
        del file[LAYER]
        special = {"vlen": h5py.vlen_dtype(np.dtype("f2")), "ref": h5py.ref_dtype}
        made = special[dtype] if isinstance(dtype, str) and dtype in special else np.dtype(dtype)
        file.create_dataset(LAYER, shape=shape, dtype=made, chunks=(16, 24) if made.itemsize < 100 else None)
    import_refused(exported, LAYER)


@pytest.mark.parametrize(
    "value",
    [5, np.zeros(100), b"\xff\xfe", "[]", "{}", "[" * 100_000, "1" * 5000, '{"hdf5_format": 1}', h5py.Empty("f")],
    ids=str,
)
def test_an_account_that_is_none_is_refused(exported, value):
    with h5py.File(exported, "r+") as file:
        file.attrs["decant"] = value
    import_refused(exported)


@pytest.mark.parametrize(
    "changes",
    [
        {"width": 2**40},
        {"width": "24"},
        {"shard_rows": 2**62},
        {"chunk_rows": -16},
        {"codec": ["float16"]},
        {"fingerprint": 5},
        {"arrays": {LAYER: [[2**60, "0" * 32]] * 5}},
        {"arrays": {LAYER: 5}},
        {"arrays": {LAYER: [5]}},
        {"arrays": [LAYER]},
        {"rows": 5},
        {"header": [5]},
    ],
    ids=str,
)
def test_an_account_that_cannot_be_is_refused(exported, changes):
    with h5py.File(exported, "r+") as file:
        about = json.loads(file.attrs["decant"])
        about.pop("digest")
        header = about["header"]
        for name, value in changes.items():
            (header if name in header else about)[name] = value
        file.attrs["decant"] = canonical_json({**about, "digest": digest_json(about)})
    import_refused(exported)
