"""Settings of a pretraining: what a person types, and what does not fit together refused."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

from pipeline.distortion.distort import Distortion
from pipeline.distortion.mixing import Mixing
from pipeline.teachers.contrastive import ContrastiveParams
from pipeline.teachers.units import Units


class PretrainShape(BaseModel, frozen=True, extra="forbid"):
    """Size of the model; kernels and strides are those of HuBERT Base, and so are the group norm and the post-norm blocks."""

    conv_channels: tuple[int, int, int, int, int, int, int]
    """Channels of the seven convolutions (512 in Base). The first two run at 3200 and 1600 frames per second: keep them few."""
    width: int
    layers: int
    """Transformer blocks."""
    heads: int
    ffn: int
    position_kernel: int
    position_groups: int


class Iteration(BaseModel, frozen=True, extra="forbid"):
    """One round: units, then masked prediction of them."""

    units: Units
    clusters: int = Field(ge=2, le=65_536)
    """Number of units (paper: 100, then 500)."""
    restart: bool
    """Begin with the starting weights again, as the paper does, or go on with those of the round before, which costs fewer
    steps. Without effect on the first round."""


class MaskedUnits(BaseModel, frozen=True, extra="forbid"):
    """HuBERT's objective, and WavLM's: name the units of hidden frames (arXiv 2106.07447, eq. 1 to 3)."""

    kind: Literal["masked_units"]
    iterations: tuple[Iteration, ...] = Field(min_length=1)
    fit_frames: int = Field(ge=1)
    """Frames that k-means is fitted on, of randomly drawn recordings; all are held in memory (4 bytes x width each)."""
    unmasked_weight: float = Field(ge=0)
    """Weight of the frames that were not hidden (paper: 0)."""
    codeword_width: int = Field(ge=1)
    """Width in which frames and units are compared (paper: 256)."""
    temperature: float = Field(gt=0)
    """Of the cosine between projection and codeword (paper: 0.1)."""


Objective = Annotated[MaskedUnits | ContrastiveParams, Field(discriminator="kind")]


class PretrainParams(BaseModel, frozen=True, extra="forbid"):
    """A teacher made here, from new weights or from those of the teacher it starts from."""

    kind: Literal["pretrain"]
    family: Literal["hubert", "wavlm", "wav2vec2"]
    """wavlm is hubert with gated relative position bias (arXiv 2110.13900, section III.A)."""
    takes: Literal["model", "convolutions"] | None
    """What is taken of the teacher that this one starts from: the whole model, which is then of this family, or only its
    convolutions, with all that follows them new. null with none to start from."""
    shape: PretrainShape | None
    """null where a whole model is taken, which has a shape; and only then."""
    objective: Objective
    steps: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    """Updates of each round; the contrastive objective has one round."""
    distort: Distortion | None
    """Noise and rooms in what the model hears; units are of the clean audio."""
    mix: Mixing | None
    """Other speakers in what the model hears."""
    batch_seconds: float = Field(gt=0)
    """Audio in a batch."""
    crop_seconds: float = Field(gt=0)
    """Longer recordings are cropped at random to this."""
    lr: float = Field(gt=0)
    warmup: float = Field(ge=0, lt=1)
    """Part of the steps in which the learning rate rises; after it, it falls to zero, both linearly (paper: 0.08)."""
    weight_decay: float = Field(ge=0)
    clip: float = Field(gt=0)
    """Largest norm of the gradient."""
    dropout: float = Field(ge=0, lt=1)
    """After attention and feed-forward, and of attention."""
    mask_prob: float = Field(gt=0)
    """Spans x length / frames; spans overlap, so 0.8 hides about half (HuBERT: 0.8, wav2vec 2.0: 0.65)."""
    mask_frames: int = Field(ge=1)
    """Frames of a span (paper: 10)."""
    precision: Literal["float32", "bfloat16"]
    """Of matrix products and convolutions; weights, norms and losses are float32 in both."""
    checkpoint_every: int = Field(ge=1)
    """Updates between saved states, from which a killed run goes on."""
    seed: int = Field(ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "PretrainParams":
        wants = {"hubert": "masked_units", "wavlm": "masked_units", "wav2vec2": "contrastive"}[self.family]
        if self.objective.kind != wants:
            raise ValueError(f"objective.kind is {self.objective.kind!r}, and {self.family} is trained with {wants}")
        rounds = len(self.objective.iterations) if isinstance(self.objective, MaskedUnits) else 1
        if len(self.steps) != rounds:
            raise ValueError(f"steps has {len(self.steps)} numbers and the objective has rounds: {rounds}")
        return self


def audio_seconds(params: PretrainParams) -> float:
    """About how much audio the rounds train on: what progress is counted in."""
    return params.batch_seconds * sum(params.steps)


def without_paths(value: Any) -> Any:
    """Settings as JSON with the names of folders in the place of their paths: what a product may say of itself."""
    if isinstance(value, dict):
        return {
            k: v.rstrip("/").rpartition("/")[2] if k == "path" and isinstance(v, str) else without_paths(v)
            for k, v in value.items()
        }
    return [without_paths(v) for v in value] if isinstance(value, list) else value
