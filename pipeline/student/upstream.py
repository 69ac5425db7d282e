"""A trained student as a source of features: its folder in, hidden states of padded batches out.

The same code extracts students and teachers; this is the student's side of that contract (`pipeline.extract.Upstream`).
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.student.checkpoint import load_student, student_digest
from pipeline.student.encoder import count_parameters
from pipeline.upstream import Outputs


class StudentUpstream:
    """An encoder in evaluation mode on one device, float32 throughout."""

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        self.device = torch.device(device)
        self.encoder = load_student(directory).to(self.device)
        self.digest = student_digest(directory)
        self.has_projection = True

    @property
    def num_layers(self) -> int:
        """Hidden states that `layers` gives: the blocks, and the input of the first."""
        return self.encoder.shape.num_blocks + 1

    @property
    def width(self) -> int:
        """D of every hidden state."""
        return self.encoder.shape.width

    def describe(self) -> dict[str, Any]:
        """What fixes the features, for the fingerprint of their store."""
        return {
            "kind": "student",
            "digest": self.digest,
            "layers": self.num_layers,
            "width": self.width,
            "num_params": count_parameters(self.encoder),
            "normalise": self.encoder.shape.normalise,
            "precision": "float32",
            "attention": "sdpa",
        }

    def layers(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> list[Float[Tensor, "B T D"]]:
        """Hidden states 0 to L; the same for an utterance in any batch."""
        return self.outputs(waves, samples).layers

    @torch.inference_mode()
    def outputs(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> Outputs:
        """The same with the projection."""
        return Outputs(*self.encoder(waves.to(self.device), samples.to(self.device)))


def load_student_upstream(directory: Path, device: str = "cpu") -> StudentUpstream:
    """Open a student's folder for extraction."""
    return StudentUpstream(directory, device)
