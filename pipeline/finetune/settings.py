"""What a person types to fine-tune a model: settings in, checked models out.

A row of a table of systems is a choice of five things: where the encoder comes from (`starts_from`), whether it moves
(`encoder`), which tasks it learns (`tasks`), what each counts (`loss_weights`), and how long (`train`).
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

from pipeline.distill.augment import AugmentParams
from pipeline.seeds import Seeds
from pipeline.student.shape import DropoutRates
from pipeline.tasks.eer import DetectionCost

Layers = Literal["weighted", "last"]


class TaskParams(BaseModel, frozen=True, extra="forbid"):
    """What both tasks have."""

    layers: Layers
    """weighted: a softmax-weighted sum of all hidden states, as SUPERB's heads read them; last: the last one."""
    head_width: int = Field(ge=1)
    """Channels between the hidden states and the mean over time; SUPERB: 256 for keywords, 512 for speakers."""
    class_balanced: bool
    """Draw examples so that every keyword, or every speaker, comes equally often; SUPERB: true for keywords, false for
    speakers. With replacement, so an epoch is as many examples, not each of them once."""
    crop_seconds: float | None = Field(ge=0.1)
    """A random stretch of every longer training utterance; null trains on whole ones. Judged are whole ones."""
    batch_seconds: float = Field(gt=0)
    """Padded audio of this task in one batch: every update hears as much of each task."""


class KeywordParams(TaskParams, frozen=True, extra="forbid"):
    """Keyword spotting: SUPERB's head (Linear, mean over frames, Linear) and cross entropy."""


class StatisticsPooling(BaseModel, frozen=True, extra="forbid"):
    """ReLU, mean and standard deviation over frames, Linear: where the encoder learns to tell voices apart, it suffices."""

    kind: Literal["statistics"]


class XVectorPooling(BaseModel, frozen=True, extra="forbid"):
    """SUPERB's: five time-delay layers, mean and standard deviation over frames, two linear layers."""

    kind: Literal["xvector"]
    channels: int = Field(ge=1)
    """Of the first four time-delay layers; SUPERB: 512."""
    pooled_width: int = Field(ge=1)
    """Of the last one; SUPERB: 1500."""


class SpeakerParams(TaskParams, frozen=True, extra="forbid"):
    """Speaker verification: Linear, pooling over frames to an embedding, additive margin softmax over training speakers."""

    pooling: Annotated[StatisticsPooling | XVectorPooling, Field(discriminator="kind")]
    embedding: int = Field(ge=1)
    """Width of the embedding whose cosines are scored; SUPERB: 512."""
    scale: float = Field(gt=0)
    """What cosines are multiplied by before the softmax; SUPERB: 30."""
    margin: float = Field(ge=0)
    """What the cosine of the true speaker must be ahead; SUPERB: 0.4."""
    list: str | None
    """Name of the list of test trials whose error is the score; null where there is one list."""
    cost: DetectionCost
    """What minDCF counts: {p_target: 0.01, miss: 1.0, false_alarm: 1.0} in VoxCeleb's papers."""


class Tasks(BaseModel, frozen=True, extra="forbid"):
    """Which tasks are learned; null leaves one out, for the rows of single tasks."""

    kws: KeywordParams | None
    sv: SpeakerParams | None

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Tasks":
        if self.kws is None and self.sv is None:
            raise ValueError("both tasks are null; set kws, sv, or both")
        return self

    @property
    def named(self) -> dict[str, TaskParams]:
        """Those that are learned, kws first."""
        return {name: task for name, task in (("kws", self.kws), ("sv", self.sv)) if task is not None}


class Fixed(BaseModel, frozen=True, extra="forbid"):
    """The loss is w_kws L_kws + w_sv L_sv."""

    kind: Literal["fixed"]
    kws: float | None = Field(gt=0)
    """null where the task is."""
    sv: float | None = Field(gt=0)
    """null where the task is."""


class Uncertainty(BaseModel, frozen=True, extra="forbid"):
    """The loss is the sum of exp(-s_t) L_t + s_t / 2 over tasks, whose s_t are learned (Kendall et al. 2018)."""

    kind: Literal["uncertainty"]
    """uncertainty: a task whose loss stays high comes to count less; every s_t starts at 0."""


