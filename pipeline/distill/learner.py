"""The learner: a batch in, loss terms and updated weights out; student, predictor and optimiser together, on one device."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cache.frames import RATE_HZ, num_frames
from pipeline.distill.augment import draw_hidden
from pipeline.distill.batches import Batch
from pipeline.distill.ensemble import TargetMaker
from pipeline.distill.losses import distillation_sums
from pipeline.distill.predictor import Predictor
from pipeline.distill.pruning import SparsityControl
from pipeline.distill.schedule import make_optimizer, set_rates
from pipeline.distill.settings import Phase, StudentParams
from pipeline.distill.world import ALONE, World, add_up, add_up_gradients
from pipeline.padding import INT16_SCALE, bucket_samples, frame_mask
from pipeline.student.encoder import Encoder, GateValues, Hidden
from pipeline.student.gates import Gates
from pipeline.student.shape import EncoderShape
from pipeline.student.size import expected_sparsity


class Update(NamedTuple):
    """What one step did."""

    terms: dict[str, float]
    """Of the loss, by name: over all batches of the step, of all processes."""
    grad_norm: float
    """Before clipping."""
    rate: float
    """Learning rate."""

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradient are numbers; only then were the weights changed."""
        return math.isfinite(self.terms["total"]) and math.isfinite(self.grad_norm)


class Pruning(nn.Module):
    """Gates on a student, and what drives them to the sparsity that is wanted."""

    def __init__(self, gates: Gates, control: SparsityControl) -> None:
        super().__init__()
        self.gates, self.control = gates, control


