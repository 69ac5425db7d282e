"""What an objective of pretraining says of one batch."""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class Prediction(NamedTuple):
    """Loss and accuracy of one batch."""

    loss: Float[Tensor, ""]
    """What is minimised."""
    accuracy: Float[Tensor, ""]
    """Part of the hidden frames that are named rightly: their unit, or the frame itself among distractors."""
