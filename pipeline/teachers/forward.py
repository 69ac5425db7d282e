"""A teacher's forward: its pinned folder and padded waveforms in, every layer on the store's frames out, the same in any batch.

So a cached target is what the teacher gives for that utterance by itself, and frame t of any two teachers is the same moment.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cache.errors import StoreError
from pipeline.devices import without_tf32
from pipeline.teachers.families import FAMILIES, build_model
from pipeline.teachers.grid import STORE, onto_store
from pipeline.teachers.inputs import HEARS, Waveform
from pipeline.teachers.pinned import Pinned, load_pinned
from pipeline.upstream import Outputs


class Teacher:
    """A frozen model of one of the families in evaluation mode and float32 (`pipeline.upstream.Upstream`)."""

    def __init__(self, model: nn.Module, pinned: Pinned, device: torch.device) -> None:
        self.pinned, self.device = pinned, device
        self.num_layers, self.width = pinned.layers, pinned.width
        self.grid = FAMILIES[pinned.family].grid
        hears, self.input = HEARS[pinned.family]
        self.hear = hears(model, pinned.normalise)
        self.has_projection = isinstance(self.hear, Waveform)  # w2v-BERT's is layer 0; Whisper has none
        # eval: no dropout, no LayerDrop, no SpecAugment
        self.model = model.eval().requires_grad_(False).to(device)

    def describe(self) -> dict[str, Any]:
        """See `Upstream`. The batch is not in it: no batch changes a number by more than rounding."""
        described = {
            "kind": self.pinned.family,
            "digest": self.pinned.digest,
            "normalise": self.pinned.normalise,
            "layers": self.num_layers,
            "width": self.width,
            "num_params": self.pinned.num_params,
            "precision": "float32",
            "attention": FAMILIES[self.pinned.family].attention,
        }
        if self.grid == STORE:  # as described before there were others: existing stores keep their keys
            return described
        grid = {"hop": self.grid.hop, "field": self.grid.field, "centre": self.grid.centre}
        return described | {"input": self.input, "frames": grid | {"align": self.pinned.align}}

    def layers(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> list[Float[Tensor, "B T D"]]:
        """Layer 0, the input of the first block, to L, the output of the last; of row b the first T(samples[b]) count.

        Raises:
            DataError: an utterance that is too short or too long for the model.
        """
        return self.outputs(waves, samples).layers

    @torch.inference_mode()
    def outputs(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> Outputs:
        """The same with the projection, whose padded frames are zero.

        Raises:
            DataError: an utterance that is too short or too long for the model.
        """
        waves, samples = waves.to(self.device), samples.to(self.device)
        projection, states = self.hear(waves, samples)
        frames = int(self.grid.num_frames(samples).max())
        if len(states) != self.num_layers or states[-1].shape[1] < frames:
            raise StoreError(
                f"{self.pinned.family} gave {len(states)} layers of {states[-1].shape[1]} frames where {self.num_layers} of "
                f"{frames} are due; transformers {transformers.__version__} counts differently, install another version"
            )
        if self.pinned.align is not None:
            return Outputs(None, onto_store(states, self.grid, samples, self.pinned.align))
        return Outputs(projection, states)


def load_teacher(directory: Path, device: str = "cpu") -> Teacher:
    """Open a teacher that `decant teacher` pinned.

    Raises:
        StoreError: missing, damaged or changed since it was pinned.
    """
    pinned, config, weights = load_pinned(Path(directory))
    if device.startswith("cuda"):
        # TF32 keeps ten bits of a product: 1e-3 where the fingerprint says float32
        without_tf32()
    model = build_model(config, f"{directory}/config.json", "cpu")
    # masked_spec_embed stands for masked frames in pretraining; published trunks come with and without it
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unfit := [name for name in (*missing, *unexpected) if name != "masked_spec_embed"]:
        raise StoreError(
            f"{directory}: config.json and model.safetensors disagree about {', '.join(unfit)}; pin it again"
        )
    return Teacher(model, pinned, torch.device(device))
