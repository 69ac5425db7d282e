"""The layers of some utterances in, the log probability of every character in every frame out: SUPERB's ASR head.

Weighted sum of layers, Linear D -> P, N layers of a bidirectional LSTM with dropout behind each, Linear to characters
and blank (s3prl `downstream/asr`). Each direction begins where its utterance begins, so an answer does not depend on the
company it is heard in. That is what packing is for; but torch differentiates a packed batch on a CPU in a time that is
quadratic in its length, seven times as long as two LSTMs of one direction each need for these, oneDNN's.
"""

from math import sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, Field
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from pipeline.tasks.frames import Frames
from pipeline.tasks.masking import MaskParams, masked


class BlstmParams(BaseModel, frozen=True, extra="forbid"):
    """The size of the head."""

    head_width: int = Field(ge=1)
    """Channels between the weighted sum and the LSTM; SUPERB: 1024."""
    lstm_layers: int = Field(ge=1)
    """SUPERB: 2."""
    lstm_width: int = Field(ge=1)
    """Cells of each direction of each layer; SUPERB: 1024."""
    dropout: float = Field(ge=0, lt=1)
    """Behind each LSTM layer; SUPERB: 0.2."""
    reduce_frames: int = Field(ge=1)
    """So many frames are put side by side into one before the LSTM, the last beside zeros if need be; SUPERB: 1."""


class Draws(NamedTuple):
    """Where a head that trains gets its randomness from."""

    places: torch.Generator
    """Of masks, on the CPU."""
    kept: torch.Generator
    """Of dropout, on the device."""

    @classmethod
    def seeded(cls, seed: int, device: torch.device) -> "Draws":
        """Both from one seed."""
        return cls(torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed))


def reduced(num_frames: int, reduce_frames: int) -> int:
    """Frames that the LSTM sees."""
    return -(-num_frames // reduce_frames)


class Bidirectional(nn.Module):
    """One layer: an LSTM over an utterance and another over the utterance from its end."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.onward, self.back = nn.LSTM(inputs, width), nn.LSTM(inputs, width)

    def forward(self, padded: Float[Tensor, "T B I"], mirror: Int64[Tensor, "T B 1"]) -> Float[Tensor, "T B H"]:
        """`mirror` is `mirrored` of the batch; what comes out of padding is anything."""
        turned = padded.gather(0, mirror.expand_as(padded))
        onward, back = self.onward(padded)[0], self.back(turned)[0]
        return torch.cat([onward, back.gather(0, mirror.expand_as(back))], dim=-1)


def mirrored(counts: list[int]) -> Int64[Tensor, "T B 1"]:
    """The frame at the other end of each utterance, for every frame; padding stays where it is."""
    times, ends = torch.arange(max(counts))[:, None], torch.tensor(counts)
    return torch.where(times < ends, ends - 1 - times, times)[..., None]


class SpeechHead(nn.Module):
    """One head of K classes, the first of which is CTC's blank."""

    def __init__(
        self, num_layers: int, width: int, params: BlstmParams, num_classes: int, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.reduce_frames, self.dropout = params.reduce_frames, params.dropout
        self.layer_scores = nn.Parameter(torch.zeros(num_layers))  # softmax of zeros: every layer counts the same
        self.project = nn.Linear(width, params.head_width)
        widths = [params.head_width * params.reduce_frames, *[2 * params.lstm_width] * (params.lstm_layers - 1)]
        self.lstms = nn.ModuleList(Bidirectional(inputs, params.lstm_width) for inputs in widths)
        self.classify = nn.Linear(2 * params.lstm_width, num_classes)
        for module in (self.project, *self.lstms, self.classify):  # torch's own initialisation, from our generator
            bound = 1 / sqrt(module.in_features if isinstance(module, nn.Linear) else params.lstm_width)
            for value in module.parameters():
                nn.init.uniform_(value, -bound, bound, generator=generator)

    @property
    def layer_weights(self) -> Float[Tensor, " L"]:
        """How much each layer counts; sums to one."""
        return self.layer_scores.softmax(0)

    def forward(
        self, frames: Frames, masks: MaskParams | None = None, draws: Draws | None = None
    ) -> list[Float[Tensor, "_ K"]]:
        """Log probabilities, utterance by utterance. With draws the head trains: it masks and drops out."""
        mixed = torch.tensordot(self.layer_weights, frames.layers, 1)  # (L,) (L, F, D) -> (F, D)
        if masks is not None and draws is not None:
            mixed = torch.cat(masked(list(mixed.split(frames.counts)), masks, draws.places))
        utterances = [self._reduced(part) for part in self.project(mixed).split(frames.counts)]
        counts = [len(part) for part in utterances]
        padded, mirror = pad_sequence(utterances), mirrored(counts).to(mixed.device)  # (T, B, P)
        for lstm in self.lstms:
            padded = lstm(padded, mirror)
            if self.dropout > 0 and draws is not None:
                padded = self._dropped(padded, draws.kept)
        log_probs = self.classify(padded).log_softmax(-1)
        return [log_probs[:count, number] for number, count in enumerate(counts)]

    def _reduced(self, frames: Float[Tensor, "T P"]) -> Float[Tensor, "_ Q"]:
        count = reduced(len(frames), self.reduce_frames)
        return nn.functional.pad(frames, (0, 0, 0, count * self.reduce_frames - len(frames))).reshape(count, -1)

    def _dropped(self, values: Float[Tensor, "*F"], generator: torch.Generator) -> Float[Tensor, "*F"]:
        kept = torch.rand(values.shape, generator=generator, device=values.device) >= self.dropout
        return values * kept / (1 - self.dropout)