class Frozen(BaseModel, frozen=True, extra="forbid"):
    """The encoder stays as it is, in evaluation mode; only heads learn. The row that fine-tuning is held against."""

    kind: Literal["frozen"]


class Tuned(BaseModel, frozen=True, extra="forbid"):
    """The encoder learns, too."""

    kind: Literal["tuned"]
    learning_rate: float = Field(gt=0)
    """Peak rate of the last block."""
    layer_decay: float = Field(gt=0, le=1)
    """What the rate is multiplied by from one block to the one below (ELECTRA, BEiT); the projection and the positions are
    below the first block, the convolutions below those. 1 gives all the same."""
    freeze_convolutions: bool
    """The convolutions stay as they are, which is usual when such models are fine-tuned."""
    frozen_steps: int = Field(ge=0)
    """Updates at the start in which only heads learn, which at first know nothing; 0 begins with all."""
    feature_grad_mult: float = Field(gt=0)
    """Factor on the gradient that reaches the convolutions, where they learn."""
    dropout: DropoutRates | None
    """In place of those that the model was trained with; null keeps them."""


class TrainParams(BaseModel, frozen=True, extra="forbid"):
    """How long, and how."""

    steps: int = Field(ge=1)
    """Updates."""
    accumulate: int = Field(ge=1)
    """Batches of each task, and of one process, whose gradients are added up before an update."""
    head_learning_rate: float = Field(gt=0)
    """Peak rate of the heads."""
    warmup: float = Field(ge=0, le=1)
    """Share of the updates in which a rate rises, before it falls in a line; of the encoder's updates without the frozen."""
    weight_decay: float = Field(ge=0)
    """Of matrices and kernels; biases and norms never decay."""
    clip: float | None = Field(gt=0)
    """Largest gradient norm; null does not clip."""
    precision: Literal["float32", "bfloat16"]
    """Of the encoder on a GPU; heads, losses and norms are float32 in both, and so is all on a CPU."""
    log_every: int = Field(ge=1)
    """Updates between rows of curves.csv."""
    validate_every: int = Field(ge=1)
    """Updates between validations; the last one always has one."""
    checkpoint_every: int = Field(ge=1)
    """Updates between saved states, from which a killed run goes on."""
    publish: Literal["best", "last"]
    """best: the model with the lowest mean of the dev errors (1 - accuracy, EER) of its tasks; last: after the last update."""


class FinetuneParams(BaseModel, frozen=True, extra="forbid"):
    """One system: an encoder that is there, and what it learns."""

    starts_from: str
    """Folder of a student, of another fine-tuned one, or of a teacher. `dvc.yaml` hands it over."""
    tasks: Tasks
    loss_weights: Annotated[Fixed | Uncertainty, Field(discriminator="kind")]
    encoder: Annotated[Frozen | Tuned, Field(discriminator="kind")]
    augment: AugmentParams | None
    """Noise and masks in training batches, as students have them; null: none."""
    train: TrainParams
    seeds: Seeds
    """Each is a training of its own: heads, order, crops, dropout. Scores are their mean; the encoder that is published is the
    first one's."""

    @model_validator(mode="after")
    def _fits(self) -> "FinetuneParams":
        if isinstance(self.loss_weights, Fixed):
            for name in ("kws", "sv"):
                weight = getattr(self.loss_weights, name)
                if (weight is None) != (getattr(self.tasks, name) is None):
                    raise ValueError(
                        f"loss_weights.{name} is {weight} and tasks.{name} is "
                        f"{'null' if getattr(self.tasks, name) is None else 'set'}; null goes with null"
                    )
        if isinstance(self.encoder, Tuned) and self.encoder.frozen_steps >= self.train.steps:
            raise ValueError(
                f"encoder.frozen_steps {self.encoder.frozen_steps} leaves nothing of the {self.train.steps} steps; "
                "lower it, or set encoder: {kind: frozen}"
            )
        return self
