"""The encoder: a padded batch of waveforms in, L + 1 hidden states out.

Convolutions, projection, positional convolution and transformer blocks of HuBERT, wav2vec 2.0 and their students, in
one file. Hidden state 0 is the input of the first block, hidden state i the output of block i, as in transformers 5. (With
`pre_norm` older versions, fairseq and s3prl give the last one after the encoder's norm; here that is `read_out`.)

An utterance gets the same numbers in any batch: statistics over time and attention leave padding out, and padded frames
are zero before the positional convolution looks at them. Frames past an utterance's end hold no meaning.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pipeline.padding import LengthMaskedGroupNorm, frame_mask, normalise_waves
from pipeline.student.shape import KERNELS, STRIDES, EncoderShape


class ScaleGradient(torch.autograd.Function):
    """The identity forwards; backwards the gradient times a factor (fairseq's `feature_grad_mult`)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """Pass `x` on."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Scale what comes back."""
        return grads[0] * ctx.factor, None


class ConvLayer(nn.Module):
    """Convolution, norm if it has one, GELU: (B, C, N) -> (B, C', (N - kernel) // stride + 1)."""

    def __init__(self, shape: EncoderShape, index: int) -> None:
        super().__init__()
        channels = (1, *shape.conv_channels)
        self.conv = nn.Conv1d(
            channels[index], channels[index + 1], KERNELS[index], STRIDES[index], bias=shape.conv_bias
        )
        self.norm: nn.Module | None = None
        if shape.front_norm == "layer":
            self.norm = nn.LayerNorm(channels[index + 1])
        elif index == 0:
            self.norm = LengthMaskedGroupNorm(channels[1])

    def forward(self, x: Float[Tensor, "B C N"], valid: Int64[Tensor, " B"]) -> Float[Tensor, "B E M"]:
        """`valid` counts the output positions that belong to each utterance."""
        x = self.conv(x)
        if isinstance(self.norm, LengthMaskedGroupNorm):
            self.norm.valid = valid
            x = self.norm(x.to(self.norm.weight.dtype))  # statistics in float32 also under bfloat16 autocast
        elif self.norm is not None:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return nn.functional.gelu(x)


class PositionalConv(nn.Module):
    """Relative positions from a wide grouped convolution over time, weight-normalised per kernel position."""

    def __init__(self, width: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.magnitude = nn.Parameter(torch.ones(1, 1, kernel))
        self.direction = nn.Parameter(torch.empty(width, width // groups, kernel))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        """What to add to `x`."""
        kernel = self.direction.shape[2]
        length = torch.linalg.vector_norm(self.direction, dim=(0, 1), keepdim=True)
        weight = self.direction * (self.magnitude / length)
        y = nn.functional.conv1d(x.transpose(1, 2), weight, self.bias, padding=kernel // 2, groups=self.groups)
        return nn.functional.gelu(y[:, :, : x.shape[1]]).transpose(1, 2)  # an even kernel gives one frame too many


class Attention(nn.Module):
    """Multi-head self-attention; its heads need not fill the width."""

    def __init__(self, width: int, heads: int, head_width: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, heads * head_width)
        self.key = nn.Linear(width, heads * head_width)
        self.value = nn.Linear(width, heads * head_width)
        self.out = nn.Linear(heads * head_width, width)

    def forward(self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B 1 1 T"]) -> Float[Tensor, "B T D"]:
        """Attend to the frames where `mask` is true."""
        # (B, T, H * W) -> (B, H, T, W)
        query, key, value = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        context = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.out(context.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """One transformer block, with its norms after (base) or before (large) the two sublayers."""

    def __init__(self, shape: EncoderShape, index: int) -> None:
        super().__init__()
        self.pre_norm = shape.pre_norm
        self.attention = Attention(shape.width, shape.heads[index], shape.head_width, shape.dropout.attention)
        self.attention_norm = nn.LayerNorm(shape.width)
        self.ffn_up = nn.Linear(shape.width, shape.ffn[index])
        self.ffn_down = nn.Linear(shape.ffn[index], shape.width)
        self.ffn_norm = nn.LayerNorm(shape.width)
        self.activation_dropout = nn.Dropout(shape.dropout.activation)
        self.hidden_dropout = nn.Dropout(shape.dropout.hidden)

    def forward(self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B 1 1 T"]) -> Float[Tensor, "B T D"]:
        """One hidden state in, the next one out."""
        if self.pre_norm:
            x = x + self.hidden_dropout(self.attention(self.attention_norm(x), mask))
            return x + self._feed_forward(self.ffn_norm(x))
        x = self.attention_norm(x + self.hidden_dropout(self.attention(x, mask)))
        return self.ffn_norm(x + self._feed_forward(x))

    def _feed_forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.hidden_dropout(self.ffn_down(self.activation_dropout(nn.functional.gelu(self.ffn_up(x)))))


class Encoder(nn.Module):
    """A student, or a teacher's trunk under the student's names.

    `feature_grad_mult` scales the gradient that reaches the convolutions (0.1 in HuBERT and DistilHuBERT, 1 leaves it).
    The weights are PyTorch's defaults, except for `direction`, until `initialise` or a state dict sets them.
    """

    def __init__(self, shape: EncoderShape, feature_grad_mult: float = 1.0) -> None:
        super().__init__()
        self.shape, self.feature_grad_mult = shape, feature_grad_mult
        channels = shape.conv_channels[-1]
        self.front = nn.ModuleList(ConvLayer(shape, i) for i in range(len(KERNELS)))
        self.feature_norm = nn.LayerNorm(channels) if shape.feature_norm else None
        self.projection = nn.Linear(channels, shape.width)
        self.position = PositionalConv(shape.width, shape.position_kernel, shape.position_groups)
        self.norm = nn.LayerNorm(shape.width)
        self.blocks = nn.ModuleList(Block(shape, i) for i in range(shape.num_blocks))
        self.feature_dropout = nn.Dropout(shape.dropout.features)
        self.hidden_dropout = nn.Dropout(shape.dropout.hidden)
        nn.init.normal_(self.position.direction)

    def forward(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> list[Float[Tensor, "B T D"]]:
        """Hidden states 0 to L of `waves`, of which the first `samples` of each row count."""
        if self.shape.normalise:
            waves = normalise_waves(waves, samples)
        features, frames = self._features(waves, samples)
        mask = frame_mask(frames, features.shape[1])  # (B, T)
        if self.feature_norm is not None:
            features = self.feature_norm(features)
        x = self.feature_dropout(self.projection(features))
        x = x.masked_fill(~mask[..., None], 0.0)  # what the positional convolution would see past the end
        x = x + self.position(x)
        x = self.hidden_dropout(x if self.shape.pre_norm else self.norm(x))
        states, keys = [x], mask[:, None, None, :]
        for block in self.blocks:
            x = block(x, keys)
            states.append(x)
        return states

    def read_out(self, states: list[Float[Tensor, "B T D"]]) -> Float[Tensor, "B T D"]:
        """What heads read: the last hidden state, normalised (`last_hidden_state` in transformers)."""
        return self.norm(states[-1]) if self.shape.pre_norm else states[-1]

    def _features(
        self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]
    ) -> tuple[Float[Tensor, "B T C"], Int64[Tensor, " B"]]:
        x, valid = waves[:, None], samples
        for layer, kernel, stride in zip(self.front, KERNELS, STRIDES, strict=True):
            valid = (valid - kernel) // stride + 1
            x = layer(x, valid)
        x = x.transpose(1, 2)  # (B, C, T) -> (B, T, C)
        return (ScaleGradient.apply(x, self.feature_grad_mult) if self.feature_grad_mult != 1.0 else x), valid


@torch.no_grad()
def initialise(encoder: Encoder, generator: torch.Generator) -> None:
    """Draw every weight afresh, as fairseq and transformers do for HuBERT: a pure function of the generator.

    Linear layers N(0, 0.02) with zero bias, convolutions Kaiming normal, positional convolution N(0, 4 / (K D)),
    norms 1 and 0. The weight norm of the positional convolution starts at the length of its direction.
    """
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02, generator=generator)
        elif isinstance(module, nn.Conv1d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        elif isinstance(module, nn.LayerNorm | LengthMaskedGroupNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, PositionalConv):
            width, _, kernel = module.direction.shape
            nn.init.normal_(module.direction, std=2.0 / (kernel * width) ** 0.5, generator=generator)
            module.magnitude.copy_(torch.linalg.vector_norm(module.direction, dim=(0, 1), keepdim=True))
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def count_parameters(module: nn.Module) -> int:
    """Numbers that training may change."""
    return sum(p.numel() for p in module.parameters())
