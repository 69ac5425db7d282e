"""Row counts of utterances in, the place of each in a store out, before anything is computed.

Utterances keep their order. A shard holds whole utterances: one that does not fit into what is left of a shard starts
the next, and the rows left over are fill. So the plan is a pure function of the row counts and the shard size, and a
shard can be made, retried and committed without knowing the others.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from cache.errors import SettingsError


@dataclass(frozen=True, eq=False)
class StorePlan:
    """Where every utterance lies."""

    rows: Int64[np.ndarray, " U"]
    start: Int64[np.ndarray, " U"]
    """First row of each utterance, counted over the whole array."""
    first: Int64[np.ndarray, " N"]
    """First utterance of each of the N shards."""
    shard_rows: int

    @property
    def num_shards(self) -> int:
        """Shards of every array of the store."""
        return len(self.first)

    @property
    def num_rows(self) -> int:
        """Rows of every array: up to the end of the last utterance, fill between shards included."""
        return int(self.start[-1] + self.rows[-1])

    def utterances(self, shard: int) -> range:
        """The utterances of one shard, in order."""
        end = len(self.rows) if shard + 1 == self.num_shards else int(self.first[shard + 1])
        return range(int(self.first[shard]), end)

    def used_rows(self, shard: int) -> int:
        """Rows of a shard up to the end of its last utterance."""
        last = self.utterances(shard)[-1]
        return int(self.start[last] + self.rows[last]) - shard * self.shard_rows


def plan_rows(rows: Int64[np.ndarray, " U"], shard_rows: int) -> StorePlan:
    """Place utterances of `rows` rows each into shards of `shard_rows` rows.

    Raises:
        SettingsError: an utterance is larger than a shard.
    """
    if int(rows.max()) > shard_rows:
        u = int(rows.argmax())
        raise SettingsError(
            f"utterance number {u} has {rows[u]} rows, more than a shard of {shard_rows}; set larger shards"
        )
    before = np.concatenate([[0], np.cumsum(rows)])  # rows before each utterance if nothing were fill
    first = [0]
    while True:  # one step a shard: the last utterance that ends inside it
        end = int(np.searchsorted(before, before[first[-1]] + shard_rows, side="right")) - 1
        if end == len(rows):
            break
        first.append(end)
    firsts = np.array(first, dtype=np.int64)
    shard = np.repeat(np.arange(len(firsts)), np.diff(np.append(firsts, len(rows))))
    start = before[:-1] - before[firsts][shard] + shard * shard_rows
    return StorePlan(rows=rows, start=start.astype(np.int64), first=firsts, shard_rows=shard_rows)
