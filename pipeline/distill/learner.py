"""The learner: a batch in, loss terms and updated weights out; student and heads together, on one device."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from pydantic import BaseModel, Field
from torch import Tensor, nn

from cache.errors import SettingsError
from pipeline.distill.batches import Batch
from pipeline.distill.ensemble import TargetMaker
from pipeline.distill.heads import make_heads
from pipeline.distill.losses import Cosine, LossWeights, distillation_loss, mean_over_groups
from pipeline.distill.plan import Crop, Shuffle
from pipeline.distill.schedule import make_optimizer, rate_at
from pipeline.layers.ensembles import Ensemble, head_groups
from pipeline.layers.targets import Adopted, Init, Targets
from pipeline.padding import INT16_SCALE, frame_mask
from pipeline.student.adopt import copy_adopted
from pipeline.student.encoder import Encoder, initialise
from pipeline.student.shape import EncoderShape


class TrainParams(BaseModel, frozen=True, extra="forbid"):
    """How a student is trained."""

    steps: int = Field(ge=0)
    """Updates; 0 leaves the student as it was initialised (a baseline)."""
    batch_seconds: float = Field(gt=0)
    """Padded audio in one batch."""
    crop: Crop
    """full, or aligned with max_seconds."""
    shuffle: Shuffle
    """everywhere, or shards with together."""
    learning_rate: float = Field(gt=0)
    """Peak; 2e-4 in DistilHuBERT."""
    warmup: float = Field(ge=0, le=1)
    """Share of the steps in which the rate rises; 0.07 in DistilHuBERT."""
    weight_decay: float = Field(ge=0)
    """Of matrices and kernels; biases and norms never decay."""
    clip: float | None = Field(gt=0)
    """Largest gradient norm; null does not clip."""
    feature_grad_mult: float = Field(gt=0)
    """Factor on the gradient that reaches the convolutions; 0.1 in DistilHuBERT."""
    l1_weight: float = Field(ge=0)
    """Weight of the mean absolute difference."""
    l2_weight: float = Field(ge=0)
    """Weight of the mean squared difference; 0 in DistilHuBERT and DPHuBERT."""
    cosine_weight: float = Field(ge=0)
    """Weight of the cosine term; 1 in DistilHuBERT."""
    cosine: Cosine
    """log_sigmoid: -log sigmoid cos, as in DistilHuBERT; raw: -cos, as in DPHuBERT."""
    precision: Literal["float32", "bfloat16"]
    """Of the forward pass on a GPU; losses and norms are float32 in both, and so is all on a CPU."""
    log_every: int = Field(gt=0)
    """Steps between rows of curves.csv; a row is the mean since the row before."""
    validate_every: int | None = Field(gt=0)
    """Steps between validations on the dev split; null never validates."""
    checkpoint_every: int = Field(gt=0)
    """Steps between saved states, from which a killed run goes on."""

    @property
    def loss_weights(self) -> LossWeights:
        """Of the terms of the loss."""
        return LossWeights(self.l1_weight, self.l2_weight, self.cosine_weight, self.cosine)


class StudentParams(BaseModel, frozen=True, extra="forbid"):
    """One student: what it learns from, how it starts, what it is, how it is trained."""

    ensemble: Ensemble
    """Whose layers are predicted: single, heads, average or concat."""
    init: Init
    """Where the first weights come from."""
    shape: EncoderShape
    """What the student is."""
    train: TrainParams
    """How it is trained."""
    seed: int = Field(ge=0)
    """Of weights, order, crops and dropout."""


class Update(NamedTuple):
    """What one step did."""

    terms: dict[str, float]
    """Of the loss, by name."""
    grad_norm: float
    """Before clipping."""
    rate: float
    """Learning rate."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are numbers; only then were the weights changed."""
        return math.isfinite(self.terms["total"]) and math.isfinite(self.grad_norm)


class Learner(nn.Module):
    """A student with its heads and their optimiser."""

    def __init__(
        self,
        params: StudentParams,
        targets: Targets,
        init: Path | None,
        device: str,
        make_targets: TargetMaker,
    ) -> None:
        """Build and initialise; a pure function of the settings and the init file.

        Args:
            params: the student's settings.
            targets: the arrays it predicts.
            init: weights to adopt.
            device: cpu, cuda, cuda:1.
            make_targets: stored rows to what the heads are compared with, on this device.

        Raises:
            SettingsError: the init is to be adopted and is not given or does not fit, or teachers cannot be combined so.
        """
        super().__init__()
        self.params, self.device, self.make_targets = params, torch.device(device), make_targets
        self.encoder = Encoder(params.shape, params.train.feature_grad_mult)
        generator = torch.Generator().manual_seed(params.seed)
        initialise(self.encoder, generator)
        groups = head_groups(params.ensemble, targets.widths)
        self.shares = [group.share for group in groups]
        self.heads = make_heads(params.shape.width, groups, generator)
        if isinstance(params.init, Adopted):
            if init is None:
                raise SettingsError("init is {kind: adopted}, which needs the teacher's weights: pass --init data/init")
            copy_adopted(self.encoder, [init], final_norm=False)
        self.to(self.device)
        self.optimizer = make_optimizer([self.encoder, self.heads], params.train.weight_decay)
        torch.manual_seed(params.seed)  # from here on dropout alone draws from it

    def forward(self, batch: Batch) -> tuple[dict[str, Float[Tensor, ""]], list[Float[Tensor, "B _ T _"]]]:
        """Loss terms of a batch, and the predictions (B, N, T, E) of each group of heads."""
        train = self.params.train
        half = train.precision == "bfloat16" and self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            waves = batch.waves.to(self.device, non_blocking=True).float() * INT16_SCALE
            states = self.encoder(waves, batch.samples.to(self.device))
            last = self.encoder.read_out(states)
            predicted = [group(last) for group in self.heads]
        targets = self.make_targets([rows.to(self.device, non_blocking=True) for rows in batch.targets])
        mask = frame_mask(batch.frames.to(self.device), targets[0].shape[2])
        losses = [distillation_loss(p, h, mask, train.loss_weights) for p, h in zip(predicted, targets, strict=True)]
        return mean_over_groups(losses, self.shares), predicted

    def update(self, batch: Batch, step: int) -> Update:
        """Make update `step` of 1..steps, unless its loss or gradient is not finite."""
        train = self.params.train
        rate = rate_at(step, train.steps, train.learning_rate, train.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.train()
        self.optimizer.zero_grad(set_to_none=True)
        terms, _ = self(batch)
        terms["total"].backward()
        norm = nn.utils.clip_grad_norm_(self.parameters(), math.inf if train.clip is None else train.clip)
        *values, grad_norm = torch.stack([*terms.values(), norm]).tolist()  # one wait for the device
        update = Update(dict(zip(terms, values, strict=True)), grad_norm, rate)
        if update.is_finite:
            self.optimizer.step()
        return update

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean loss terms over all frames of some batches, without dropout."""
        self.eval()
        sums, frames = dict.fromkeys(self.params.train.loss_weights.terms, 0.0), 0
        for batch in batches:
            terms, _ = self(batch)
            count = int(batch.frames.sum())
            for name, term in terms.items():
                sums[name] += float(term) * count
            frames += count
        return {name: value / frames for name, value in sums.items()}
