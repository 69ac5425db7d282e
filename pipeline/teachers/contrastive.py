"""wav2vec 2.0's objective: waveforms and hidden frames in, the loss of telling each frame among distractors out.

What the transformer says of a hidden frame must be nearer to that frame's own quantised target than to those of other hidden
frames of the recording (Baevski et al. 2020, arXiv 2006.11477, section 3; fairseq where the paper is silent). Everything here
but the model itself is left behind after training.
"""

from typing import Literal, NamedTuple

import torch
import transformers
from jaxtyping import Bool, Float, Int64
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from pipeline.teachers.objective import Prediction


class Annealing(BaseModel, frozen=True, extra="forbid"):
    """How the temperature of the Gumbel softmax falls, by the same factor at every step."""

    start: float = Field(gt=0)
    """Temperature of the first step (paper: 2)."""
    end: float = Field(gt=0)
    """Temperature that it falls to (paper: 0.5)."""
    reached: float = Field(gt=0, le=1)
    """Part of the steps after which it is there (paper: a factor of 0.999995 a step, so 277 259 of 400 000 steps: 0.69)."""

    def at(self, progress: float) -> float:
        """Temperature when `progress` in [0, 1] of the steps are done."""
        return float(self.start * (self.end / self.start) ** min(1.0, progress / self.reached))


class ContrastiveParams(BaseModel, frozen=True, extra="forbid"):
    """wav2vec 2.0's objective; "paper" is its Base model."""

    kind: Literal["contrastive"]
    codebooks: int = Field(ge=1)
    """G: groups of the product quantiser (paper: 2)."""
    entries: int = Field(ge=2)
    """V: codewords of each codebook (paper: 320)."""
    code_width: int = Field(ge=1)
    """Channels of all codebooks together (paper: 256, which is 128 a codebook)."""
    target_width: int = Field(ge=1)
    """Channels of the space in which prediction and target are compared (paper: 256)."""
    gumbel: Annealing
    distractors: int = Field(ge=1)
    """K: frames that each hidden frame is told from, drawn with replacement (paper: 100)."""
    temperature: float = Field(gt=0)
    """kappa, which divides the cosines (paper: 0.1)."""
    diversity_weight: float = Field(ge=0)
    """alpha, the weight of the codebooks' diversity (paper: 0.1)."""
    penalty_weight: float = Field(ge=0)
    """Weight of the mean square of the convolutions' output (paper: 10, from fairseq's configuration)."""
    feature_grad_mult: float = Field(ge=0)
    """Factor on the gradient that reaches the convolutions (paper: 0.1); 0 leaves them as they began."""
    unmasked_weight: float = Field(ge=0)
    """Weight of the same loss on the frames that were not hidden, told from each other (paper: 0)."""

    @model_validator(mode="after")
    def _codewords_fill_the_width(self) -> "ContrastiveParams":
        if self.code_width % self.codebooks:
            raise ValueError(f"code_width {self.code_width} must be a multiple of codebooks ({self.codebooks})")
        return self


class Quantised(NamedTuple):
    """What the quantiser makes of N frames."""

    vectors: Float[Tensor, "N C"]
    """The chosen codewords, one of each codebook, side by side."""
    codes: Int64[Tensor, "N G"]
    """Their numbers."""
    mean_use: Float[Tensor, "G V"]
    """How much each codeword is used: the mean of the softmax over the frames, without noise or temperature (eq. 4)."""


