"""Exports from elsewhere: what grows, points away or says the impossible is one named error, and nothing is imported.

Each attempt runs in a process of its own that may take 96 MB more than it has, and has five seconds.
"""

import json
import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest

from cache.hdf5 import export_store, import_store
from cache.publish import canonical_json, digest_json, write_json
from cache.ragged import Store
from cache.receipts import make_receipt
from tests.cache_fixtures import LAYERS, build
from tests.foreign_fixtures import (
    LAYER,
    build_int8,
    capped,
    refused,
)

pytestmark = pytest.mark.usefixtures("store_here")


@pytest.fixture
def place(tmp_path):
    place, _ = build()
    write_json(tmp_path / "hubert.json", make_receipt(place, LAYERS))
    return place


@pytest.fixture
def exported(place, tmp_path):
    export_store(place, tmp_path / "store.h5")
    shutil.rmtree(place)
    return tmp_path / "store.h5"


def import_refused(source: Path, *names: str) -> None:
    refused(lambda: import_store(source), str(source), *names)
    left = [p for p in Path(os.environ["DECANT_STORE"]).rglob("*") if p.name != "writer.lock" and not p.is_dir()]
    assert left == []


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
