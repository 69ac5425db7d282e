"""A store behind a URL gives the bytes of the local one, whatever its server does; or one error that names the URL."""

import json
import os
import pickle
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cache.ranges
from cache.errors import SettingsError, StoreError
from cache.frames import FrameSpan
from cache.places import RemotePath, place_of
from cache.publish import write_json
from cache.ragged import Store
from cache.receipts import make_receipt, open_receipt, store_path, store_root
from pipeline.layers.choose import choose_targets
from pipeline.layers.ensembles import SingleTeacher
from pipeline.layers.targets import Adopted, targets_json
from pipeline.tasks.features import pool
from tests.cache_fixtures import LAYERS, ROWS, build, edit, flip
from tests.conftest import make_tiny_corpus
from tests.distill_fixtures import make_world, write_params

LAYER = "layer-04"


class Handler(BaseHTTPRequestHandler):
    """Serves the server's folder with ranges, and misbehaves as `server.manners` says."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        server = self.server
        with server.lock:
            server.asked.append((self.path, self.headers.get("Range")))
            number = server.asked.count(server.asked[-1])  # of times that this range was asked for
        file, manners = server.root / self.path.lstrip("/"), server.manners
        if not file.is_file():
            self.send_error(404)
            return
        if manners == "busy" and number % 2:
            self.send_error(503)
            return
        if manners == "cut" and number % 2:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if manners == "forbidden":
            self.send_error(403)
            return
        if manners == "silent":
            server.wakes.wait()
        data = file.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if manners == "ignores" or not found:
            self.send_response(200)
            self.send_header("Content-Length", str(10**9))
            self.end_headers()
            for _ in range(1000):
                server.sent += self.wfile.write(data[:1] * 10**6)
            return
        start, end = int(found[1]), min(int(found[2]) + 1, len(data))
        if start >= len(data):
            self.send_error(416)
            return
        body = data[start:end]
        self.send_response(206)
        if manners == "endless":
            total, body, end = 10**12, b"0" * (int(found[2]) + 1 - start), int(found[2]) + 1
        else:
            total = len(data)
        if manners == "elsewhere":
            start, end = start + 1, end + 1
        if manners == "zipped":
            self.send_header("Content-Encoding", "gzip")
        if manners != "plain":
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{total}")
        if manners == "short":
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return
        if manners == "shorter":
            body = body[: len(body) // 2]
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        server.sent += self.wfile.write(body)

    def log_message(self, *args):
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        pass  # the reader hung up


@pytest.fixture(scope="module")
def server():
    server = Server(("127.0.0.1", 0), Handler)
    server.lock = threading.Lock()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def here(server, tmp_path, monkeypatch):
    """A store root that the server serves, and no patience."""
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    monkeypatch.setattr(cache.ranges, "PAUSE_SEC", 0.01)
    server.root, server.manners, server.asked, server.sent = tmp_path / "store", "good", [], 0
    server.wakes = threading.Event()
    yield
    server.wakes.set()


@pytest.fixture
def place():
    return build()[0]


@pytest.fixture
def receipt(place):
    return make_receipt(place, LAYERS)


def open_remote(server, receipt, monkeypatch, verify=False):
    monkeypatch.setenv("DECANT_STORE", server.url)
    return open_receipt(receipt, verify)


@pytest.fixture(scope="module")
def in_memory(tmp_path_factory):
    """A local store, and the same in fsspec's memory."""
    import fsspec

    root = tmp_path_factory.mktemp("memory")
    before = os.environ.get("DECANT_STORE")
    os.environ["DECANT_STORE"] = str(root / "store")
    place, _ = build()
    memory = fsspec.filesystem("memory")
    for path in place.rglob("*"):
        if path.is_file():
            memory.pipe(f"/{path.relative_to(root)}", path.read_bytes())
    if before is None:
        del os.environ["DECANT_STORE"]
    else:
        os.environ["DECANT_STORE"] = before
    return place, f"memory://store/features/{place.name}"


