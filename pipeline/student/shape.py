"""The shape of an encoder: numbers a person types in, one checked `EncoderShape` out.

Heads and feed-forward units are given per block, because pruned students differ from block to block. Which published
students are which shape stands in docs/student.md.
"""

from typing import Literal

from pydantic import BaseModel, Field, NonNegativeInt, PositiveInt, model_validator

from cache.frames import FIELD, HOP

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


class PositionBias(BaseModel, frozen=True, extra="forbid"):
    """WavLM's gated relative position bias: one table for all blocks, a gate in each."""

    buckets: int = Field(ge=4, multiple_of=2)
    """Rows of the table, half of them for keys after the query (320)."""
    max_distance: PositiveInt
    """Frames from which on all distances share the last bucket (800)."""
    heads: PositiveInt
    """Columns of the table: the heads of the unpruned model, whose slices of the hidden state its gates read."""

    @model_validator(mode="after")
    def _distances_fit(self) -> "PositionBias":
        if self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"max_distance {self.max_distance} must be more than a quarter of the {self.buckets} buckets: up to there "
                "every distance has a bucket of its own"
            )
        return self


class EncoderShape(BaseModel, frozen=True, extra="forbid"):
    """Everything that fixes the tensors of an encoder and what they compute."""

    conv_channels: tuple[PositiveInt, ...] = Field(min_length=1)
    """Output channels of the convolutions; 512 seven times in the base models."""
    conv_spans: tuple[tuple[PositiveInt, PositiveInt], ...] | None
    """Kernel and stride of each convolution, which must see 400 samples every 320; null: the seven of wav2vec 2.0."""
    conv_bias: bool
    """Whether the convolutions have a bias (large models do)."""
    front_norm: Literal["group", "layer"]
    """group: each channel over time, after the first convolution only (base); layer: LayerNorm after every one (large)."""
    feature_norm: bool
    """LayerNorm between convolutions and projection; DistilHuBERT has none."""
    feature_norm_width: PositiveInt | None
    """Channels that norm counts, those pruned away as zeros; null: those that are there."""
    feature_scale: bool
    """A factor on each channel before that norm, which does not learn: what pruning left of its gates (DPHuBERT)."""
    projection: bool
    """Linear layer from the last convolution's channels to the width; thin students whose convolutions end in it have none."""
    normalise: bool
    """Bring every waveform to zero mean and unit variance first; goes with front_norm: layer."""
    width: PositiveInt
    """D, the width of every hidden state."""
    heads: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """Attention heads of each block; as many entries as blocks. 0: attention is its output bias."""
    head_width: PositiveInt
    """Width of one head: 64 in the base models; heads need not fill the width."""
    ffn: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """Feed-forward units of each block. 0: the feed-forward network is its output bias."""
    position_bias: PositionBias | None
    """WavLM's {buckets: 320, max_distance: 800, heads: 12}; null: positions come from the convolution alone."""
    kept_heads: tuple[tuple[NonNegativeInt, ...], ...] | None
    """Of each block, which columns of the table its heads are (a pruned WavLM); null: all of them, in order."""
    shares_attention: tuple[bool, ...] | None
    """Of each block, whether it attends with the map of the block before (ARMHuBERT); null: none does."""
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

    @property
    def spans(self) -> tuple[tuple[int, int], ...]:
        """Kernel and stride of each convolution."""
        return tuple(zip(KERNELS, STRIDES, strict=True)) if self.conv_spans is None else self.conv_spans

    def shares(self, block: int) -> bool:
        """Whether a block attends with the map of the block before; there is no such block after the last."""
        return self.shares_attention is not None and block < self.num_blocks and self.shares_attention[block]

    @model_validator(mode="after")
    def _frames_fit(self) -> "EncoderShape":
        if len(self.conv_channels) != len(self.spans):
            raise ValueError(f"conv_channels has {len(self.conv_channels)} entries for {len(self.spans)} convolutions")
        hop, field = 1, 1
        for kernel, stride in self.spans:
            field += (kernel - 1) * hop
            hop *= stride
        if (hop, field) != (HOP, FIELD):
            raise ValueError(
                f"conv_spans sees {field} samples every {hop}; students give a frame for {FIELD} samples every {HOP}, "
                "as their teachers do"
            )
        if not self.projection and self.conv_channels[-1] != self.width:
            raise ValueError(
                f"projection: false, but the last convolution has {self.conv_channels[-1]} channels and the width is "
                f"{self.width}"
            )
        if self.feature_norm_width is not None and not self.feature_norm:
            raise ValueError("feature_norm_width without feature_norm: there is no norm to count channels")
        if self.feature_norm_width is not None and self.feature_norm_width < self.conv_channels[-1]:
            raise ValueError(
                f"feature_norm_width {self.feature_norm_width} is less than the {self.conv_channels[-1]} channels there"
            )
        return self

    @model_validator(mode="after")
    def _heads_fit(self) -> "EncoderShape":
        per_block = {"kept_heads": self.kept_heads, "shares_attention": self.shares_attention}
        for name, entries in per_block.items():
            if entries is not None and len(entries) != len(self.heads):
                raise ValueError(f"{name} has {len(entries)} entries but there are {len(self.heads)} blocks")
        if self.kept_heads is not None and self.position_bias is None:
            raise ValueError("kept_heads without position_bias: there is no table they could be columns of")
        if self.position_bias is not None:
            total = self.position_bias.heads
            if self.width % total:
                raise ValueError(f"position_bias.heads {total} does not divide the width {self.width}")
            kept = self.kept_heads or (tuple(range(total)),) * len(self.heads)
            for block, (columns, heads) in enumerate(zip(kept, self.heads, strict=True)):
                if len(columns) != heads or len(set(columns)) != heads or any(c >= total for c in columns):
                    raise ValueError(
                        f"block {block} has {heads} heads but kept_heads gives {list(columns)}: name as many different "
                        f"columns, each below {total}"
                    )
        for block, shares in enumerate(self.shares_attention or ()):
            if shares and (block == 0 or self.heads[block] != self.heads[block - 1]):
                raise ValueError(f"shares_attention: no block before block {block} has its {self.heads[block]} heads")
        return self

    @model_validator(mode="after")
    def _sizes_fit(self) -> "EncoderShape":
        if len(self.ffn) != len(self.heads):
            raise ValueError(
                f"ffn has {len(self.ffn)} entries but heads has {len(self.heads)}: give one per block in both"
            )
        if self.width % self.position_groups:
            raise ValueError(f"position_groups {self.position_groups} does not divide the width {self.width}")
        return self
