"""Phone recognition: frames of a frozen model and phone strings in, a phone error rate with its uncertainty out.

SUPERB's PR (s3prl: Featurizer, `downstream/ctc`, Adam, no schedule, clip 1, best dev checkpoint, greedy answers), with
the learning rate swept and chosen on dev, over seeds. A store is read once for all of them: every run sees the same
batches, and a seed is where its head starts. The test split is looked at once, by the chosen heads.
"""

from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

import torch
from pydantic import BaseModel, Field

from pipeline.seeds import Seeds
from pipeline.tasks import grid, metrics, misses
from pipeline.tasks.framegrid import FrameGrid
from pipeline.tasks.frames import AT_ONCE, FrameFeatures
from pipeline.tasks.heads import ProbeHead
from pipeline.tasks.phones import PhoneString, Spoken, SpokenSplits
from pipeline.tasks.score import PhoneScore, SeedScore, at_edge, mean_weights, refuse_diverged


class PhoneParams(BaseModel, frozen=True, extra="forbid"):
    """How the head of phone recognition is trained; the same for every model."""

    head_width: int = Field(ge=1)
    """Channels between the weighted sum and the classifier; SUPERB: 256."""
    normalise_layers: bool
    """LayerNorm without affine over every frame of every layer before the sum; SUPERB: false."""
    silences: tuple[str, ...]
    """Symbols of the corpora that are no phones and are left out of the strings; [] where there are none."""
    unseen: Literal["refuse", "count"]
    """Phones of dev and test that no training utterance has: refuse them, or count each as an error, as they are."""
    lrs: tuple[float, ...] = Field(min_length=1)
    """Learning rates to try; the best on the dev split, averaged over seeds, is used. SUPERB's default: 0.01."""
    seeds: Seeds
    """Each seed starts the head; the order of the examples is drawn from the first. The score is their mean."""
    steps: int = Field(ge=1)
    """Updates of every run; SUPERB: 100 000."""
    batch: int = Field(ge=1)
    """Utterances in an update; SUPERB: 32, in two halves."""
    clip_norm: float | None = Field(gt=0)
    """Gradient norm above which an update is scaled down; SUPERB: 1."""
    validate_every: int = Field(ge=1)
    """Updates between two looks at the dev split."""
    patience: int | None = Field(ge=1)
    """Validations without a better one after which a run is over; null trains for all steps."""


class Chosen(NamedTuple):
    """The learning rate that is best on dev, and the best head of every seed at that rate."""

    lr: float
    heads: list[ProbeHead]
    steps: list[int]
    """After which each was at its best."""
    devs: list[float]
    """PER of each, on dev."""
    dev_by_lr: tuple[tuple[float, float], ...]
    """PER on dev, the mean over seeds, of every rate."""


def recognise(
    features: FrameFeatures,
    splits: SpokenSplits,
    params: PhoneParams,
    device: torch.device,
    on_step: Callable[[float], None] | None = None,
) -> PhoneScore:
    """Train every seed at every learning rate, choose the rate on dev, score the chosen heads on test.

    `on_step` hears of every update.
    """
    return _score(features, splits, params, device, _chosen(features, splits, params, device, on_step))


