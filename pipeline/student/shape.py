"""The shape of an encoder: numbers a person types in, one checked `EncoderShape` out.

Heads and feed-forward units are given per block, because pruned students differ from block to block.
"""

from typing import Literal

from pydantic import BaseModel, Field, PositiveInt, model_validator

KERNELS = (10, 3, 3, 3, 3, 2, 2)  # of the seven convolutions: together they see 400 samples
STRIDES = (5, 2, 2, 2, 2, 2, 2)  # their product is the hop of 320 samples

Rate = Field(ge=0.0, lt=1.0)


class DropoutRates(BaseModel, frozen=True, extra="forbid"):
    """Dropout while training; 0 switches one off."""

    features: float = Rate
    """After the projection of the convolutional features."""
    hidden: float = Rate
    """Before the first block and on both residual branches."""
    attention: float = Rate
    """On the attention weights."""
    activation: float = Rate
    """Inside the feed-forward network."""


class EncoderShape(BaseModel, frozen=True, extra="forbid"):
    """Everything that fixes the tensors of an encoder and what they compute."""

    conv_channels: tuple[PositiveInt, ...] = Field(min_length=len(KERNELS), max_length=len(KERNELS))
    """Output channels of the seven convolutions; 512 seven times in the base models."""
    conv_bias: bool
    """Whether the convolutions have a bias (large models do)."""
    front_norm: Literal["group", "layer"]
    """group: each channel over time, after the first convolution only (base); layer: LayerNorm after every one (large)."""
    feature_norm: bool
    """LayerNorm between convolutions and projection; DistilHuBERT has none."""
    normalise: bool
    """Bring every waveform to zero mean and unit variance first; goes with front_norm: layer."""
    width: PositiveInt
    """D, the width of every hidden state."""
    heads: tuple[PositiveInt, ...] = Field(min_length=1)
    """Attention heads of each block; as many entries as blocks."""
    head_width: PositiveInt
    """Width of one head: 64 in every published model."""
    ffn: tuple[PositiveInt, ...] = Field(min_length=1)
    """Feed-forward units of each block."""
    position_kernel: PositiveInt
    """Frames that the positional convolution sees (128)."""
    position_groups: PositiveInt
    """Groups of the positional convolution (16)."""
    pre_norm: bool
    """LayerNorm before each sublayer (large, "stable") instead of after it (base)."""
    dropout: DropoutRates
    """Dropout while training."""

    @property
    def num_blocks(self) -> int:
        """L: there are L + 1 hidden states."""
        return len(self.heads)

    @model_validator(mode="after")
    def _sizes_fit(self) -> "EncoderShape":
        if len(self.ffn) != len(self.heads):
            raise ValueError(
                f"ffn has {len(self.ffn)} entries but heads has {len(self.heads)}: give one per block in both"
            )
        if self.width % self.position_groups:
            raise ValueError(f"position_groups {self.position_groups} does not divide the width {self.width}")
        return self