class Learner(nn.Module):
    """A student with what predicts from it and their optimiser, in one phase of a training."""

    def __init__(
        self,
        params: StudentParams,
        phase: Phase,
        encoder: Encoder,
        predictor: Predictor,
        target_weights: Sequence[float],
        device: str,
        make_targets: TargetMaker,
        pruning: Pruning | None = None,
        world: World = ALONE,
    ) -> None:
        """Bring everything to the device and make the optimiser.

        Args:
            params: the student's settings.
            phase: which of its phases.
            encoder: the student.
            predictor: heads or linears on it.
            target_weights: of every target's loss in the whole.
            device: cpu, cuda, cuda:1.
            make_targets: stored rows to what predictions are compared with, on this device.
            pruning: gates and what drives them, in a phase that prunes.
            world: the processes that share every step.
        """
        super().__init__()
        self.params, self.phase, self.device, self.make_targets = params, phase, torch.device(device), make_targets
        self.world = world
        self.encoder, self.predictor, self.pruning = encoder, predictor, pruning
        self.to(self.device)
        self.target_weights = torch.tensor(target_weights, dtype=torch.float32, device=self.device)
        modules: list[nn.Module] = [self.encoder, self.predictor]
        more = [] if pruning is None else pruning.control.groups(pruning.gates)
        self.optimizer = make_optimizer(modules, phase.learning_rate, params.train.weight_decay, more)
        self._closed: GateValues | None = None
        # a bound method: as a module it would be in the state twice
        self._encode = encoder.forward if params.train.compile_seconds is None else torch.compile(encoder.forward)

    def forward(self, batch: Batch) -> tuple[dict[str, Float[Tensor, " N"]], list[Float[Tensor, "B _ T _"]]]:
        """Of a batch, the sums over frames of each target's loss terms, and the predictions (B, N, T, E) of each group."""
        train = self.params.train
        half = train.precision == "bfloat16" and self.device.type == "cuda"
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            waves = batch.waves.to(self.device, non_blocking=True).float() * INT16_SCALE
            if train.compile_seconds is not None:
                bucket = bucket_samples(waves.shape[1], int(train.compile_seconds * RATE_HZ))
                waves = nn.functional.pad(waves, (0, bucket - waves.shape[1]))
            states = self._encode(waves, batch.samples.to(self.device), self._gates(), self._hidden(batch, waves))
            predicted = self.predictor(states, self.encoder.read_out(states))
        targets = self.make_targets([rows.to(self.device, non_blocking=True) for rows in batch.targets])
        frames = targets[0].shape[2]
        predicted = [group[:, :, :frames] for group in predicted]  # of what only a compiled encoder was padded with
        mask = frame_mask(batch.frames.to(self.device), frames)
        sums = [distillation_sums(p, h, mask, train.loss_weights) for p, h in zip(predicted, targets, strict=True)]
        return {name: torch.cat([group[name] for group in sums]) for name in train.loss_weights.terms}, predicted

    def update(self, batches: Iterable[Batch], frames: int, step: int) -> Update:
        """Make update `step` of 1..steps of this phase, unless its loss or gradient is not finite.

        Args:
            batches: this process's share of the step.
            frames: in all batches of the step, those of other processes too.
            step: which update.
        """
        train = self.params.train
        rate = set_rates(self.optimizer, step, self.phase.steps, self.phase.warmup)
        self.train()
        self.optimizer.zero_grad(set_to_none=True)
        summed = torch.zeros(len(train.loss_weights.terms), device=self.device)
        sparsity = self._regularise(step)
        for batch in batches:
            torch.manual_seed(seed_of(self.params.seed, batch.number))
            per_target, _ = self(batch)
            means = self._weighted(per_target) / frames
            means[-1].backward()
            summed += means.detach()
        summed = add_up(summed, self.world)
        add_up_gradients(self.parameters(), self.world)
        norm = nn.utils.clip_grad_norm_(self.parameters(), math.inf if train.clip is None else train.clip)
        *values, grad_norm = torch.cat([summed, norm[None]]).tolist()  # one wait for the device
        terms = dict(zip(train.loss_weights.terms, values, strict=True)) | sparsity
        update = Update(terms, grad_norm, rate)
        if update.is_finite:
            self.optimizer.step()
        return update

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch], names: Sequence[str]) -> dict[str, float]:
        """Mean loss terms over all frames of some batches, of all processes, without dropout; and every target's loss.

        Args:
            batches: this process's share.
            names: of the targets.
        """
        self.eval()
        self._closed = None  # the gates have moved since
        terms = self.params.train.loss_weights.terms
        sums = torch.zeros(len(terms) + len(names), dtype=torch.float64, device=self.device)
        frames = torch.zeros(1, dtype=torch.float64, device=self.device)
        for batch in batches:
            per_target, _ = self(batch)
            sums += torch.cat([self._weighted(per_target), per_target["total"]])
            frames += int(batch.frames.sum())
        *means, _ = (add_up(torch.cat([sums, frames]), self.world) / add_up(frames.clone(), self.world)).tolist()
        return dict(zip([*terms, *names], means, strict=True))

    @property
    def shape(self) -> EncoderShape:
        """The student's, before the gates of this phase are closed."""
        return self.encoder.shape

    def _gates(self) -> GateValues | None:
        """Of one forward: with noise in training, as they would be closed now in validation."""
        if self.pruning is None:
            return None
        if self.training:
            return self.pruning.gates.sample()
        if self._closed is None:
            self._closed = self.pruning.control.close(self.shape, self.pruning.gates)
        return self._closed

    def _hidden(self, batch: Batch, waves: Float[Tensor, "B S"]) -> Hidden | None:
        """What of a batch of training the transformer does not see."""
        augment = self.params.augment
        if augment is None or augment.hide is None or not self.training:
            return None
        frames = num_frames(waves.shape[1])
        hidden = draw_hidden(augment.hide, self.params.seed, batch.number, batch.frames, frames, self.shape.width)
        return Hidden(*(None if masks is None else masks.to(self.device) for masks in hidden))

    def _regularise(self, step: int) -> dict[str, float]:
        """Add the gradient of the size to that of the loss; tells the expected sparsity."""
        if self.pruning is None:
            return {}
        sparsity = expected_sparsity(self.shape, self.pruning.gates)
        # every process adds its part: gradients are summed
        (self.pruning.control.regulariser(sparsity, step) / self.world.size).backward()
        return {"sparsity": float(sparsity.detach())}

    def _weighted(self, per_target: dict[str, Float[Tensor, " N"]]) -> Float[Tensor, " M"]:
        """Every term as one number: the weighted sum over targets."""
        return torch.stack([(self.target_weights * term).sum() for term in per_target.values()])


def seed_of(seed: int, number: int) -> int:
    """Of dropout in one batch: so a training resumes without torch's random state, and processes differ."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1, np.uint64)[0] >> 1)
