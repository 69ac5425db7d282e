"""Frames of utterances of any length in, one vector for each voice out: an x-vector network over a weighted sum of layers.

SUPERB's head of speaker verification (s3prl, `downstream/sv_voxceleb1`; Snyder et al. 2018): Linear to the width of the
head, five time-delay layers with contexts of 5, 3 at every second and 3 at every third frame, 1 and 1, mean and standard
deviation over time, two linear layers. ReLU after each but the first. Speakers are told apart after the second linear
layer while training; the embedding is what the first one gives.

A frame of the output sees 15 of the input and needs them all, so nothing is padded: T frames give T - 14, those of the
utterance come first, and what stands behind them is never looked at.
"""

from math import sqrt

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

CONTEXTS = ((5, 1), (3, 2), (3, 3), (1, 1), (1, 1))
"""Frames that a time-delay layer sees, and how far apart."""
FIELD_FRAMES = 1 + sum((size - 1) * apart for size, apart in CONTEXTS)
"""Frames that one frame of the last layer sees: 15."""
RELU_GAIN = sqrt(2)
"""A ReLU halves the mean square of what passes it."""
VARIANCE_FLOOR = 1e-6
"""Added under the root: the gradient of the root of nothing is infinite, and a frame alone has no variance."""


class XVector(nn.Module):
    """Frames of width D to embeddings of width E."""

    def __init__(
        self, width: int, channels: int, pooled_width: int, embedding: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        widths = [width, *[channels] * (len(CONTEXTS) - 1), pooled_width]
        self.delays = nn.ModuleList(
            nn.Conv1d(widths[i], widths[i + 1], size, dilation=apart) for i, (size, apart) in enumerate(CONTEXTS)
        )
        self.embed = nn.Linear(2 * pooled_width, embedding)
        self.tell_apart = nn.Linear(embedding, embedding)
        start(self, RELU_GAIN, generator)

    def forward(self, frames: Float[Tensor, "B T D"], counts: Int64[Tensor, " B"]) -> Float[Tensor, "B E"]:
        """The embedding of each utterance; `counts` of its T frames are its own."""
        hidden, counts = lengthen(frames, counts)
        hidden = hidden.mT  # (B, T, D) -> (B, D, T)
        for delay in self.delays:
            hidden = delay(hidden).relu()
        return self.embed(statistics(hidden, counts - (FIELD_FRAMES - 1))).relu()

    def training_vectors(self, embeddings: Float[Tensor, "B E"]) -> Float[Tensor, "B E"]:
        """What the loss sees of embeddings."""
        return self.tell_apart(embeddings).relu()


class VoiceHead(nn.Module):
    """Weighted sum of layers, Linear D -> H, x-vector."""

    def __init__(
        self,
        num_layers: int,
        width: int,
        head_width: int,
        channels: int,
        pooled_width: int,
        embedding: int,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.layer_scores = nn.Parameter(torch.zeros(num_layers))  # softmax of zeros: every layer counts the same
        self.project = nn.Linear(width, head_width)
        start(self.project, 1.0, generator)
        self.xvector = XVector(head_width, channels, pooled_width, embedding, generator)

    @property
    def layer_weights(self) -> Float[Tensor, " L"]:
        """How much each layer counts; sums to one."""
        return self.layer_scores.softmax(0)

    def forward(self, layers: Float[Tensor, "L B T D"], counts: Int64[Tensor, " B"]) -> Float[Tensor, "B E"]:
        """The embedding of each utterance."""
        mixed = (self.layer_weights @ layers.flatten(1)).unflatten(0, layers.shape[1:])
        return self.xvector(self.project(mixed), counts)


def lengthen(
    frames: Float[Tensor, "B T D"], counts: Int64[Tensor, " B"]
) -> tuple[Float[Tensor, "B S D"], Int64[Tensor, " B"]]:
    """Utterances of fewer than 15 frames said again and again until they have 15; the others as they are.

    Zeros would be a sound that nobody made; a repetition has the frames of the voice and no others. (SUPERB leaves what is
    shorter than 2 s out of training, and VoxCeleb has nothing shorter.)
    """
    if int(counts.min()) >= FIELD_FRAMES:
        return frames, counts
    at = torch.arange(max(frames.shape[1], FIELD_FRAMES), device=frames.device)
    again = at % counts[:, None]
    source = torch.where((counts < FIELD_FRAMES)[:, None], again, at.clamp(max=frames.shape[1] - 1))  # (B, S)
    return frames.gather(1, source[..., None].expand(-1, -1, frames.shape[2])), counts.clamp(min=FIELD_FRAMES)


def statistics(hidden: Float[Tensor, "B C T"], counts: Int64[Tensor, " B"]) -> Float[Tensor, "B 2*C"]:
    """Mean and standard deviation over the first `counts` frames of each."""
    valid = (torch.arange(hidden.shape[-1], device=hidden.device) < counts[:, None])[:, None]  # (B, 1, T)
    share = valid / counts[:, None, None]
    mean = (hidden.where(valid, 0) * share).sum(-1)
    spread = ((hidden - mean[..., None]).square().where(valid, 0) * share).sum(-1)
    return torch.cat([mean, (spread + VARIANCE_FLOOR).sqrt()], -1)


def start(module: nn.Module, gain: float, generator: torch.Generator) -> None:
    """Linear and convolution layers as He et al. (2015) start them, from a generator we hold.

    Torch's own start shrinks what passes a layer with a ReLU to 0.4 of its size. After seven, without any norm between
    them, all utterances have nearly the same embedding; SUPERB has 200 000 updates to get over that.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv1d):
            bound = gain * sqrt(3 / layer.weight[0].numel())
            nn.init.uniform_(layer.weight, -bound, bound, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
