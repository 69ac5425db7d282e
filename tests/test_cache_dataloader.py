"""A store in the worker processes of torch's DataLoader, forked and spawned, after it was used in the parent."""

import os

import numpy as np
import pytest

from cache.receipts import open_receipt
from tests.cache_fixtures import LAYERS, with_receipt


class Utterances:
    """A map-style dataset over a store, as torch wants it."""

    def __init__(self, store):
        self.store = store

    def __len__(self):
        return len(self.store.rows)

    def __getitem__(self, u):
        return u, os.getpid(), *(self.store.read(name, u) for name in LAYERS)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_store_that_was_used_is_right_in_two_dataloader_workers(method, tmp_path, monkeypatch):
    from torch.utils.data import DataLoader  # in here: each spawned worker imports this file

    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    with_receipt(tmp_path / "receipt.json")
    store = open_receipt(tmp_path / "receipt.json", verify=True)
    store.read_batch(list(range(len(store.rows))), list(LAYERS))  # every shard is open
    loader = DataLoader(
        Utterances(store), batch_size=None, num_workers=2, multiprocessing_context=method, persistent_workers=False
    )
    seen, pids = [], set()
    for u, pid, *layers in loader:
        seen.append(u)
        pids.add(pid)
        for name, layer in zip(LAYERS, layers, strict=True):
            np.testing.assert_array_equal(layer.numpy(), store.read(name, u))
    del loader
    assert seen == list(range(len(store.rows)))
    assert len(pids - {os.getpid()}) == 2