def spans(draw_rows):
    return st.tuples(st.integers(0, draw_rows - 1), st.integers(1, draw_rows)).map(
        lambda s: FrameSpan(s[0], min(s[1], draw_rows - s[0]))
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data(), scheme=st.sampled_from(["http", "memory"]), verify=st.booleans())
def test_any_spans_of_any_utterances_are_the_local_bytes(server, in_memory, data, scheme, verify):
    place, url = in_memory
    server.root = place.parents[1]
    local = Store(place)
    remote = Store(url if scheme == "memory" else f"{server.url}/features/{place.name}", verify=verify)
    chosen = data.draw(st.lists(st.integers(0, len(ROWS) - 1), min_size=1, max_size=12))
    some = [data.draw(spans(ROWS[u])) for u in chosen]
    arrays = data.draw(st.sampled_from([LAYERS, LAYERS[:1], LAYERS[::-1]]))
    for given_spans in (some, None):
        got, counts = remote.read_batch([f"utt-é{u}" for u in chosen], arrays, given_spans)
        want, want_counts = local.read_batch(chosen, arrays, given_spans)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(counts, want_counts)
    np.testing.assert_array_equal(remote.read(LAYER, chosen[0], some[0]), local.read(LAYER, chosen[0], some[0]))
    buffer = np.full((len(chosen), len(arrays), 300, 24), 7, dtype=np.float16)
    wanted = buffer.copy()
    remote.read_into(chosen, arrays, buffer)
    local.read_into(chosen, arrays, wanted)
    np.testing.assert_array_equal(buffer, wanted)  # and what lies after an utterance stays


def test_a_receipt_opens_a_store_behind_a_url_without_asking_for_a_shard(server, place, receipt, monkeypatch):
    local = Store(place)
    remote = open_remote(server, receipt, monkeypatch)
    assert remote.ids == local.ids
    assert not [path for path, _ in server.asked if re.search(r"layer-\d+/c/", path)]
    assert len(server.asked) == len({path for path, _ in server.asked}) == 7  # header, 3 columns, journal, 2 arrays
    server.asked.clear()
    for u in range(len(ROWS)):
        np.testing.assert_array_equal(remote.read(LAYER, u), local.read(LAYER, u))
    indexes = [
        a
        for a in server.asked
        if a[1] and int(a[1].split("-")[1]) == (place / a[0].split("/", 3)[3]).stat().st_size - 1
    ]
    assert len(server.asked) == len(ROWS) + len(indexes)
    assert len(indexes) == len(set(indexes)) == len(receipt["arrays"][LAYER]["shards"])  # each once
    server.asked.clear()
    for u in range(len(ROWS)):
        remote.read(LAYER, u)
    assert len(server.asked) == len(ROWS)


def test_waves_and_crops_of_them_come_as_from_the_disk(server, tmp_path, monkeypatch):
    corpus = make_tiny_corpus(tmp_path, [400, 16_000, 9_999, 719, 720, 24_000, 40_001])
    remote = open_remote(server, corpus.waves_path, monkeypatch, verify=True)
    for u in range(7):
        np.testing.assert_array_equal(remote.read("wave", u), corpus.waves.read("wave", u))
    span = FrameSpan(3, 20)
    np.testing.assert_array_equal(remote.read("wave", 1, span), corpus.waves.read("wave", 1, span))


