"""The front of an encoder: padded waveforms in, features of 400 samples every 320 out, and the parts they need."""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.padding import LengthMaskedGroupNorm
from pipeline.student.shape import EncoderShape


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
        kernel, stride = shape.spans[index]
        self.conv = nn.Conv1d(channels[index], channels[index + 1], kernel, stride, bias=shape.conv_bias)
        self.norm: nn.Module | None = None
        if shape.front_norm == "layer":
            self.norm = nn.LayerNorm(channels[index + 1])
        elif index == 0:
            self.norm = LengthMaskedGroupNorm(channels[1])

    def forward(
        self, x: Float[Tensor, "B C N"], valid: Int64[Tensor, " B"], gate: Float[Tensor, " E"] | None
    ) -> Float[Tensor, "B E M"]:
        """`valid` counts the output positions that belong to each utterance; `gate` multiplies the channels."""
        x = self.conv(x)
        if isinstance(self.norm, LengthMaskedGroupNorm):
            x = self.norm(x.to(self.norm.weight.dtype), valid)  # float32 statistics also under bfloat16 autocast
        elif self.norm is not None:
            x = self.norm(x.transpose(1, 2)).transpose(1, 2)
        x = nn.functional.gelu(x)
        return x if gate is None else x * gate[:, None]


class CountingNorm(nn.LayerNorm):
    """LayerNorm over more channels than are there: those missing count as zeros in its mean and its variance."""

    def __init__(self, channels: int, counted: int) -> None:
        super().__init__(channels)
        self.counted = counted

    def forward(self, input: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """Normalise the channels that are there."""
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input  # as LayerNorm under autocast
        mean = x.sum(-1, keepdim=True) / self.counted
        centred = x - mean
        missing = (self.counted - x.shape[-1]) * mean.square()
        variance = (centred.square().sum(-1, keepdim=True) + missing) / self.counted
        return centred * torch.rsqrt(variance + self.eps) * self.weight + self.bias
