"""Frame grids: where a model's frames lie in time in, the same layers where the store wants its frames out.

A store holds frame t of every model at the same moment: it sees samples [320 t, 320 t + 400), as the convolutions of HuBERT,
wav2vec 2.0, WavLM and data2vec do. Models that hear mel spectra have grids of their own. Two grids never pair by trimming or
by chance: the setting `align` says how frames are brought to the store's, and what was done is in the fingerprint.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from cache.frames import FIELD, HOP, RATE_HZ

Align = Literal["nearest", "linear"]


@dataclass(frozen=True, slots=True)
class Grid:
    """Frame i needs the first `field + hop * i` samples and is centred on sample `centre + hop * i`."""

    hop: int
    field: int
    centre: int

    @property
    def rate_hz(self) -> float:
        """Frames per second."""
        return RATE_HZ / self.hop

    def num_frames(self, samples: Int64[Tensor, " B"]) -> Int64[Tensor, " B"]:
        """Frames of each waveform; 0 if it is too short for one."""
        return (torch.div(samples - self.field, self.hop, rounding_mode="floor") + 1).clamp(min=0)

    def __str__(self) -> str:
        return f"every {self.hop} samples from sample {self.centre} on, in what has {self.field} samples"


STORE = Grid(HOP, FIELD, FIELD // 2)


def onto_store(
    layers: Sequence[Float[Tensor, "B T D"]], grid: Grid, samples: Int64[Tensor, " B"], align: Align
) -> list[Float[Tensor, "B F D"]]:
    """Every layer at the centres of the store's frames, from the frame nearest in time or linearly between its two neighbours.

    Only frames that the utterance has are read, so no batch changes a number. Before the first and after the last of them
    that frame is held: for the grids here for less than one hop.
    """
    have = grid.num_frames(samples)
    target = torch.arange(int(STORE.num_frames(samples).max()), device=samples.device)
    at = (STORE.centre + STORE.hop * target - grid.centre).double() / grid.hop  # in frames of the model
    at = at[None, :].clamp(min=0).minimum((have - 1)[:, None].double())  # (B, F)
    if align == "nearest":
        return [_take(layer, (at + 0.5).floor().long()) for layer in layers]
    before = at.floor().long()
    after = (before + 1).minimum((have - 1)[:, None])
    share = (at - before)[..., None].to(layers[0].dtype)  # of the later one
    return [torch.lerp(_take(layer, before), _take(layer, after), share) for layer in layers]


def _take(layer: Float[Tensor, "B T D"], index: Int64[Tensor, "B F"]) -> Float[Tensor, "B F D"]:
    return layer.gather(1, index[..., None].expand(-1, -1, layer.shape[2]))
