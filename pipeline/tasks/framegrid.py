"""A grid of CTC heads: N seeds x R learning rates in, all of them trained side by side on the same frames.

The head is s3prl's for phone recognition (`downstream/ctc` with `libriphone.yaml`): the weighted sum of layers, Linear
D -> P, Linear P -> phones and blank, frame by frame. Nothing stands between the two linear maps, so the head is
multiplied out first, W = W_c W_p and b = W_c b_p + b_c, and a frame costs K x D and not P x (D + K) products. The
gradients reach W_c and W_p through that product: it is the same head, trained as published, at a fraction of the price.
"""

from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from pipeline.tasks.frames import Frames
from pipeline.tasks.grid import Runs
from pipeline.tasks.phones import BLANK, PhoneString


class FrameGrid(Runs):
    """Heads that see frames: `ProbeHead`s of K classes, the first of which is the blank."""

    def logits(self, layers: Float[Tensor, "L F D"]) -> Float[Tensor, "N R F K"]:
        """`ProbeHead.pooled` of every run, each frame taken for the mean of itself."""
        weight, bias = self._product()
        mixed = self.parameters["layer_scores"].softmax(-1) @ layers.flatten(1)  # (N, R, L) (L, F D) -> (N, R, F D)
        return mixed.unflatten(-1, layers.shape[1:]) @ weight.mT + bias.unsqueeze(-2)

    def _product(self) -> tuple[Float[Tensor, "N R K D"], Float[Tensor, "N R K"]]:
        """The two linear maps of every run as one."""
        at = self.parameters
        weight = at["classify.weight"] @ at["project.weight"]
        return weight, (at["classify.weight"] @ at["project.bias"][..., None])[..., 0] + at["classify.bias"]

    @torch.no_grad()
    def finite(self) -> Bool[Tensor, "N R"]:
        """Which runs have not diverged."""
        parts = (*self._product(), self.parameters["layer_scores"])
        return torch.stack([part.isfinite().flatten(2).all(-1) for part in parts]).all(0)

    def step(self, frames: Frames, strings: list[PhoneString], clip_norm: float | None) -> None:
        """One Adam step of every run at its own learning rate, down the mean loss per phone (torch's reduction)."""
        losses = ctc(self.logits(frames.layers), frames.counts, strings)  # (N, R, B)
        lengths = torch.tensor([len(string) for string in strings], device=losses.device)
        self.descend((losses / lengths).mean(-1).sum(), clip_norm)  # a sum over runs: they do not mix

    @torch.no_grad()
    def answers(self, frames: Frames) -> list[list[list[PhoneString]]]:
        """What every run hears: by seed, rate and utterance."""
        best = self.logits(frames.layers).argmax(-1).cpu().numpy()
        return [[greedy(run, frames.counts) for run in of_seed] for of_seed in best]


def ctc(logits: Float[Tensor, "N R F K"], counts: list[int], strings: list[PhoneString]) -> Float[Tensor, "N R B"]:
    """Minus log likelihood of the strings (Graves et al. 2006), 0 where a string does not fit its frames."""
    runs, num = logits.shape[:2], len(counts)
    copies = runs.numel()
    by_frame = logits.log_softmax(-1).flatten(0, 1).transpose(0, 1)  # (F, NR, K)
    padded = pad_sequence(list(by_frame.split(counts)))  # (T, B, NR, K)
    targets = pad_sequence([torch.tensor(string) for string in strings], batch_first=True)
    losses = functional.ctc_loss(
        padded.flatten(1, 2),
        targets.repeat_interleave(copies, 0).to(logits.device),
        torch.tensor(counts).repeat_interleave(copies),
        torch.tensor([len(string) for string in strings]).repeat_interleave(copies),
        blank=BLANK,
        reduction="none",
        zero_infinity=True,
    )
    return losses.reshape(num, copies).T.unflatten(0, runs)


def greedy(best: Int64[np.ndarray, " F"], counts: list[int]) -> list[PhoneString]:
    """The best symbol of every frame in, the phones of every utterance out: repeats are one, blanks are none."""
    begins = np.cumsum([0, *counts])
    new = np.ones(len(best), dtype=bool)
    new[1:] = best[1:] != best[:-1]
    new[begins[:-1]] = True
    heard = new & (best != BLANK)
    return [tuple(best[a:b][heard[a:b]].tolist()) for a, b in pairwise(begins.tolist())]
