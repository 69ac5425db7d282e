"""Stores with drawn lies: whatever a header or a column says, there is an error or what it says is read.

Each attempt runs in a process of its own that may take 96 MB more than it has, and has ten seconds of a processor.
"""

import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cache.receipts import make_receipt, open_receipt
from tests.cache_fixtures import LAYERS, ROWS, build
from tests.foreign_fixtures import (
    LAYER,
    capped,
    column,
    forge_column,
)

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