def test_a_batch_is_a_request_an_utterance_and_layer_and_neighbours_share_one(server, place, receipt, monkeypatch):
    remote, local = open_remote(server, receipt, monkeypatch), Store(place)
    remote.read_batch(list(range(len(ROWS))), LAYERS)  # all indexes
    server.asked.clear()
    remote.read_batch([1, 2], LAYERS)  # one after the other in one shard
    assert len(server.asked) == 2
    server.asked.clear()
    remote.read_batch([3, 5], LAYERS)  # in two shards
    assert len(server.asked) == 4
    server.asked.clear()
    every = remote.read_batch(list(range(len(ROWS))), LAYERS)[0]
    assert len(server.asked) == 2 * local.plan.num_shards
    np.testing.assert_array_equal(every, local.read_batch(list(range(len(ROWS))), LAYERS)[0])
    monkeypatch.setattr(cache.remote, "GAP_BYTES", -1)
    server.asked.clear()
    remote.read_batch(list(range(len(ROWS))), LAYERS)
    assert len(server.asked) == 2 * len(ROWS)  # chunks never are requests of their own
    monkeypatch.setattr(cache.remote, "GAP_BYTES", 10**6)
    monkeypatch.setattr(cache.remote, "JOINT_BYTES", 1)
    server.asked.clear()
    np.testing.assert_array_equal(remote.read_batch([1, 2, 2], LAYERS)[0], local.read_batch([1, 2, 2], LAYERS)[0])
    assert len(server.asked) == 6


def test_a_flipped_byte_is_found_behind_http_if_verified(server, place, receipt, monkeypatch):
    local = Store(place).read(LAYER, 1)
    flip(place / LAYER / "c" / "0" / "0", 40 * 48)  # row 40 of the shard, chunk 2
    with pytest.raises(StoreError, match=rf"{server.url}/features/{place.name}/{LAYER}/c/0/0: chunk 2 is damaged"):
        open_remote(server, receipt, monkeypatch, verify=True).read(LAYER, 1)
    assert (open_remote(server, receipt, monkeypatch).read(LAYER, 1) != local).any()
    whole = open_remote(server, receipt, monkeypatch, verify=True)
    assert len(whole.read(LAYER, 1, FrameSpan(60, 40))) == 40  # other chunks are sound
    flip(place / LAYER / "c" / "0" / "0", -20)
    with pytest.raises(StoreError, match=rf"{server.url}.*{LAYER}/c/0/0: the shard's index is damaged"):
        open_remote(server, receipt, monkeypatch).read(LAYER, 1)


@pytest.mark.parametrize(("at", "bit"), [(3, 1), (700, 16), (1300, 128)])
def test_every_flipped_bit_of_what_is_read_is_found_as_from_the_disk(server, place, receipt, monkeypatch, at, bit):
    flip(place / LAYER / "c" / "1" / "0", at, bit)
    told = []
    for store in (Store(place, verify=True), open_remote(server, receipt, monkeypatch, verify=True)):
        with pytest.raises(StoreError) as caught:
            store.read_batch(list(range(len(ROWS))), LAYERS)
        told.append(re.search(r"layer-04/c/1/0: chunk \d+ is damaged", str(caught.value))[0])
    assert told[0] == told[1]


@pytest.mark.parametrize("manners", ["busy", "cut"])
def test_a_server_that_fails_every_second_request_gives_the_right_numbers(server, place, receipt, monkeypatch, manners):
    local = Store(place).read_batch(list(range(len(ROWS))), LAYERS)[0]
    server.manners = manners
    remote = open_remote(server, receipt, monkeypatch)
    np.testing.assert_array_equal(remote.read_batch(list(range(len(ROWS))), LAYERS)[0], local)


@pytest.mark.parametrize(
    ("manners", "message", "tries"),
    [
        ("ignores", "the server ignores ranges and sends the whole file", 1),
        ("plain", "something that is no plain range of bytes", 1),
        ("zipped", "something that is no plain range of bytes", 1),
        ("forbidden", "the server refuses access \\(403\\)", 1),
        ("short", "did not come in 4 tries", 4),
        ("shorter", "did not come in 4 tries", 4),
        ("elsewhere", "did not come in 4 tries \\(OSError: the server sends bytes", 4),
    ],
)
def test_a_server_that_does_not_send_the_range_is_an_error_that_names_it(
    server, place, receipt, monkeypatch, manners, message, tries
):
    remote = open_remote(server, receipt, monkeypatch)
    server.manners = manners
    server.asked.clear()
    server.sent = 0
    with pytest.raises(StoreError, match=rf"{server.url}/features/{place.name}/{LAYER}/c/\d/0: .*{message}") as caught:
        remote.read(LAYER, 1)
    assert len(server.asked) == tries
    assert "\n" not in str(caught.value)
    if manners == "ignores":
        assert server.sent < 30e6  # of a gigabyte: what the sockets hold
    with pytest.raises(StoreError, match=rf"{server.url}/features/{place.name}/zarr.json: .*{message}"):
        open_remote(server, receipt, monkeypatch)
    server.manners = "good"
    np.testing.assert_array_equal(remote.read(LAYER, 1), Store(place).read(LAYER, 1))  # it goes on


