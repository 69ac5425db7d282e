"""P2 and P3 of the store: exact bytes for every reader, and never a wrong number from a damaged one."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.errors import ResourceError, SettingsError, StoreError
from cache.frames import FrameSpan
from cache.plan import plan_rows
from cache.publish import read_json, write_json
from cache.ragged import Store
from cache.receipts import make_receipt, open_receipt, store_key, store_path
from cache.waves import WaveWriter
from cache.writer import open_writer

pytestmark = pytest.mark.usefixtures("store_here")

LAYERS = ("layer-00", "layer-04")


def header(width=24, codec="float16", chunk=16, shard=256, fingerprint=None):
    fingerprint = {"model": "m"} if fingerprint is None else fingerprint
    key = store_key("features", fingerprint)
    return {
        "kind": "features",
        "key": key,
        "fingerprint": fingerprint,
        "codec": codec,
        "width": width,
        "chunk_rows": chunk,
        "shard_rows": shard,
    }


def random_rows(rows, width=24, codec="float16", seed=0):
    rng = np.random.default_rng(seed)
    return {name: [rng.normal(size=(r, width)).astype(codec) for r in rows] for name in LAYERS}


def build(rows, data, **kwargs):
    """Write a whole store; its receipt."""
    head = header(**kwargs)
    place = store_path("features", head["key"])
    ids = [f"utt-é{u}" for u in range(len(rows))]
    with open_writer(place, head, ids, np.array(rows, dtype=np.int64), LAYERS) as writer:
        for shard, names in writer.missing().items():
            for name in names:
                writer.write(name, shard, np.concatenate([data[name][u] for u in writer.plan.utterances(shard)]))
    return make_receipt(place, LAYERS)


ROWS = [1, 100, 16, 256, 31, 200, 57, 64, 3, 255]


@pytest.fixture
def receipt():
    return build(ROWS, random_rows(ROWS))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.integers(1, 90), min_size=1, max_size=25),
    chunk=st.sampled_from([1, 7, 16, 64]),
    shards=st.integers(1, 4),
    codec=st.sampled_from(["float16", "float32"]),
    verify=st.booleans(),
    data=st.data(),
)
def test_any_ragged_corpus_comes_back_bit_for_bit(tmp_path_factory, rows, chunk, shards, codec, verify, data):
    os.environ["DECANT_STORE"] = str(tmp_path_factory.mktemp("property"))
    values = random_rows(rows, width=5, codec=codec)
    shard = chunk * (-(-max(rows) // chunk) + shards)
    store = open_receipt(build(rows, values, width=5, codec=codec, chunk=chunk, shard=shard), verify=verify)
    for u, count in enumerate(rows):
        start = data.draw(st.integers(0, count - 1))
        span = FrameSpan(start, data.draw(st.integers(1, count - start)))
        for name in LAYERS:
            np.testing.assert_array_equal(store.read(name, u), values[name][u])
            np.testing.assert_array_equal(store.read(name, u, span), values[name][u][span.rows])


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(st.integers(1, 50), min_size=1, max_size=60), shard=st.integers(50, 120))
def test_the_plan_is_the_greedy_one_and_no_utterance_crosses_a_shard(rows, shard):
    plan = plan_rows(np.array(rows, dtype=np.int64), shard)
    number, used = 0, 0  # the same plan, written the slow way
    for u, count in enumerate(rows):
        if used + count > shard:
            number, used = number + 1, 0
        assert plan.start[u] == number * shard + used
        assert u in plan.utterances(number)
        used += count
    assert plan.num_shards == number + 1
    assert plan.used_rows(number) == used


def test_an_utterance_larger_than_a_shard_is_refused():
    with pytest.raises(SettingsError, match="utterance number 1 has 300 rows, more than a shard of 256"):
        plan_rows(np.array([5, 300], dtype=np.int64), 256)


def test_plain_zarr_and_tensorstore_read_the_same_numbers(receipt):
    import tensorstore
    import zarr

    store = open_receipt(receipt)
    group = zarr.open_group(store.directory, mode="r")
    for name in LAYERS:
        through_zarr = group[name][:]
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(store.directory / name)}}
        through_tensorstore = tensorstore.open(spec).result().read().result()
        for u, count in enumerate(ROWS):
            start = int(group["start"][u])
            np.testing.assert_array_equal(through_zarr[start : start + count], store.read(name, u))
            np.testing.assert_array_equal(through_tensorstore[start : start + count], store.read(name, u))
    ends = group["id_end"][:]
    assert bytes(group["ids"][: ends[0]]).decode() == store.ids[0] == "utt-é0"
    assert np.isnan(through_zarr[ROWS[0] + ROWS[1] + ROWS[2]]).all()  # what is between shards is fill, not zeros


def test_a_batch_is_padded_with_zeros_and_reuses_its_buffer(receipt):
    store, data = open_receipt(receipt), random_rows(ROWS)
    buffer = np.full((3, 2, 300, 24), 7, dtype=np.float16)
    out, counts = store.read_batch(["utt-é3", 0, 5], ["layer-04", "layer-00"], out=buffer)
    assert out is buffer
    assert counts.tolist() == [256, 1, 200]
    np.testing.assert_array_equal(out[2, 0, :200], data["layer-04"][5])
    assert (out[2, 1, 200:] == 0).all()
    spans = [FrameSpan(10, 20), FrameSpan(0, 1), FrameSpan(150, 50)]
    out, counts = store.read_batch([3, 0, 5], ["layer-00"], spans)
    assert out.shape == (3, 1, 50, 24)
    np.testing.assert_array_equal(out[2, 0], data["layer-00"][5][150:200])


def test_a_span_outside_the_utterance_is_refused(receipt):
    store = open_receipt(receipt)
    with pytest.raises(StoreError, match=r"rows 90 to 110 of utt-é1 were asked for, and it has 100"):
        store.read("layer-00", 1, FrameSpan(90, 20))
    with pytest.raises(StoreError, match="has no utterance 'nobody'"):
        store.read("layer-00", "nobody")


def test_a_store_survives_a_fork_and_a_pickle(receipt):
    store, data = open_receipt(receipt), random_rows(ROWS)
    store.read("layer-00", 1)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if np.array_equal(store.read("layer-00", 5), data["layer-00"][5]) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(store)).read("layer-04", 3), data["layer-04"][3])


def test_making_the_same_store_again_gives_the_same_receipt_and_bytes(receipt, tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "second"))
    assert build(ROWS, random_rows(ROWS)) == receipt
    assert str(tmp_path) not in json.dumps(receipt)


def damage(kind, shard: Path, other: Path):
    data = bytearray(shard.read_bytes())
    match kind:
        case "payload":
            data[100] ^= 4
            shard.write_bytes(data)
        case "index":
            data[-20] ^= 1
            shard.write_bytes(data)
        case "truncated":
            shard.write_bytes(data[:-1])
        case "empty":
            shard.write_bytes(b"")
        case "deleted":
            shard.unlink()
        case "swapped":
            shutil.copy(other, shard)


@pytest.mark.parametrize("kind", ["truncated", "empty", "deleted", "swapped"])
def test_a_shard_that_is_not_whole_is_refused_on_opening_and_made_again_alone(receipt, kind):
    store = open_receipt(receipt)
    shards = sorted((store.directory / "layer-04" / "c").glob("*/0"))
    for path in store.directory.rglob("c/*/0"):
        os.utime(path, (1, 1))  # long ago, by any clock
    damage(kind, shards[1], shards[0])
    with pytest.raises(StoreError, match=r"layer-04/c/1/0 (is missing|has \d+ bytes)"):
        open_receipt(receipt)
    assert build(ROWS, random_rows(ROWS)) == receipt
    assert [p for p in store.directory.rglob("c/*/0") if p.stat().st_mtime != 1] == [shards[1]]


@pytest.mark.parametrize("kind", ["payload", "index"])
def test_a_flipped_bit_is_found_before_a_number_is_returned(receipt, kind):
    store = open_receipt(receipt, verify=True)
    damage(kind, store.directory / "layer-00" / "c" / "0" / "0", store.directory)
    with pytest.raises(StoreError, match=r"layer-00/c/0/0: (chunk 0 is damaged|the shard's index is damaged)"):
        open_receipt(receipt, verify=True).read("layer-00", 0)


def test_sampled_verification_looks_at_its_share_of_the_reads(receipt, monkeypatch):
    store = open_receipt(receipt)
    damage("payload", store.directory / "layer-00" / "c" / "0" / "0", store.directory)

    def found(share):
        sampling, count = open_receipt(receipt, verify=share), 0
        for _ in range(400):
            try:
                sampling.read("layer-00", 0)
            except StoreError:
                count += 1
        return count

    monkeypatch.setattr(random, "random", random.Random(0).random)
    assert (found(0.0), found(1.0), found(True)) == (0, 400, 400)
    assert 10 < found(0.1) < 80
    assert pickle.loads(pickle.dumps(open_receipt(receipt, verify=0.25))).verify == 0.25


def test_flipped_metadata_journal_column_or_receipt_is_refused(receipt):
    place = open_receipt(receipt).directory
    for name, old, new, message in [
        ("layer-00/zarr.json", '"float16"', '"float32"', "data_type is 'float32', expected 'float16'"),
        ("layer-00/zarr.json", "24", "2400000000", "expected"),
        ("journal.jsonl", '"bytes": ', '"bytes": 1', "was committed with"),
        ("journal.jsonl", '{"array"', '{"arrax"', "line 1 is damaged"),
        ("zarr.json", '"format": 1', '"format": 2', "store format 2 and this version reads 1"),
        ("zarr.json", receipt["key"], "0" * 20, "a store was copied over another"),
    ]:
        whole = (place / name).read_text()
        (place / name).write_text(whole.replace(old, new))
        with pytest.raises(StoreError, match=message):
            open_receipt(receipt)
        (place / name).write_text(whole)
    column = place / "rows" / "c" / "0"
    whole = column.read_bytes()
    column.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(StoreError, match="rows is damaged"):
        open_receipt(receipt)
    column.write_bytes(whole)
    forged = json.loads(json.dumps(receipt))
    forged["arrays"]["layer-00"]["digest"] = "0" * 64
    with pytest.raises(StoreError, match="layer-00 is not what the receipt describes"):
        open_receipt(forged)
    with pytest.raises(StoreError, match="receipt format 9, this version reads 1"):
        open_receipt({**receipt, "format": 9})


def test_a_missing_store_names_the_command(receipt, tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "elsewhere"))
    with pytest.raises(
        StoreError, match=r"is not under .*elsewhere; make it with `dvc repro -f extract`, or set DECANT_STORE"
    ):
        open_receipt(receipt)


def test_a_torn_journal_line_does_not_count_and_is_written_over(receipt):
    place = open_receipt(receipt).directory
    lines = (place / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (place / "journal.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    with pytest.raises(StoreError, match="was never finished"):
        open_receipt(receipt)
    assert build(ROWS, random_rows(ROWS)) == receipt
    open_receipt(receipt)


def test_a_layer_asked_for_later_joins_the_same_store(receipt):
    head, data = header(), random_rows(ROWS)
    place = store_path("features", head["key"])
    with open_writer(place, head, [], np.array(ROWS, dtype=np.int64), [*LAYERS, "layer-07"]) as writer:
        assert all(names == ["layer-07"] for names in writer.missing().values())
        for shard in writer.missing():
            writer.write(
                "layer-07", shard, np.concatenate([data["layer-00"][u] for u in writer.plan.utterances(shard)])
            )
    assert make_receipt(place, LAYERS) == receipt
    np.testing.assert_array_equal(
        open_receipt(make_receipt(place, ["layer-07"])).read("layer-07", 3), data["layer-00"][3]
    )


def test_a_second_writer_is_refused_and_told_who_is_first(tmp_path):
    head = header()
    place = store_path("features", head["key"])
    script = (
        "import sys, time; from cache.process import exclusive; from pathlib import Path\n"
        "with exclusive(Path(sys.argv[1]) / 'writer.lock'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", script, str(place)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    rows = np.array([3], dtype=np.int64)
    with (
        pytest.raises(ResourceError, match=rf"is being written by process {holder.pid} on"),
        open_writer(place, head, ["a"], rows, LAYERS),
    ):
        pass
    holder.kill()
    holder.wait()
    with open_writer(place, head, ["a"], rows, LAYERS) as writer:
        assert writer.missing() == {0: list(LAYERS)}


def test_what_does_not_fit_is_refused_before_anything_is_computed(monkeypatch):
    head = header()
    with open_writer(
        store_path("features", head["key"]), head, ["a"], np.array([200], dtype=np.int64), LAYERS
    ) as writer:
        predicted = writer.predicted_bytes()
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, predicted - 1))
        with pytest.raises(ResourceError, match="keep fewer layers, or set DECANT_STORE to a larger disk"):
            writer.check_space()
    monkeypatch.undo()


def test_waves_come_back_and_a_crop_is_the_samples_of_its_frames(tmp_path):
    rng = np.random.default_rng(0)
    waves = [rng.integers(-(2**15), 2**15, 400 + 40_000 * i).astype(np.int16) for i in range(5)]
    with WaveWriter(tmp_path / "store" / "waves") as writer:
        hashes = [writer.add(f"w{i}", wave) for i, wave in enumerate(waves)]
        assert len(set(hashes)) == 5
        place = writer.finish(store_key("waves", {"audio": "x"}), {"audio": "x"})
    assert sorted(p.name for p in place.parent.iterdir()) == sorted([place.name, "writer.lock"])
    store = open_receipt(make_receipt(place, ["wave"]), verify=True)
    span = FrameSpan(20, 30)
    for i, wave in enumerate(waves[1:], 1):
        np.testing.assert_array_equal(store.read("wave", i), wave)
        np.testing.assert_array_equal(store.read("wave", i, span), wave[span.samples])


def test_an_interrupted_preparation_leaves_no_store(tmp_path):
    with pytest.raises(KeyboardInterrupt), WaveWriter(tmp_path / "waves") as writer:
        writer.add("a", np.zeros(500, dtype=np.int16))
        raise KeyboardInterrupt
    assert [p.name for p in (tmp_path / "waves").iterdir()] == ["writer.lock"]


def test_a_second_preparation_at_the_same_time_is_refused(tmp_path):
    with WaveWriter(tmp_path / "waves"), pytest.raises(ResourceError, match="waves is being written by process"):
        WaveWriter(tmp_path / "waves").__enter__()


def test_json_is_published_whole_and_a_broken_one_is_named(tmp_path):
    write_json(tmp_path / "a.json", {"b": 1, "a": [2]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  2\n ],\n "b": 1\n}\n'
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(StoreError, match="a.json is not valid JSON"):
        read_json(tmp_path / "a.json")
    with pytest.raises(StoreError, match="gone.json does not exist; run the stage that writes it"):
        read_json(tmp_path / "gone.json")


def test_a_foreign_zarr_group_is_refused(tmp_path):
    write_json(tmp_path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": {}})
    with pytest.raises(StoreError, match="is a Zarr group but no Decant store"):
        Store(tmp_path)
