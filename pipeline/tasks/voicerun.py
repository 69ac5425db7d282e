"""Batches of voices in, heads that tell voices apart out: runs of one head each, side by side on the same batches.

A run keeps its own AdamW, clipping and best dev checkpoint, so that none can see another: a head trained beside others
is the head trained alone.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from cache.frames import FrameSpan
from pipeline.tasks.eer import Ranked, equal_error, separation
from pipeline.tasks.frames import AT_ONCE, FrameFeatures, Frames
from pipeline.tasks.labels import Examples
from pipeline.tasks.margin import AmSoftmax
from pipeline.tasks.sidebyside import SideBySide
from pipeline.tasks.voices import Asked
from pipeline.tasks.xvector import VoiceHead


class Voices(NamedTuple):
    """Some utterances beside each other."""

    layers: Float[Tensor, "L B T D"]
    counts: Int64[Tensor, " B"]
    """Frames of each; what stands behind them is never looked at."""


class Quality(NamedTuple):
    """What a checkpoint is worth on dev, to be compared as it stands: the lowest is the best."""

    eer: float
    closeness: float
    """Minus the distance of the two kinds in standard deviations: decides where few trials give the same EER."""


NEVER = Quality(1.0, float("inf"))
"""Of a run that diverged, and before the first look."""


class VoiceRun:
    """A head, its training speakers, and how it is trained."""

    def __init__(
        self,
        head: VoiceHead,
        loss: AmSoftmax,
        lr: float,
        weight_decay: float,
        clip_norm: float | None,
        device: torch.device,
    ) -> None:
        self.head, self.loss, self.lr, self._clip_norm = head.to(device), loss.to(device), lr, clip_norm
        self._parameters = [*self.head.parameters(), *self.loss.parameters()]
        self._descent = torch.optim.AdamW(self._parameters, lr, weight_decay=weight_decay)
        self.best, self.best_step, self.idle = NEVER, 0, 0
        self._kept: dict[str, Any] = deepcopy(self.head.state_dict())

    def step(self, voices: Voices, speakers: Int64[Tensor, " B"]) -> None:
        """One update."""
        embeddings = self.head(voices.layers, voices.counts)
        self._descent.zero_grad()
        self.loss(self.head.xvector.training_vectors(embeddings), speakers).backward()
        if self._clip_norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        self._descent.step()

    @torch.no_grad()
    def embed(self, voices: Voices) -> Float[np.ndarray, "B E"]:
        """Embeddings of length one, so that their product is their cosine."""
        return nn.functional.normalize(self.head(voices.layers, voices.counts), dim=-1).cpu().numpy()

    def look(self, step: int, quality: Quality) -> None:
        """Keep this checkpoint if it is the best so far."""
        self.idle += 1
        if quality < self.best:
            self.best, self.best_step, self.idle = quality, step, 0
            self._kept = deepcopy(self.head.state_dict())

    def go_back(self) -> None:
        """To the best checkpoint."""
        self.head.load_state_dict(self._kept)


def train(
    runs: Sequence[VoiceRun],
    batches: Iterator[tuple[Voices, Int64[Tensor, " B"]]],
    features: FrameFeatures,
    dev: Asked,
    steps: int,
    validate_every: int,
    patience: int | None,
    side: SideBySide,
    on_step: Callable[[float], None] | None = None,
) -> None:
    """Train every run, then take each back to the checkpoint with the lowest EER on dev.

    A run whose last `patience` validations brought nothing better is over.
    """
    going = list(runs)
    for number in range(1, steps + 1):
        voices, speakers = next(batches)
        side.each([partial(run.step, voices, speakers) for run in going])
        if on_step is not None:
            on_step(1.0)
        if number % validate_every and number != steps:
            continue
        for run, embeddings in zip(going, embed(going, features, dev.ids, side), strict=True):
            run.look(number, quality_of(embeddings, dev))
        going = [run for run in going if patience is None or run.idle < patience]
        if not going:
            break
    for run in runs:
        run.go_back()


def embed(
    runs: Sequence[VoiceRun], features: FrameFeatures, ids: Sequence[str], side: SideBySide
) -> list[Float[np.ndarray, "U E"]]:
    """The embedding of every utterance, whole, by every run; each is read once."""
    by_length = sorted(range(len(ids)), key=lambda number: (features.num_frames(ids[number]), number))
    parts: list[list[Float[np.ndarray, "B E"]]] = []
    for at in range(0, len(ids), AT_ONCE):
        voices = beside(features.of([ids[number] for number in by_length[at : at + AT_ONCE]]))
        parts.append(side.each([partial(run.embed, voices) for run in runs]))
    back = np.argsort(by_length)
    return [np.concatenate(of_run)[back] for of_run in zip(*parts, strict=True)]


def cosines(embeddings: Float[np.ndarray, "U E"], asked: Asked) -> Float[np.ndarray, " N"]:
    """The score of every trial."""
    return np.einsum("ne,ne->n", embeddings[asked.pairs[:, 0]], embeddings[asked.pairs[:, 1]])


def quality_of(embeddings: Float[np.ndarray, "U E"], dev: Asked) -> Quality:
    """EER and separation on dev, the mean over its lists; the worst there is where a run has diverged."""
    scores = cosines(embeddings, dev)
    if not np.isfinite(scores).all():
        return NEVER
    parts = [(scores[of], dev.same[of]) for of in dev.each_list]
    return Quality(
        fmean(equal_error(Ranked(*part).rates()).rate for part in parts), -fmean(separation(*part) for part in parts)
    )


def training_batches(
    features: FrameFeatures,
    train: Examples,
    batch: int,
    crop_frames: int | None,
    balanced: bool,
    generator: torch.Generator,
) -> Iterator[tuple[Voices, Int64[Tensor, " B"]]]:
    """Batches without end, with the number of who speaks: of a longer utterance a crop from anywhere in it."""
    for rows in rows_without_end(train, batch, balanced, generator):
        ids = [train.ids[row] for row in rows]
        spans = [crop(features.num_frames(name), crop_frames, generator) for name in ids]
        voices = beside(features.of(ids, spans))
        yield voices, torch.tensor([train.classes[row] for row in rows], device=voices.layers.device)


def crop(num_frames: int, crop_frames: int | None, generator: torch.Generator) -> FrameSpan:
    """So many frames of an utterance, from anywhere in it; all of a shorter one."""
    if crop_frames is None or num_frames <= crop_frames:
        return FrameSpan(0, num_frames)
    return FrameSpan(int(torch.randint(num_frames - crop_frames + 1, (1,), generator=generator)), crop_frames)


def rows_without_end(train: Examples, batch: int, balanced: bool, generator: torch.Generator) -> Iterator[list[int]]:
    """Plain: permutations of the split back to back. Balanced: drawn with replacement, each speaker as often as another."""
    sizes = torch.bincount(torch.tensor(train.classes))
    weights = 1 / sizes[list(train.classes)].double()
    waiting: list[int] = []
    while True:
        while len(waiting) < batch:
            if balanced:
                waiting += torch.multinomial(weights, len(train), replacement=True, generator=generator).tolist()
            else:
                waiting += torch.randperm(len(train), generator=generator).tolist()
        yield waiting[:batch]
        waiting = waiting[batch:]


def beside(frames: Frames) -> Voices:
    """Utterances one after another to utterances beside each other, with zeros behind the shorter ones."""
    num_layers, _, width = frames.layers.shape
    layers = frames.layers.new_zeros(num_layers, len(frames.counts), max(frames.counts), width)
    for number, part in enumerate(frames.layers.split(frames.counts, dim=1)):
        layers[:, number, : part.shape[1]] = part
    return Voices(layers, torch.tensor(frames.counts, device=layers.device))
