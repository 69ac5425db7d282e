"""A model and utterances that it did not learn from in; accuracy of keywords and error rates of speaker verification out.

Whole utterances, without crops, noise or masks. An utterance is computed once, however many trials it is in.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor

from cache.frames import RATE_HZ
from pipeline.distill.batches import BatchReader
from pipeline.distill.plan import Full, plan_epoch
from pipeline.distill.world import add_up
from pipeline.finetune.examples import AllExamples
from pipeline.finetune.learner import Learner
from pipeline.ordered import ordered_map
from pipeline.tasks.eer import DetectionCost, Ranked, equal_error, min_dcf
from pipeline.tasks.metrics import accuracy
from pipeline.tasks.voices import Asked

AHEAD = 3  # batches read while one is computed


class Judged(NamedTuple):
    """One model on one split."""

    scores: dict[str, float]
    """kws_accuracy, sv_eer and sv_min_dcf, of tasks that are learned."""
    trial_scores: list[Float64[np.ndarray, " _"]]
    """Of every list of trials, the one that counts first: the cosine of each trial."""

    @property
    def error(self) -> float:
        """Mean over tasks of 1 - accuracy and EER: what is chosen by."""
        errors = {"kws_accuracy": lambda accuracy: 1 - accuracy, "sv_eer": lambda rate: rate}
        told = [errors[name](value) for name, value in self.scores.items() if name in errors]
        return sum(told) / len(told)


@torch.no_grad()
def judge(learner: Learner, reader: BatchReader, examples: AllExamples, split: str) -> Judged:
    """Judge on dev or test; the same in every process.

    Args:
        learner: the model.
        reader: of all utterances of the tasks.
        examples: labels and trials.
        split: dev or test.
    """
    learner.eval()
    ids = examples.judged(split)
    scores: dict[str, float] = {}
    trial_scores: list[Float64[np.ndarray, " _"]] = []
    if (keywords := examples.keywords(split)) is not None:
        answers = _made(learner, reader, "kws", ids["kws"]).argmax(1)
        scores["kws_accuracy"] = accuracy(answers, torch.tensor(keywords.classes))
    if lists := examples.trials(split):
        assert learner.params.tasks.sv is not None
        embeddings = _made(learner, reader, "sv", ids["sv"])
        trial_scores = [cosines(embeddings, ids["sv"], asked) for asked in lists]
        scores |= error_rates(trial_scores[0], lists[0], learner.params.tasks.sv.cost)
    return Judged(scores, trial_scores)


def cosines(embeddings: Float[Tensor, "U E"], ids: Sequence[str], asked: Asked) -> Float64[np.ndarray, " N"]:
    """The score of every trial of a list; embeddings are of `ids`, in their order."""
    at = {name: number for number, name in enumerate(ids)}
    unit = torch.nn.functional.normalize(embeddings[[at[name] for name in asked.ids]].double(), dim=1)
    first, second = torch.from_numpy(asked.pairs).T
    scores: Float64[np.ndarray, " N"] = (unit[first] * unit[second]).sum(1).numpy()
    return scores


def error_rates(scores: Float64[np.ndarray, " N"], asked: Asked, cost: DetectionCost) -> dict[str, float]:
    """Equal error rate and least detection cost: of several lists, as dev may have, the mean."""
    rates = [Ranked(scores[of], asked.same[of]).rates() for of in asked.each_list]
    return {
        "sv_eer": fmean(equal_error(of_list).rate for of_list in rates),
        "sv_min_dcf": fmean(min_dcf(of_list, cost) for of_list in rates),
    }


def _made(learner: Learner, reader: BatchReader, task: str, ids: Sequence[str]) -> Float[Tensor, "U _"]:
    """What the head of a task makes of utterances, on the host: each process computes its share of the batches."""
    world = learner.world
    number_of = {u.id: number for number, u in enumerate(reader.manifest)}
    numbers = np.array([number_of[name] for name in ids])
    samples = reader.samples[numbers]
    seconds = max(learner.params.tasks.named[task].batch_seconds, float(samples.max()) / RATE_HZ)
    plan = plan_epoch(samples, Full(kind="full"), seconds, 0, 0)
    mine = [[item._replace(utterance=int(numbers[item.utterance])) for item in items] for items in plan]
    row_of = {name: row for row, name in enumerate(ids)}
    made: Tensor | None = None
    with ThreadPoolExecutor(1) as executor:
        for batch in ordered_map(executor, reader.read_clean, mine[world.rank :: world.size], AHEAD):
            out = learner(task, batch)
            if made is None:
                made = torch.zeros(len(ids), out.shape[1], device=learner.device)
            made[[row_of[name] for name in batch.ids]] = out
    if made is None:  # fewer batches than processes
        made = torch.zeros(len(ids), learner.model.head(task).width, device=learner.device)
    return add_up(made, world).cpu()
