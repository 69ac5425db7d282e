"""What every model that can be extracted or probed looks like: waveforms in, one tensor per layer out."""

from typing import Any, NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor


class Outputs(NamedTuple):
    """What one forward gives of a padded batch; what follows the frames of an utterance is undefined."""

    projection: Float[Tensor, "B T D"] | None
    """Projected features before positions are added to them (DPHuBERT's layer 0); None of a model that has none."""
    layers: list[Float[Tensor, "B T D"]]
    """Layer 0, the input of the first block, to L, the output of the last."""


@runtime_checkable
class Upstream(Protocol):
    """A frozen model at 50 frames per second: a teacher, a student, or log-mel features."""

    @property
    def num_layers(self) -> int:
        """Layers it gives, the input of the first block (layer 0) included."""
        ...

    @property
    def width(self) -> int:
        """Channels of every layer, and of the projection."""
        ...

    @property
    def has_projection(self) -> bool:
        """Whether it adds positions to projected features, so that these are something else than layer 0."""
        ...

    def describe(self) -> dict[str, Any]:
        """All that decides its numbers (kind, digest, normalisation, precision, attention), for the store's fingerprint."""
        ...

    def layers(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> list[Float[Tensor, "B T D"]]:
        """All layers of a padded batch. Each utterance's frames are what it gives alone; what follows them is undefined.

        Several threads may call it at a time: what a forward leaves in the model for its own later steps is per thread.
        """
        ...

    def outputs(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> Outputs:
        """All layers and the projection, of one forward."""
        ...


class LayersAlone:
    """Makes an `Upstream` of a model that has layers and no projection."""

    has_projection = False

    def layers(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> list[Float[Tensor, "B T D"]]:
        """See `Upstream`."""
        raise NotImplementedError

    def outputs(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> Outputs:
        """See `Upstream`."""
        return Outputs(None, self.layers(waves, samples))
