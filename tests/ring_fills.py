"""What the ring's workers do in its tests. Its own module, because each worker imports it: no pytest, no torch."""

import os
import signal
import time
from dataclasses import dataclass

import numpy as np

from cache.errors import StoreError
from cache.ragged import Store


class OddError(StoreError):
    """A user's error of a class that nobody told the ring about."""


class Counting:
    """Writes an item's number all over the slot; answers with the number and the process."""

    def __call__(self, item, slot):
        slot.view(np.int64)[:] = item
        return item, os.getpid()


class SlowToStart(Counting):
    """Takes two seconds to arrive in its process."""

    def __setstate__(self, state):
        time.sleep(2)

    def __getstate__(self):
        return {"some": "state"}


@dataclass
class Stumbling(Counting):
    """Does one of many bad things at item 5."""

    how: str

    def __call__(self, item, slot):
        if item == 5:
            match self.how:
                case "store error":
                    raise OddError("layer-00/c/0/0: chunk 3 is damaged (its checksum differs)")
                case "defect":
                    return self.divide(item, 0)
                case "quits":
                    os._exit(3)
                case "large answer":
                    return np.zeros(100_000)
                case "hangs":
                    time.sleep(600)
                case name:
                    os.kill(os.getpid(), signal.Signals[name])
        return super().__call__(item, slot)

    def divide(self, a, b):
        return a / b


@dataclass
class Noting(Counting):
    """Writes a line to a file when it has filled a slot."""

    path: str

    def __call__(self, item, slot):
        answer = super().__call__(item, slot)
        with open(self.path, "a") as file:
            file.write(f"{item}\n")
        return answer


@dataclass
class Gathering:
    """Fills a slot with a batch of a store: (B, L, T, D)."""

    store: Store
    arrays: list[str]

    def __call__(self, item, slot):
        longest = int(self.store.rows[item].max())
        shape = (len(item), len(self.arrays), longest, self.store.width)
        out = slot[: 2 * int(np.prod(shape))].view(np.float16).reshape(shape)
        _, counts = self.store.read_batch(item, self.arrays, out=out)
        return shape, counts
