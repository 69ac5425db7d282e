"""What a person types to train a student: settings in, checked models out.

The methods differ in four choices: whom the student learns from (`ensemble`), with which weights it starts (`init`), where
its predictions come from (`predict`), and whether it is pruned on the way (`prune`).
"""

from typing import Literal, NamedTuple

from pydantic import BaseModel, Field, model_validator

from pipeline.distill.augment import AugmentParams
from pipeline.distill.losses import Cosine, LossWeights
from pipeline.distill.plan import Crop, Shuffle
from pipeline.distill.predictor import Predict
from pipeline.distill.pruning import PruneParams
from pipeline.layers.ensembles import Ensemble
from pipeline.layers.targets import Init
from pipeline.student.shape import EncoderShape


class TrainParams(BaseModel, frozen=True, extra="forbid"):
    """How a student is trained."""

    steps: int = Field(ge=0)
    """Updates; 0 leaves the student as it was initialised (a baseline)."""
    batch_seconds: float = Field(gt=0)
    """Padded audio in one batch."""
    accumulate: int = Field(ge=1)
    """Batches of one process whose gradients are added up before an update."""
    crop: Crop
    """full, or aligned with max_seconds."""
    shuffle: Shuffle
    """everywhere, or shards with together."""
    learning_rate: float = Field(gt=0)
    """Peak; 2e-4 in DistilHuBERT and DPHuBERT."""
    warmup: float = Field(ge=0, le=1)
    """Share of the steps in which the rate rises; 0.07 in DistilHuBERT, 0.3 in DPHuBERT."""
    weight_decay: float = Field(ge=0)
    """Of matrices and kernels; biases and norms never decay."""
    clip: float | None = Field(gt=0)
    """Largest gradient norm; null does not clip."""
    feature_grad_mult: float = Field(gt=0)
    """Factor on the gradient that reaches the convolutions; 0.1 in DistilHuBERT."""
    l1_weight: float = Field(ge=0)
    """Weight of the mean absolute difference."""
    l2_weight: float = Field(ge=0)
    """Weight of the mean squared difference; 0 in DistilHuBERT and DPHuBERT, 1 in FitHuBERT."""
    cosine_weight: float = Field(ge=0)
    """Weight of the cosine term; 1 in DistilHuBERT."""
    cosine: Cosine
    """log_sigmoid: -log sigmoid cos, as in DistilHuBERT; raw: -cos, as in DPHuBERT."""
    target_weights: tuple[float, ...] | None
    """What each target's loss is multiplied by before they are added, in the order of the targets (FitHuBERT: 0.1 for all
    layers but the last, which has 1); null is their mean, each teacher by its weight."""
    precision: Literal["float32", "bfloat16"]
    """Of the forward pass on a GPU; losses and norms are float32 in both, and so is all on a CPU."""
    compile_seconds: float | None = Field(gt=0)
    """Compile the encoder (torch.compile) and pad batches to a multiple of so much audio, so that few lengths are met;
    null runs it as it is. Padding changes no number beyond rounding."""
    log_every: int = Field(gt=0)
    """Steps between rows of curves.csv; a row is the mean since the row before."""
    validate_every: int | None = Field(gt=0)
    """Steps between validations on the dev split; null never validates."""
    checkpoint_every: int = Field(gt=0)
    """Steps between saved states, from which a killed run goes on."""
    keep: int = Field(ge=0)
    """Students of so many latest validations are published too, below checkpoints/, and the best one."""
    publish: Literal["last", "best"]
    """last: the student after the last step; best: the one with the smallest loss on the dev split."""

    @model_validator(mode="after")
    def _validated(self) -> "TrainParams":
        if self.validate_every is None and (self.keep or self.publish == "best"):
            raise ValueError(
                "keep and publish: best need validations; set validate_every, or keep: 0 and publish: last"
            )
        return self

    @property
    def loss_weights(self) -> LossWeights:
        """Of the terms of the loss."""
        return LossWeights(self.l1_weight, self.l2_weight, self.cosine_weight, self.cosine)


class StudentParams(BaseModel, frozen=True, extra="forbid"):
    """One student: what it learns from, how it starts, what it is, how it is trained."""

    ensemble: Ensemble
    """Whose layers are predicted: single, heads, average, concat or groups."""
    init: Init
    """Where the first weights come from."""
    shape: EncoderShape
    """What the student is, before it is pruned."""
    predict: Predict
    """Where predictions come from: last (DistilHuBERT) or layers (DPHuBERT, FitHuBERT, SKILL)."""
    prune: PruneParams | None
    """Units that are removed on the way (DPHuBERT); null keeps all. Then `train` is the first phase."""
    augment: AugmentParams | None
    """Noise and masks for the student alone, whose targets stay those of clean audio; null: none."""
    train: TrainParams
    """How it is trained."""
    seed: int = Field(ge=0)
    """Of weights, order, crops, noise and dropout."""


class Phase(NamedTuple):
    """A stretch of a training with one schedule. A pruned student has two, any other one."""

    name: str
    steps: int
    learning_rate: float
    """Peak."""
    warmup: float
    """Share of the steps."""
    prunes: bool
    """Whether gates are learned."""


def phases_of(params: StudentParams) -> list[Phase]:
    """What is done one after the other."""
    train = params.train
    if params.prune is None:
        return [Phase("distil", train.steps, train.learning_rate, train.warmup, prunes=False)]
    final = params.prune.final
    return [
        Phase("prune", train.steps, train.learning_rate, train.warmup, prunes=True),
        Phase("final", final.steps, final.learning_rate, final.warmup, prunes=False),
    ]
