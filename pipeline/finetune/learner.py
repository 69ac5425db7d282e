"""The learner: batches of both tasks in, updated weights out; model, loss weights and optimiser together, on one device."""

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from cache.frames import num_frames
from pipeline.distill.augment import draw_hidden
from pipeline.distill.batches import Batch
from pipeline.distill.learner import Update, seed_of
from pipeline.distill.world import ALONE, World, add_up, add_up_gradients
from pipeline.finetune.model import Model
from pipeline.finetune.rates import make_optimizer, set_rates
from pipeline.finetune.settings import FinetuneParams, Tuned
from pipeline.finetune.weights import LossWeights
from pipeline.padding import INT16_SCALE
from pipeline.student.encoder import Encoder, Hidden


class Learner(nn.Module):
    """A model with what its losses count, and their optimiser."""

    def __init__(
        self,
        params: FinetuneParams,
        encoder: Encoder,
        classes: Mapping[str, Sequence[str]],
        class_of: Mapping[str, Mapping[str, int]],
        seed: int,
        device: str,
        world: World = ALONE,
    ) -> None:
        """Draw the heads, bring everything to the device and make the optimiser.

        Args:
            params: the settings.
            encoder: with the weights it starts from.
            classes: of each task that is learned, its keywords or speakers.
            class_of: of each task, the class of every training utterance by its id.
            seed: of heads, masks and dropout.
            device: cpu, cuda, cuda:1.
            world: the processes that share every step.
        """
        super().__init__()
        self.params, self.seed, self.device, self.world = params, seed, torch.device(device), world
        self.class_of = class_of
        generator = torch.Generator().manual_seed(seed)
        self.model = Model(params, encoder, {task: len(names) for task, names in classes.items()}, generator)
        self.loss_weights = LossWeights(params.loss_weights, classes)
        self.to(self.device)
        self.optimizer = make_optimizer(self.model, self.loss_weights, params)

    def forward(self, task: str, batch: Batch, hide: Hidden | None = None, moves: bool = True) -> Float[Tensor, "B _"]:
        """What the head of a task makes of a batch."""
        half = self.params.train.precision == "bfloat16" and self.device.type == "cuda"
        waves = batch.waves.to(self.device, non_blocking=True).float() * INT16_SCALE
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=half):
            made: Tensor = self.model(task, waves, batch.samples.to(self.device), hide, moves)
        return made

    def update(self, batches: Iterable[tuple[str, Batch]], examples: Mapping[str, int], step: int) -> Update:
        """Make update `step` of 1..steps, unless its loss or gradient is not finite.

        Args:
            batches: this process's share of the step, each with its task.
            examples: of each task, in all batches of the step, those of other processes too.
            step: which update.
        """
        tuned, tasks = self.params.encoder, list(examples)
        moves = isinstance(tuned, Tuned) and step > tuned.frozen_steps
        rate = set_rates(self.optimizer, step, self.params)
        self.train()
        self.model.encoder.train(moves)  # what does not move is used as it will be: without dropout
        self.optimizer.zero_grad(set_to_none=True)
        told = self.loss_weights.now()
        summed = torch.zeros(1 + len(tasks), device=self.device)
        for task, batch in batches:
            torch.manual_seed(seed_of(self.seed, batch.number))
            classes = torch.tensor([self.class_of[task][name] for name in batch.ids], device=self.device)
            made = self(task, batch, self._hidden(batch) if moves else None, moves)
            loss = self.model.head(task).loss(made, classes)
            share = len(batch.ids) / examples[task]
            part = self.loss_weights(task, loss) * share
            part.backward()
            summed[0] += part.detach()
            summed[1 + tasks.index(task)] += loss.detach() * share
        summed = add_up(summed, self.world)
        moving = [parameter for parameter in self.parameters() if parameter.grad is not None]
        add_up_gradients(moving, self.world)
        clip = self.params.train.clip
        norm = nn.utils.clip_grad_norm_(moving, math.inf if clip is None else clip)
        total, *losses, grad_norm = torch.cat([summed, norm[None]]).tolist()  # one wait for the device
        update = Update({"total": total, **dict(zip(tasks, losses, strict=True)), **told}, grad_norm, rate)
        if update.is_finite:
            self.optimizer.step()
        return update

    def _hidden(self, batch: Batch) -> Hidden | None:
        """What of a batch of training the transformer does not see."""
        augment = self.params.augment
        if augment is None or augment.hide is None:
            return None
        frames, width = num_frames(batch.waves.shape[1]), self.model.encoder.shape.width
        hidden = draw_hidden(augment.hide, self.seed, batch.number, batch.frames, frames, width)
        return Hidden(*(None if masks is None else masks.to(self.device) for masks in hidden))
