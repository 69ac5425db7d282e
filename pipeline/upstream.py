"""What every model that can be extracted or probed looks like: waveforms in, one tensor per layer out."""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Float, Int64
from torch import Tensor


@runtime_checkable
class Upstream(Protocol):
    """A frozen model at 50 frames per second: a teacher, a student, or log-mel features."""

    @property
    def num_layers(self) -> int:
        """Layers it gives, the input of the first block (layer 0) included."""
        ...

    @property
    def width(self) -> int:
        """Channels of every layer."""
        ...

    def describe(self) -> dict[str, Any]:
        """All that decides its numbers (kind, digest, normalisation, precision, attention), for the store's fingerprint."""
        ...

    def layers(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> list[Float[Tensor, "B T D"]]:
        """All layers of a padded batch. Each utterance's frames are what it gives alone; what follows them is undefined."""
        ...
