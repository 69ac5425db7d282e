"""A teacher's forward: its pinned folder and padded waveforms in, every layer out, the same in any batch.

transformers reproduces fairseq, where an utterance's features depend on how far its batch was padded: the group norm of
base models counts the zeros, and per-utterance normalisation and attention see them unless told not to. Here all three see
the valid samples alone, so a cached target is what the teacher gives for that utterance by itself.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cache.errors import StoreError
from pipeline.padding import LengthMaskedGroupNorm, frame_mask, frames_of_samples, normalise_waves
from pipeline.teachers.families import FAMILIES, KERNELS, STRIDES, build_model
from pipeline.teachers.pinned import Pinned, load_pinned

# WavLM's own call, a boolean padding mask beside a float bias: PyTorch adds them as meant, and says so once a process.
warnings.filterwarnings("ignore", message="Support for mismatched key_padding_mask and attn_mask")


class Teacher:
    """A frozen HuBERT, WavLM or wav2vec 2.0 in evaluation mode and float32 (`pipeline.upstream.Upstream`)."""

    def __init__(self, model: nn.Module, pinned: Pinned, device: torch.device) -> None:
        self.pinned, self.device = pinned, device
        self.num_layers, self.width = pinned.layers, pinned.width
        self.norm: LengthMaskedGroupNorm | None = None
        first: Any = model.feature_extractor.conv_layers[0]  # type: ignore[union-attr, index]
        if isinstance(getattr(first, "layer_norm", None), nn.GroupNorm):
            self.norm = LengthMaskedGroupNorm(first.layer_norm.num_channels, first.layer_norm.eps)
            self.norm.load_state_dict(first.layer_norm.state_dict())
            first.layer_norm = self.norm
        # eval: no dropout, no LayerDrop, no SpecAugment
        self.model = model.eval().requires_grad_(False).to(device)

    def describe(self) -> dict[str, Any]:
        """See `Upstream`. The batch is not in it: no batch changes a number by more than rounding."""
        return {
            "kind": self.pinned.family,
            "digest": self.pinned.digest,
            "normalise": self.pinned.normalise,
            "layers": self.num_layers,
            "width": self.width,
            "num_params": self.pinned.num_params,
            "precision": "float32",
            "attention": FAMILIES[self.pinned.family][2],
        }

    @torch.inference_mode()
    def layers(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> list[Float[Tensor, "B T D"]]:
        """Layer 0, the input of the first block, to L, the output of the last; of row b the first T(samples[b]) count."""
        waves, samples = waves.to(self.device), samples.to(self.device)
        valid = frame_mask(samples, waves.shape[1])
        waves = normalise_waves(waves, samples) if self.pinned.normalise else waves.masked_fill(~valid, 0.0)
        if self.norm is not None:
            self.norm.valid = torch.div(samples - KERNELS[0], STRIDES[0], rounding_mode="floor") + 1
        out = self.model(waves, attention_mask=valid.long(), output_hidden_states=True)
        # All are raw outputs of blocks, in pre-norm models (large) too: the final norm is in `last_hidden_state` alone
        states = list(out.hidden_states)
        frames = int(frames_of_samples(samples).max())
        if len(states) != self.num_layers or states[-1].shape[1] < frames:
            raise StoreError(
                f"{self.pinned.family} gave {len(states)} layers of {states[-1].shape[1]} frames where {self.num_layers} of "
                f"{frames} are due; transformers {transformers.__version__} counts differently, install another version"
            )
        return states


def load_teacher(directory: Path, device: str = "cpu") -> Teacher:
    """Open a teacher that `decant teacher` pinned.

    Raises:
        StoreError: missing, damaged or changed since it was pinned.
    """
    pinned, config, weights = load_pinned(Path(directory))
    if device.startswith("cuda"):
        # TF32 keeps ten bits of a product: 1e-3 where the fingerprint says float32
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
    model = build_model(config, f"{directory}/config.json", "cpu")
    # masked_spec_embed stands for masked frames in pretraining; published trunks come with and without it
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unfit := [name for name in (*missing, *unexpected) if name != "masked_spec_embed"]:
        raise StoreError(
            f"{directory}: config.json and model.safetensors disagree about {', '.join(unfit)}; pin it again"
        )
    return Teacher(model, pinned, torch.device(device))
