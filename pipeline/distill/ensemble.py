"""Stored rows of all teachers of a batch in, the frames that the heads are compared with out, on the device.

Rows are decoded, layers of a group averaged, targets normalised, teachers combined, all in float32. Teachers are paired
frame by frame: their stores hold the same utterances on the same grid, so nothing has to be aligned.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from cache.ragged import Store
from pipeline.codecs import Decoder
from pipeline.layers.ensembles import AnyEnsemble, Average, Concat, members
from pipeline.layers.targets import StoreTargets, Targets


class TargetMaker:
    """Makes the targets of one ensemble."""

    def __init__(
        self, ensemble: AnyEnsemble, targets: Targets, stores: Sequence[Store], device: torch.device | str
    ) -> None:
        """Bring tables and statistics to the device.

        Args:
            ensemble: how teachers are combined.
            targets: what is read of each store.
            stores: the stores, in the same order.
            device: where rows will be.

        Raises:
            StoreError: a table is missing or damaged.
        """
        self.ensemble = ensemble
        self.shares = [member.share for member in members(ensemble)]
        self._readers = [_Reader(t, store, device) for t, store in zip(targets.stores, stores, strict=True)]

    def __call__(self, rows: Sequence[Shaped[Tensor, "B _ T _"]]) -> list[Float[Tensor, "B _ T _"]]:
        """Targets (B, N, T, E) of each group of heads; what stands after an utterance's end means nothing."""
        frames = [read(of_store) for read, of_store in zip(self._readers, rows, strict=True)]
        if isinstance(self.ensemble, Concat):
            return [torch.cat(frames, dim=3)]
        if isinstance(self.ensemble, Average):
            mean = self.shares[0] * frames[0]
            for share, of_teacher in zip(self.shares[1:], frames[1:], strict=True):
                mean = mean + share * of_teacher
            return [mean]
        return frames


class _Reader:
    """Rows of one store to frames of its targets, normalised where statistics are given."""

    def __init__(self, targets: StoreTargets, store: Store, device: torch.device | str) -> None:
        self._decode = Decoder(store, list(targets.arrays), device)
        place = {array: n for n, array in enumerate(targets.arrays)}
        self._made_of = [[place[array] for array in target] for target in targets.targets]
        self._as_read = self._made_of == [[n] for n in range(len(place))]
        self._statistics: tuple[Tensor, Tensor] | None = None
        if targets.statistics is not None:
            mean, std = targets.statistics.mean, targets.statistics.std
            self._statistics = torch.tensor(mean, device=device)[:, None], torch.tensor(std, device=device)[:, None]

    def __call__(self, rows: Shaped[Tensor, "B A T W"]) -> Float[Tensor, "B N T D"]:
        frames = self._decode(rows)  # (B, A, T, D): of every array
        if not self._as_read:
            frames = torch.stack([_mean([frames[:, n] for n in target]) for target in self._made_of], dim=1)
        if self._statistics is None:
            return frames
        mean, std = self._statistics  # (N, 1, D)
        return (frames - mean) / std


def _mean(layers: Sequence[Float[Tensor, "B T D"]]) -> Float[Tensor, "B T D"]:
    """Added one after another, as extraction does when it keeps a mean."""
    first, *others = layers
    return sum(others, first) / len(layers) if others else first
