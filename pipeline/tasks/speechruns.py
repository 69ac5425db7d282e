"""Heads of speech recognition and the frames of a training split in, the best dev checkpoint of each out.

A run is one head at one learning rate. Runs go side by side on the same batches, so that a store is read once for all of
them; no run sees another: each ends where it would end alone.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from pipeline.tasks.asr import AsrParams
from pipeline.tasks.blstm import Draws, SpeechHead
from pipeline.tasks.characters import Alphabet, Spelling, Texts, TextSplits
from pipeline.tasks.frames import AT_ONCE, FrameFeatures, Frames
from pipeline.tasks.phones import BLANK
from pipeline.tasks.recognise import batches
from pipeline.tasks.sidebyside import SideBySide
from pipeline.tasks.worderrors import word_error_rate


class Heard(NamedTuple):
    """What a head made of one utterance."""

    log_probs: Float[np.ndarray, "T K"]
    loss: float
    """Minus log likelihood of the truth, per character."""


class Run:
    """One head at one learning rate, its Adam, and its best checkpoint on dev."""

    def __init__(self, head: SpeechHead, seed: int, rate: float, params: AsrParams, device: torch.device) -> None:
        self.head, self.rate, self._params = head.to(device), rate, params
        self._optimizer = torch.optim.Adam(self.head.parameters(), rate, fused=True)
        self._draws = Draws.seeded(seed, device)
        self.dev, self.best_step, self.over = 1.0, 0, False  # a run that diverges is where it began, and says nothing
        self._best, self._key, self._idle = self._snapshot(), (float("inf"), float("inf")), 0

    def step(self, frames: Frames, spellings: list[Spelling]) -> None:
        """One Adam step down the mean loss per character (torch's reduction)."""
        if self.over:
            return
        loss = per_character(self.head(frames, self._params.masks, self._draws), spellings).mean()
        self._optimizer.zero_grad()
        loss.backward()
        if self._params.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.head.parameters(), self._params.clip_norm)
        self._optimizer.step()

    @torch.no_grad()
    def hear(self, frames: Frames, spellings: list[Spelling]) -> list[Heard]:
        """Utterances that it does not learn from."""
        if self.over:
            return []
        log_probs = self.head(frames)
        losses = per_character(log_probs, spellings).tolist()
        return [Heard(rows.cpu().numpy(), loss) for rows, loss in zip(log_probs, losses, strict=True)]

    def judge(self, number: int, heard: list[Heard], truths: Sequence[str], alphabet: Alphabet) -> None:
        """Keep step `number` if it is the best so far: fewer word errors, then a lower loss."""
        if self.over:
            return
        finite = all(bool(value.isfinite().all()) for value in self.head.parameters())
        key = (
            word_error_rate(truths, greedy(heard, alphabet)) if finite else float("inf"),
            fmean(one.loss for one in heard),
        )
        if key < self._key:
            self._best, self._key, self._idle = self._snapshot(), key, 0
            self.dev, self.best_step = key[0], number
        else:
            self._idle += 1
            self.over = not finite or self._idle == self._params.patience

    def settle(self) -> None:
        """Go back to the best checkpoint."""
        self.head.load_state_dict(self._best)
        self.over = False

    @property
    def rank(self) -> tuple[float, float, float]:
        """The smallest is the best: word errors, loss, rate."""
        return (*self._key, self.rate)

    def _snapshot(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.head.state_dict().items()}


def train(
    features: FrameFeatures,
    splits: TextSplits,
    params: AsrParams,
    starts: Sequence[tuple[int, float]],
    device: torch.device,
    cores: SideBySide,
    on_step: Callable[[float], None] | None = None,
) -> list[Run]:
    """One run for every (seed, rate), all on the same batches, each at its best checkpoint on dev."""
    runs = []
    for seed, rate in starts:
        generator = torch.Generator().manual_seed(seed)
        head = SpeechHead(len(features.layers), features.width, params, len(splits.alphabet), generator)
        runs.append(Run(head, seed, rate, params, device))
    spelled = [splits.alphabet.spell(text) for text in splits.train.texts]
    order = batches(len(splits.train), params.batch, torch.Generator().manual_seed(params.seeds[0]))
    begun: list[Future[None]] = []
    for number in range(1, params.steps + 1):
        rows = next(order)
        frames, spellings = features.of([splits.train.ids[row] for row in rows]), [spelled[row] for row in rows]
        before, begun = begun, cores.begin([partial(run.step, frames, spellings) for run in runs], after=begun)
        finish(before)  # two batches are under way at a time, so that no core waits for the slowest run
        if on_step is not None:
            on_step(1.0)
        if number % params.validate_every == 0 or number == params.steps:
            finish(begun)
            heard = listen(runs, features, splits.dev, splits.alphabet, cores)
            for run, of_run in zip(runs, heard, strict=True):
                run.judge(number, of_run, splits.dev.texts, splits.alphabet)
            if all(run.over for run in runs):
                break
    for run in runs:
        run.settle()
    return runs


def finish(pieces: Sequence[Future[None]]) -> None:
    """Wait for them."""
    for piece in pieces:
        piece.result()


def listen(
    runs: Sequence[Run], features: FrameFeatures, said: Texts, alphabet: Alphabet, cores: SideBySide
) -> list[list[Heard]]:
    """What every run hears in a split, by run and utterance."""
    heard: list[list[Heard]] = [[] for _ in runs]
    for at in range(0, len(said), AT_ONCE):
        frames = features.of(said.ids[at : at + AT_ONCE])
        spellings = [alphabet.spell(text) for text in said.texts[at : at + AT_ONCE]]
        for so_far, some in zip(heard, cores.each([partial(run.hear, frames, spellings) for run in runs]), strict=True):
            so_far += some
    return heard


def per_character(log_probs: list[Float[Tensor, "_ K"]], spellings: list[Spelling]) -> Float[Tensor, " B"]:
    """CTC: minus log likelihood of each spelling (Graves et al. 2006) over its length, 0 where it does not fit."""
    device = log_probs[0].device
    lengths = torch.tensor([len(spelling) for spelling in spellings])
    losses = functional.ctc_loss(
        pad_sequence(log_probs),
        pad_sequence([torch.tensor(spelling) for spelling in spellings], batch_first=True).to(device),
        torch.tensor([len(rows) for rows in log_probs]),
        lengths,
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )
    return losses / lengths.to(device)


def greedy(heard: Sequence[Heard], alphabet: Alphabet) -> list[str]:
    """The text of the best character of every frame."""
    return [alphabet.read(one.log_probs.argmax(-1).tolist()) for one in heard]