def test_a_server_that_falls_silent_is_an_error_after_a_while(server, place, receipt, monkeypatch):
    monkeypatch.setattr("cache.webranges.READ_SEC", 1.0)  # for a busy machine to open it
    monkeypatch.setattr(cache.ranges, "_opened", {})
    remote = open_remote(server, receipt, monkeypatch)
    server.manners = "silent"
    with pytest.raises(StoreError, match=r"did not come in 4 tries \(SocketTimeoutError"):
        remote.read(LAYER, 1)
    assert not server.wakes.is_set()  # it would be silent still


def test_no_server_is_an_error_that_names_the_url(receipt, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=r"http://127.0.0.1:9/features/\w+/zarr.json: .* in 4 tries \(ClientConnector"):
        open_receipt(receipt)


def test_an_endless_header_is_not_read(server, place, receipt, monkeypatch):
    server.manners = "endless"
    with pytest.raises(StoreError, match=r"zarr.json has 4,194,305 bytes or more, and may have 4,194,304"):
        open_remote(server, receipt, monkeypatch)
    assert server.sent < 5e6


def test_what_is_missing_is_named_and_not_asked_for_again(server, place, receipt, monkeypatch):
    remote = open_remote(server, receipt, monkeypatch)
    remote.read_batch([0], LAYERS)
    (place / LAYER / "c" / "1" / "0").unlink()
    server.asked.clear()
    with pytest.raises(StoreError, match=rf"{server.url}/features/{place.name}/{LAYER}/c/1/0 is missing; upload"):
        remote.read_batch([0, 3], [LAYER])
    assert len(server.asked) == 1
    (place / "ids" / "c" / "0").unlink()
    with pytest.raises(StoreError, match="ids is missing from the store"):
        open_remote(server, receipt, monkeypatch).read(LAYER, "utt-é1")
    shutil.rmtree(place)
    with pytest.raises(StoreError, match=rf"there is no store at {server.url}/features/{place.name}"):
        open_remote(server, receipt, monkeypatch)


def test_a_shard_of_another_size_is_refused_when_it_is_first_read(server, place, receipt, monkeypatch):
    shard = place / LAYER / "c" / "1" / "0"
    whole = shard.read_bytes()
    for data in (whole[:-1], whole[:-16], whole[16:], b"", whole[:100]):
        shard.write_bytes(data)
        with pytest.raises(StoreError, match=rf"{LAYER}/c/1/0"):
            open_remote(server, receipt, monkeypatch).read(LAYER, 3)


def test_the_journal_is_compared_with_the_receipt(server, place, receipt, monkeypatch):
    journal = (place / "journal.jsonl").read_text()
    first = json.loads(journal.splitlines()[0])
    (place / "journal.jsonl").write_text(journal.replace(first["xxh3"], "0" * 32))
    with pytest.raises(StoreError, match=r"layer-0\d is not what the receipt describes"):
        open_remote(server, receipt, monkeypatch)
    (place / "journal.jsonl").write_text(journal.replace('"bytes": ', '"bytes": 1', 1))
    with pytest.raises(StoreError, match=r"was committed with \d+ bytes and its utterances take \d+"):
        open_remote(server, receipt, monkeypatch)
    (place / "journal.jsonl").write_text("".join(journal.splitlines(keepends=True)[1:]))
    with pytest.raises(StoreError, match="was never finished"):
        open_remote(server, receipt, monkeypatch)
    (place / "journal.jsonl").unlink()
    with pytest.raises(StoreError, match="was never finished"):
        open_remote(server, receipt, monkeypatch)
    (place / "journal.jsonl").write_text(journal)
    edit(place / LAYER / "zarr.json", "24", "28")
    with pytest.raises(StoreError, match=rf"{server.url}.*{LAYER}/zarr.json"):
        open_remote(server, receipt, monkeypatch)


