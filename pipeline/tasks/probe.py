"""A probe: pooled features of a frozen model and labelled splits in, a score with its uncertainty out.

The SUPERB procedure for utterance tasks (s3prl: Featurizer and head, Adam, no schedule, clip 1, best dev checkpoint),
with the learning rate swept and chosen on the dev split: a score at one fixed learning rate says as much about that
number as about the model. The test split is looked at once, by the chosen heads.
"""

from collections import Counter
from collections.abc import Iterator

import torch
from jaxtyping import Int64
from pydantic import BaseModel, Field
from torch import Tensor

from pipeline.seeds import Seeds
from pipeline.tasks import grid, metrics, misses
from pipeline.tasks.features import PooledFeatures
from pipeline.tasks.heads import ProbeHead
from pipeline.tasks.labels import Examples, LabelledSplits, whole_task
from pipeline.tasks.score import Miss, ProbeScore, SeedScore, at_edge, mean_weights, refuse_diverged


class ProbeParams(BaseModel, frozen=True, extra="forbid"):
    """How the head of one task is trained; the same for every model."""

    head_width: int = Field(ge=1)
    """Channels between the weighted sum and the classifier; SUPERB: 256."""
    normalise_layers: bool
    """LayerNorm without affine over every frame of every layer before the sum; SUPERB: false."""
    lrs: tuple[float, ...] = Field(min_length=1)
    """Learning rates to try; the best on the dev split, averaged over seeds, is used."""
    seeds: Seeds
    """Each seed starts the head and orders the examples; the score is their mean."""
    steps: int = Field(ge=1)
    """Updates of every run."""
    batch: int = Field(ge=1)
    """Utterances in an update; SUPERB: 32."""
    class_balanced: bool
    """Draw training examples so that every class comes equally often; SUPERB: true for KS, false for SID."""
    clip_norm: float | None = Field(gt=0)
    """Gradient norm above which an update is scaled down; SUPERB: 1."""
    validate_every: int = Field(ge=1)
    """Updates between two looks at the dev split."""
    patience: int | None = Field(ge=1)
    """Validations without a better one after which a run is over; null trains for all steps."""


def probe(features: PooledFeatures, splits: LabelledSplits, params: ProbeParams, device: torch.device) -> ProbeScore:
    """Train every seed at every learning rate, choose the rate on dev, score the chosen heads on test."""
    generators = [torch.Generator().manual_seed(seed) for seed in params.seeds]
    (_, num_layers, width), num_classes = features.means.shape, len(splits.names)
    heads = [ProbeHead(num_layers, width, params.head_width, num_classes, generator) for generator in generators]
    train, dev = (_on(device, features, examples) for examples in (splits.train, splits.dev))
    best = grid.train(
        grid.HeadGrid(heads, params.lrs, device),
        batches(splits.train, params, generators),
        train,
        dev,
        params.steps,
        params.validate_every,
        params.clip_norm,
        params.patience,
    )
    refuse_diverged(whole_task(splits.task.name), best.step.flatten().tolist(), params.lrs)
    losses = best.loss.nan_to_num(torch.inf)  # a run that diverged
    by_rate = list(
        zip(best.accuracy.clamp(min=0).double().mean(0).tolist(), losses.double().mean(0).tolist(), strict=True)
    )
    # ties are common on a small dev split: the lower cross entropy wins, then the smaller learning rate
    chosen = min(range(len(by_rate)), key=lambda rate: (-by_rate[rate][0], by_rate[rate][1], params.lrs[rate]))

    means, truth = _on(torch.device("cpu"), features, splits.test)
    scores, answered = [], Counter[tuple[int, int]]()
    wrong: tuple[Miss, ...] = ()
    for number, seed in enumerate(params.seeds):
        head = best.head(number, chosen, like=heads[number])
        with torch.no_grad():
            logits = torch.cat([head.pooled(some) for some in means.split(256)])
        answers = logits.argmax(-1)
        if number == 0:
            wrong = misses.of_classes(splits.test.ids, splits.names, logits, truth)
        for cell in metrics.confusion(answers, truth):
            answered[cell.truth, cell.answer] += cell.times
        scores.append(
            SeedScore.of(
                seed,
                int(best.step[number, chosen]),
                float(best.accuracy[number, chosen].clamp(min=0)),
                metrics.accuracy(answers, truth),
                head.layer_weights,
            )
        )
    mean, sd = metrics.mean_and_sd([score.test for score in scores])
    return ProbeScore(
        metric=splits.task.metric,
        higher_is_better=splits.task.higher_is_better,
        mean=mean,
        sd=sd,
        interval=metrics.wilson_interval(mean, len(truth)),
        chance=splits.chance,
        majority=splits.majority,
        lr=params.lrs[chosen],
        lr_at_edge=at_edge(params.lrs[chosen], params.lrs),
        dev_by_lr=tuple((lr, round(dev, 6)) for lr, (dev, _) in zip(params.lrs, by_rate, strict=True)),
        seeds=tuple(scores),
        layers=features.layers,
        layer_weights=mean_weights(scores),
        classes=splits.names,
        counts={"train": len(splits.train), "dev": len(splits.dev), "test": len(splits.test)},
        misses=wrong,
        confusion=tuple(metrics.Confusion(*pair, answered[pair]) for pair in sorted(answered)),
    )


def batches(
    examples: Examples, params: ProbeParams, generators: list[torch.Generator]
) -> Iterator[Int64[Tensor, "N B"]]:
    """Row numbers of training examples for every seed, without end.

    Plain: permutations of the split back to back. Balanced: drawn with replacement, each example with a probability of
    one over the size of its class (s3prl's WeightedRandomSampler).
    """
    sizes = Counter(examples.classes)
    weights = torch.tensor([1 / sizes[index] for index in examples.classes], dtype=torch.float64)
    waiting = [torch.empty(0, dtype=torch.int64) for _ in generators]
    while True:
        rows = []
        for number, generator in enumerate(generators):
            while len(waiting[number]) < params.batch:
                if params.class_balanced:
                    fresh = torch.multinomial(weights, len(examples), replacement=True, generator=generator)
                else:
                    fresh = torch.randperm(len(examples), generator=generator)
                waiting[number] = torch.cat([waiting[number], fresh])
            rows.append(waiting[number][: params.batch])
            waiting[number] = waiting[number][params.batch :]
        yield torch.stack(rows)


def _on(device: torch.device, features: PooledFeatures, examples: Examples) -> tuple[Tensor, Tensor]:
    """The means and classes of one split."""
    return features.of(examples.ids).to(device), torch.tensor(examples.classes, device=device)
