"""The encoder: a padded batch of waveforms in, L + 1 hidden states out.

Convolutions, projection, positional convolution and transformer blocks of HuBERT, wav2vec 2.0, WavLM and their students,
pruned ones too: what a shape asks for (docs/student.md). Hidden state 0 is the input of the first block, hidden state i
the output of block i, as in transformers 5. (With `pre_norm` older versions, fairseq and s3prl give the last one after the
encoder's norm; here that is `read_out`.)

An utterance gets the same numbers in any batch: statistics over time and attention leave padding out, and padded frames
are zero before the positional convolution looks at them. Frames past an utterance's end hold no meaning.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pipeline.padding import LengthMaskedGroupNorm, frame_mask, normalise_waves
from pipeline.student.attention import Attention, Context, OutputBias, RelativePositions
from pipeline.student.front import ConvLayer, CountingNorm, ScaleGradient
from pipeline.student.shape import EncoderShape


class States(NamedTuple):
    """What an encoder computes of a batch."""

    projection: Float[Tensor, "B T D"]
    """Features after projection and dropout, before anything is hidden and before the positional convolution; padded
    frames are zero. It is what DPHuBERT calls layer 0."""
    hidden: list[Float[Tensor, "B T D"]]
    """Hidden states 0 to L."""


class GateValues(NamedTuple):
    """Factors on what may be pruned; 1 changes nothing, 0 is as good as pruned."""

    conv: list[Float[Tensor, " C"]]
    """Of each convolution, on its channels after GELU."""
    heads: list[Float[Tensor, " H"]]
    """Of each block, on what its heads read, before the output projection."""
    ffn: list[Float[Tensor, " F"]]
    """Of each block, on its feed-forward units after GELU."""


class Hidden(NamedTuple):
    """What of the projected features is set to zero before the encoder looks at them (as SpecAugment does); None: nothing."""

    frames: Bool[Tensor, "B T"] | None
    """Whole frames."""
    channels: Bool[Tensor, "B D"] | None
    """Channels, through all frames of an utterance."""


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


class Block(nn.Module):
    """One transformer block, with its norms after (base) or before (large) the two sublayers."""

    def __init__(self, shape: EncoderShape, index: int) -> None:
        super().__init__()
        self.pre_norm = shape.pre_norm
        self.attention = Attention(shape, index)
        self.attention_norm = nn.LayerNorm(shape.width)
        units = shape.ffn[index]
        self.ffn_up = nn.Linear(shape.width, units) if units else None
        self.ffn_down = nn.Linear(units, shape.width) if units else OutputBias(shape.width)
        self.ffn_norm = nn.LayerNorm(shape.width)
        self.activation_dropout = nn.Dropout(shape.dropout.activation)
        self.hidden_dropout = nn.Dropout(shape.dropout.hidden)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        context: Context,
        head_gate: Float[Tensor, " H"] | None,
        ffn_gate: Float[Tensor, " F"] | None,
    ) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B H T T"] | None]:
        """One hidden state in, the next one out, and the attention map if the next block shares it."""
        attended, weights = self.attention(self.attention_norm(x) if self.pre_norm else x, context, head_gate)
        x = x + self.hidden_dropout(attended)
        if self.pre_norm:
            return x + self._feed_forward(self.ffn_norm(x), ffn_gate), weights
        x = self.attention_norm(x)
        return self.ffn_norm(x + self._feed_forward(x, ffn_gate)), weights

    def _feed_forward(self, x: Float[Tensor, "B T D"], gate: Float[Tensor, " F"] | None) -> Float[Tensor, "B T D"]:
        if self.ffn_up is None:
            return self.hidden_dropout(self.ffn_down(x))
        units = nn.functional.gelu(self.ffn_up(x))
        units = units if gate is None else units * gate
        return self.hidden_dropout(self.ffn_down(self.activation_dropout(units)))


class Encoder(nn.Module):
    """A student, or a teacher's trunk under the student's names.

    `feature_grad_mult` scales the gradient that reaches the convolutions (0.1 in HuBERT and DistilHuBERT, 1 leaves it).
    The weights are PyTorch's defaults, except for `direction`, until `initialise` or a state dict sets them.
    """

    def __init__(self, shape: EncoderShape, feature_grad_mult: float = 1.0) -> None:
        super().__init__()
        self.shape, self.feature_grad_mult = shape, feature_grad_mult
        channels, counted = shape.conv_channels[-1], shape.feature_norm_width
        self.front = nn.ModuleList(ConvLayer(shape, i) for i in range(len(shape.spans)))
        self.feature_scale: nn.Parameter | None = None
        if shape.feature_scale:
            self.feature_scale = nn.Parameter(torch.ones(channels), requires_grad=False)
        self.feature_norm: nn.LayerNorm | None = None
        if shape.feature_norm:
            self.feature_norm = nn.LayerNorm(channels) if counted is None else CountingNorm(channels, counted)
        self.projection = nn.Linear(channels, shape.width) if shape.projection else None
        self.position = PositionalConv(shape.width, shape.position_kernel, shape.position_groups)
        self.norm = nn.LayerNorm(shape.width)
        self.blocks = nn.ModuleList(Block(shape, i) for i in range(shape.num_blocks))
        self.feature_dropout = nn.Dropout(shape.dropout.features)
        self.hidden_dropout = nn.Dropout(shape.dropout.hidden)
        nn.init.normal_(self.position.direction)
        self.position_bias = RelativePositions(shape.position_bias) if shape.position_bias is not None else None

    def forward(
        self,
        waves: Float[Tensor, "B S"],
        samples: Int64[Tensor, " B"],
        gates: GateValues | None = None,
        hide: Hidden | None = None,
    ) -> States:
        """The states of `waves`, of which the first `samples` of each row count.

        A channel of the last convolution whose gate is 0 is zero behind the feature norm too, so that it can be removed
        without a trace; its zeros still count in the norm's statistics (`feature_norm_width`).
        """
        if self.shape.normalise:
            waves = normalise_waves(waves, samples)
        features, frames = self._features(waves, samples, gates)
        mask = frame_mask(frames, features.shape[1])  # (B, T)
        if self.feature_scale is not None:
            features = features * self.feature_scale
        if self.feature_norm is not None:
            features = self.feature_norm(features)
            if gates is not None:
                features = features * (gates.conv[-1] != 0)
        x = self.feature_dropout(features if self.projection is None else self.projection(features))
        x = projection = x.masked_fill(~mask[..., None], 0.0)  # what the positional convolution would see past the end
        if hide is not None and hide.frames is not None:
            x = x.masked_fill(hide.frames[:, :, None], 0.0)
        if hide is not None and hide.channels is not None:
            x = x.masked_fill(hide.channels[:, None, :], 0.0)
        x = x + self.position(x)
        x = self.hidden_dropout(x if self.shape.pre_norm else self.norm(x))
        bias = None if self.position_bias is None else self.position_bias(x.shape[1])
        hidden, keys, weights = [x], mask[:, None, None, :], None
        for i, block in enumerate(self.blocks):
            head_gate, ffn_gate = (None, None) if gates is None else (gates.heads[i], gates.ffn[i])
            x, weights = block(x, Context(keys, bias, weights), head_gate, ffn_gate)
            hidden.append(x)
        return States(projection, hidden)

    def read_out(self, states: States) -> Float[Tensor, "B T D"]:
        """What heads read: the last hidden state, normalised (`last_hidden_state` in transformers)."""
        return self.norm(states.hidden[-1]) if self.shape.pre_norm else states.hidden[-1]

    def _features(
        self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"], gates: GateValues | None
    ) -> tuple[Float[Tensor, "B T C"], Int64[Tensor, " B"]]:
        x, valid = waves[:, None], samples
        for i, (layer, (kernel, stride)) in enumerate(zip(self.front, self.shape.spans, strict=True)):
            valid = (valid - kernel) // stride + 1
            x = layer(x, valid, None if gates is None else gates.conv[i])
        x = x.transpose(1, 2)  # (B, C, T) -> (B, T, C)
        return (ScaleGradient.apply(x, self.feature_grad_mult) if self.feature_grad_mult != 1.0 else x), valid


@torch.no_grad()
def initialise(encoder: Encoder, generator: torch.Generator) -> None:
    """Draw every weight afresh, as fairseq and transformers do for HuBERT: a pure function of the generator.

    Linear layers N(0, 0.02) with zero bias, convolutions Kaiming normal, positional convolution N(0, 4 / (K D)),
    norms 1 and 0, the table of position biases N(0, 0.02) and its gates' scale 1. The weight norm of the positional
    convolution starts at the length of its direction.
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
        elif isinstance(module, RelativePositions):
            nn.init.normal_(module.table, std=0.02, generator=generator)
        elif isinstance(module, Attention) and module.gate is not None:
            nn.init.ones_(module.gate_scale)
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def count_parameters(module: nn.Module) -> int:
    """Numbers that training may change."""
    return sum(p.numel() for p in module.parameters())