def _chosen(
    features: FrameFeatures,
    splits: SpokenSplits,
    params: PhoneParams,
    device: torch.device,
    on_step: Callable[[float], None] | None,
) -> Chosen:
    num_classes = len(splits.names) + 1
    heads = [
        ProbeHead(
            len(features.layers), features.width, params.head_width, num_classes, torch.Generator().manual_seed(s)
        )
        for s in params.seeds
    ]
    runs = FrameGrid(heads, params.lrs, device)
    features.hold([*splits.dev.ids, *splits.train.ids])
    order = batches(len(splits.train), params.batch, torch.Generator().manual_seed(params.seeds[0]))

    def step() -> None:
        rows = next(order)
        frames = features.of([splits.train.ids[row] for row in rows])
        runs.step(frames, [splits.train.strings[row] for row in rows], params.clip_norm)
        if on_step is not None:
            on_step(1.0)

    def on_dev() -> grid.RunScores:
        heard = answers(runs, features, splits.dev)
        rates = [[metrics.phone_error_rate(splits.dev.strings, run) for run in of_seed] for of_seed in heard]
        accuracy = 1 - torch.tensor(rates, device=device)  # of phones: what is kept is the highest
        kept = runs.finite()  # what diverged is never better than where it began
        return grid.RunScores(accuracy.where(kept, -torch.inf), torch.zeros_like(accuracy).where(kept, torch.inf))

    best = grid.keep_best(runs, step, on_dev, params.steps, params.validate_every, params.patience)
    refuse_diverged("pr", best.step.flatten().tolist(), params.lrs)
    rates = (1 - best.accuracy.double()).nan_to_num(posinf=1.0)  # a run that diverged says nothing
    by_rate = rates.mean(0).tolist()
    chosen = min(range(len(by_rate)), key=lambda rate: (by_rate[rate], params.lrs[rate]))

    return Chosen(
        params.lrs[chosen],
        [best.head(number, chosen, like=head) for number, head in enumerate(heads)],
        [int(step) for step in best.step[:, chosen]],
        [float(rate) for rate in rates[:, chosen]],
        tuple((lr, round(dev, 6)) for lr, dev in zip(params.lrs, by_rate, strict=True)),
    )


def _score(
    features: FrameFeatures, splits: SpokenSplits, params: PhoneParams, device: torch.device, chosen: Chosen
) -> PhoneScore:
    heard = [of_seed[0] for of_seed in answers(FrameGrid(chosen.heads, [chosen.lr], device), features, splits.test)]
    edits = [
        [metrics.phone_errors(*pair) for pair in zip(splits.test.strings, of_seed, strict=True)] for of_seed in heard
    ]
    errors = torch.tensor([[sum(edit) for edit in of_seed] for of_seed in edits], dtype=torch.float64)  # (N, U)
    tests = (errors.sum(1) / splits.test.num_phones).tolist()
    mean, sd = metrics.mean_and_sd(tests)
    seeds = tuple(
        SeedScore.of(seed, step, dev, test, head.layer_weights)
        for seed, step, dev, test, head in zip(
            params.seeds, chosen.steps, chosen.devs, tests, chosen.heads, strict=True
        )
    )
    constant = splits.constant()
    return PhoneScore(
        metric=splits.task.metric,
        higher_is_better=splits.task.higher_is_better,
        mean=mean,
        sd=sd,
        interval=metrics.bootstrap_interval(errors.mean(0), torch.tensor([len(s) for s in splits.test.strings])),
        chance=1.0,
        majority=metrics.phone_error_rate(splits.test.strings, [constant] * len(splits.test)),
        lr=chosen.lr,
        lr_at_edge=at_edge(chosen.lr, params.lrs),
        dev_by_lr=chosen.dev_by_lr,
        seeds=seeds,
        layers=features.layers,
        layer_weights=mean_weights(seeds),
        classes=splits.names,
        counts={"train": len(splits.train), "dev": len(splits.dev), "test": len(splits.test)},
        misses=misses.of_strings(splits.test.ids, splits.names, splits.test.strings, heard[0]),
        errors=metrics.PhoneErrors(*(sum(kind) for kind in zip(*(e for of in edits for e in of), strict=True))),
        test_phones=splits.test.num_phones,
        unseen=splits.unseen,
        left_out=len(splits.unfit),
    )


def answers(runs: FrameGrid, features: FrameFeatures, spoken: Spoken) -> list[list[list[PhoneString]]]:
    """What every run hears in a split: by seed, rate and utterance."""
    seeds, rates = runs.parameters["layer_scores"].shape[:2]
    heard: list[list[list[PhoneString]]] = [[[] for _ in range(rates)] for _ in range(seeds)]
    for at in range(0, len(spoken), AT_ONCE):
        for number, of_seed in enumerate(runs.answers(features.of(spoken.ids[at : at + AT_ONCE]))):
            for rate, strings in enumerate(of_seed):
                heard[number][rate] += strings
    return heard


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Row numbers of training utterances without end: permutations of the split back to back."""
    waiting: list[int] = []
    while True:
        while len(waiting) < size:
            waiting += torch.randperm(count, generator=generator).tolist()
        yield waiting[:size]
        waiting = waiting[size:]