class Quantiser(nn.Module):
    """Product quantisation through a straight-through Gumbel softmax; parameters and start are those of transformers."""

    def __init__(self, width: int, params: ContrastiveParams) -> None:
        super().__init__()
        self.codebooks, self.entries = params.codebooks, params.entries
        # transformers' Wav2Vec2GumbelVectorQuantizer has the same two and computes the same, but multiplies every codeword
        # of every frame out before it sums: N x G V x C / G numbers where a matrix product needs none
        self.weight_proj = nn.Linear(width, self.codebooks * self.entries)
        self.codevectors = nn.Parameter(
            torch.rand(1, self.codebooks * self.entries, params.code_width // self.codebooks)
        )
        nn.init.normal_(self.weight_proj.weight)
        nn.init.zeros_(self.weight_proj.bias)

    def forward(self, features: Float[Tensor, "N D"], temperature: float) -> Quantised:
        """Draw a codeword of each codebook when training, else take the likeliest (eq. 1); the noise is torch's generator's."""
        logits = self.weight_proj(features).view(-1, self.codebooks, self.entries)
        if self.training:
            chosen = nn.functional.gumbel_softmax(logits, tau=temperature, hard=True)
        else:
            chosen = nn.functional.one_hot(logits.argmax(2), self.entries).to(logits.dtype)
        words = self.codevectors.view(self.codebooks, self.entries, -1)
        vectors = torch.einsum("ngv,gvc->ngc", chosen, words).flatten(1)
        return Quantised(vectors, chosen.argmax(2), logits.softmax(2).mean(0))


class Contrastive(nn.Module):
    """A wav2vec 2.0, and what its objective needs beside it."""

    def __init__(self, model: transformers.Wav2Vec2Model, params: ContrastiveParams) -> None:
        super().__init__()
        self.model, self.params = model, params
        self.quantiser = Quantiser(model.config.conv_dim[-1], params)
        self.project_hid = nn.Linear(model.config.hidden_size, params.target_width)
        self.project_q = nn.Linear(self.quantiser.codevectors.shape[2] * params.codebooks, params.target_width)

    def forward(self, waves: Float[Tensor, "B S"], hidden: Bool[Tensor, "B T"], progress: float) -> Prediction:
        """Loss of one batch, a mean over hidden frames; noise and distractors come from torch's generator of the device.

        Args:
            waves: recordings of one length, without padding.
            hidden: the frames that the transformer does not see and that are predicted.
            progress: part of the training's steps that are done, in [0, 1].

        Returns:
            The loss, and the part of the hidden frames that are nearer to their own target than to any distractor.
        """
        features = self.convolve(waves)
        penalty = features.float().square().mean()
        projected, normed = self.model.feature_projection(features)
        projected = torch.where(hidden[:, :, None], self.model.masked_spec_embed.to(projected.dtype), projected)
        states = self.model.encoder(projected).last_hidden_state
        temperature = self.params.gumbel.at(progress)

        prediction, diversity = self.compare(states, normed, hidden, temperature)
        loss = prediction.loss + self.params.diversity_weight * diversity + self.params.penalty_weight * penalty
        if self.params.unmasked_weight and not bool(hidden.all()):
            seen, _ = self.compare(states, normed, ~hidden, temperature)
            loss = loss + self.params.unmasked_weight * seen.loss
        return Prediction(loss, prediction.accuracy)

    def convolve(self, waves: Float[Tensor, "B S"]) -> Float[Tensor, "B T D"]:
        """The convolutions' output, whose gradient is scaled on the way back."""
        factor = self.params.feature_grad_mult
        with torch.set_grad_enabled(factor > 0 and torch.is_grad_enabled()):
            features: Tensor = self.model.feature_extractor(waves).transpose(1, 2)
        if features.requires_grad and factor != 1:
            features.register_hook(lambda gradient: gradient * factor)
        return features

    def compare(
        self,
        states: Float[Tensor, "B T H"],
        features: Float[Tensor, "B T D"],
        chosen: Bool[Tensor, "B T"],
        temperature: float,
    ) -> tuple[Prediction, Float[Tensor, ""]]:
        """Contrastive loss of the chosen frames (eq. 3), each told from others that are chosen, and their diversity loss."""
        with torch.autocast(states.device.type, enabled=False):  # half precision is for the model alone
            quantised = self.quantiser(features[chosen].float(), temperature)
            others = draw_distractors(chosen, self.params.distractors)
            predicted, targets = self.project_hid(states[chosen].float()), self.project_q(quantised.vectors)
            logits = contrast(predicted, targets, quantised.codes, others) / self.params.temperature
            found = (logits[:, :1] > logits[:, 1:]).all(1) & logits[:, 1:].isfinite().any(1)
            loss = nn.functional.cross_entropy(logits, torch.zeros_like(others[:, 0]))
            return Prediction(loss, found.float().mean()), diversity_loss(quantised.mean_use)


def draw_distractors(chosen: Bool[Tensor, "B T"], num: int) -> Int64[Tensor, "N K"]:
    """For each chosen frame, `num` others of its row, uniformly and with replacement, as numbers among the chosen frames.

    A frame that is the only one of its row gets itself, which `contrast` does not count.
    """
    counts = chosen.sum(1)
    row = torch.repeat_interleave(torch.arange(len(counts), device=chosen.device), counts)
    first = (counts.cumsum(0) - counts)[row][:, None]  # number of the first chosen frame of the row
    own = torch.arange(len(row), device=chosen.device)[:, None] - first
    peers = counts[row][:, None] - 1
    drawn = (torch.rand(len(row), num, device=chosen.device, dtype=torch.float64) * peers).long()
    drawn = torch.minimum(drawn + (drawn >= own), peers)  # step over the frame itself
    return first + drawn


def contrast(
    predicted: Float[Tensor, "N C"],
    targets: Float[Tensor, "N C"],
    codes: Int64[Tensor, "N G"],
    others: Int64[Tensor, "N K"],
) -> Float[Tensor, "N 1+K"]:
    """Cosines of each prediction to its target, then to those of the others; -inf for those with the target's very codes."""
    directions = nn.functional.normalize(targets, dim=1)
    cosines = nn.functional.normalize(predicted, dim=1) @ directions.T  # of each to each: far fewer than N K C numbers
    same = (codes[others] == codes[:, None]).all(2)
    return torch.cat([cosines.diagonal()[:, None], cosines.gather(1, others).masked_fill(same, -torch.inf)], 1)


def diversity_loss(mean_use: Float[Tensor, "G V"]) -> Float[Tensor, ""]:
    """From 0, where every codeword is used as much, to 1 - 1 / V, where each codebook has one left.

    Equation 4 maximises the entropy of the use; here, as in fairseq, its exponential: (G V - sum of perplexities) / (G V).
    """
    smallest = torch.finfo(
        mean_use.dtype
    ).tiny  # a codeword that nothing uses would have an infinite gradient times none
    perplexity = torch.exp(-torch.xlogy(mean_use, mean_use.clamp(min=smallest)).sum(1))
    return 1 - perplexity.sum() / mean_use.numel()