def test_a_remote_store_survives_a_fork_and_a_pickle(server, place, receipt, monkeypatch):
    local, remote = Store(place), open_remote(server, receipt, monkeypatch)
    np.testing.assert_array_equal(remote.read(LAYER, 1), local.read(LAYER, 1))  # connections are open
    for _ in range(2):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = 0 if np.array_equal(remote.read(LAYER, 5), local.read(LAYER, 5)) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        np.testing.assert_array_equal(remote.read(LAYER, 3), local.read(LAYER, 3))  # and still are
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(remote)).read(LAYER, 3), local.read(LAYER, 3))


def test_workers_of_a_data_loader_read_it_after_its_first_use(server, place, receipt, monkeypatch):
    import torch.utils.data

    local, remote = Store(place), open_remote(server, receipt, monkeypatch)
    remote.read(LAYER, 0)

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(ROWS)

        def __getitem__(self, u):
            return remote.read(LAYER, u)

    loader = torch.utils.data.DataLoader(
        Rows(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=200
    )
    for u, rows in enumerate(loader):
        np.testing.assert_array_equal(np.asarray(rows), local.read(LAYER, u))


def test_nothing_is_written_behind_a_url(server, place, receipt, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", server.url)
    message = rf"{server.url}.* is behind a URL, where stores can only be read"
    for work in (store_root, lambda: store_path("features", "x"), build):
        with pytest.raises(StoreError, match=message):
            work()
    remote = open_receipt(receipt)
    with pytest.raises(StoreError, match=message):
        _ = remote.directory
    assert str(remote.place) == f"{server.url}/features/{place.name}"


@pytest.mark.parametrize("command", ["ls", "info x", "verify", "repair x", "import x.h5", "export x --out y.h5"])
def test_the_commands_that_look_after_stores_say_that_they_need_a_folder(server, command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "stages", "cache", *command.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "DECANT_STORE": "https://example.org/stores"},
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 4 or "x.h5 does not exist" in done.stderr
    if command != "import x.h5":
        assert "https://example.org/stores is behind a URL" in done.stderr
        assert "needs a local folder" in done.stderr


def test_the_tables_of_a_codec_are_read_and_compared_with_the_receipt(server, monkeypatch):
    from tests.foreign_fixtures import build_int8

    place = build_int8()
    receipt, wanted = make_receipt(place, LAYERS), Store(place).tables(LAYER)
    remote = open_remote(server, receipt, monkeypatch)
    for name, values in remote.tables(LAYER).items():
        np.testing.assert_array_equal(values, wanted[name])
    np.testing.assert_array_equal(remote.read(LAYER, 3), Store(place).read(LAYER, 3))
    flip(place / f"{LAYER}.std" / "c" / "0", 9)
    with pytest.raises(StoreError, match=rf"{server.url}.*{LAYER}.std"):
        open_remote(server, receipt, monkeypatch)


def test_names_of_places_keep_their_slashes():
    for text in ("https://host:8080/a/b", "s3://bucket/key", "memory://store", "gs://b"):
        place = place_of(text)
        assert isinstance(place, RemotePath)
        assert str(place) == text
        assert str(place / "x" / "c/0") == f"{text}/x/c/0"
        assert str(pickle.loads(pickle.dumps(place / "x"))) == f"{text}/x"
        assert (place / "x").name == "x"
        assert str((place / "x").parent) == text
    assert place_of("/a/b") == Path("/a/b")
    with pytest.raises(SettingsError, match="has a query"):
        place_of("https://host/a?token=5")


def test_a_file_url_is_the_local_folder_it_names(place, receipt, tmp_path, monkeypatch):
    for text, path in (
        ("file:///data/store", "/data/store"),
        ("FILE://localhost/data/store/", "/data/store"),
        ("file:///with%20space/100%25/%C3%A9/%23", "/with space/100%/é/#"),
        ("file:///%FF", os.fsdecode(b"/\xff")),
    ):
        assert place_of(text) == Path(path)
    for text in ("file://", "file://data/store", "file://host/data", "file:///a?b", "file:///a#b", "file:///a%00b"):
        with pytest.raises(SettingsError, match=rf"{re.escape(text)} names no folder .* or file:///data/store"):
            place_of(text)
    want = open_receipt(receipt).read(LAYER, 3)
    monkeypatch.setenv("DECANT_STORE", place.parents[1].as_uri())
    monkeypatch.chdir(tmp_path)
    assert store_root() == place.parents[1]
    np.testing.assert_array_equal(open_receipt(receipt).read(LAYER, 3), want)


def test_a_protocol_that_nothing_here_reads_is_named():
    with pytest.raises(SettingsError, match=r"gopher:// cannot be read here .*pip install --editable '.\[remote\]'"):
        Store("gopher://host/store")


def test_without_aiohttp_the_extra_is_named(monkeypatch):
    for name in [m for m in sys.modules if m.partition(".")[0] == "aiohttp" or m == "cache.webranges"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(cache.ranges, "_opened", {})
    with pytest.raises(SettingsError, match=r"http:// cannot be read here .*pip install --editable '.\[remote\]'"):
        Store("http://127.0.0.1:9/x")


def test_a_file_that_ends_early_in_another_file_system_is_an_error(in_memory, monkeypatch):
    import fsspec

    place, url = in_memory
    memory = fsspec.filesystem("memory")
    name = f"/store/features/{place.name}/{LAYER}/c/0/0"
    whole = memory.cat_file(name)
    store = Store(url)
    store.read(LAYER, 0)
    memory.pipe(name, whole[:100])
    try:
        with pytest.raises(StoreError, match=rf"{url}/{LAYER}/c/0/0: .*\(EOFError: \d+ of [\d,]+ bytes came\)"):
            store.read(LAYER, 1)
    finally:
        memory.pipe(name, whole)


@pytest.mark.slow
def test_training_from_a_url_gives_the_weights_of_training_from_the_disk(server, tmp_path):
    """`decant distill` as it is, reader processes included."""
    world = make_world(tmp_path)
    write_params(world, train={"steps": 6})
    chosen = choose_targets(
        SingleTeacher(kind="single", teacher="hubert", layers=(3, 1), normalise=None),
        tmp_path / "receipts",
        Adopted(kind="adopted", teacher="hubert", final_norm=False),
        tmp_path / "init",
    )
    write_json(tmp_path / "targets.json", targets_json(chosen))
    weights = []
    for root in (str(server.root), server.url):
        server.asked.clear()
        done = subprocess.run(world.command(), env=world.environment(DECANT_STORE=root), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        weights.append((tmp_path / "models" / "distil" / "weights.safetensors").read_bytes())
        shutil.rmtree(tmp_path / "models")
    assert weights[0] == weights[1]
    assert [path for path, _ in server.asked if "/wave/c/" in path]
    assert [path for path, _ in server.asked if "/layer-" in path]


def test_a_probe_pools_the_same_features_from_a_url(server, tmp_path, monkeypatch):
    world = make_world(tmp_path)
    receipt = world.root / "receipts" / "hubert.json"
    names = sorted(json.loads(receipt.read_text())["arrays"])
    pooled = [
        pool(open_receipt(receipt), names, world.manifest, [u.id for u in world.manifest], True).means
        for root in (str(server.root), server.url)
        if monkeypatch.setenv("DECANT_STORE", root) is None
    ]
    np.testing.assert_array_equal(*pooled)
