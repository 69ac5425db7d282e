"""A task in folds: the splits of every fold in, the mean score over folds out.

SUPERB's emotion recognition: each session is the test once, and the score is the mean. Every fold is a probe of its own,
with its own learning rate: the dev utterances of one fold are test utterances of others, so a rate chosen on all of
them together would have seen the test.
"""

from collections import Counter
from statistics import fmean

import torch

from pipeline.tasks import metrics, misses
from pipeline.tasks.features import PooledFeatures
from pipeline.tasks.labels import LabelledSplits, Task
from pipeline.tasks.probe import ProbeParams, probe
from pipeline.tasks.score import FoldedScore, FoldScore, ProbeScore, SeedScore, mean_weights


def probe_folds(
    features: PooledFeatures, task: Task, folds: list[LabelledSplits], params: ProbeParams, device: torch.device
) -> FoldedScore:
    """Probe every fold and average; what is one number in a probe is here the mean, and `folds` has the parts."""
    scores = [probe(features, fold, params, device) for fold in folds]
    seeds = tuple(_seed([score.seeds[number] for score in scores]) for number in range(len(params.seeds)))
    mean, sd = metrics.mean_and_sd([seed.test for seed in seeds])
    classes = tuple(sorted({name for score in scores for name in score.classes}))
    counts = Counter[str]()
    for score in scores:
        counts.update(score.counts)
    return FoldedScore(
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        mean=mean,
        sd=sd,
        interval=metrics.wilson_interval(mean, counts["test"]),
        chance=fmean(score.chance for score in scores),
        majority=fmean(score.majority for score in scores),
        lr=_most_chosen(scores),
        lr_at_edge=any(score.lr_at_edge for score in scores),
        dev_by_lr=tuple((lr, round(fmean(dict(score.dev_by_lr)[lr] for score in scores), 6)) for lr in params.lrs),
        seeds=seeds,
        layers=features.layers,
        layer_weights=mean_weights(scores),
        classes=classes,
        counts={split: counts[split] for split in ("train", "dev", "test")},
        misses=misses.worst(miss for score in scores for miss in score.misses),
        confusion=_confusion(scores, classes),
        folds=tuple(
            FoldScore(
                name=fold.task.name,
                mean=score.mean,
                lr=score.lr,
                tests=tuple(seed.test for seed in score.seeds),
                best_steps=tuple(seed.best_step for seed in score.seeds),
                counts=score.counts,
            )
            for fold, score in zip(folds, scores, strict=True)
        ),
    )


def _seed(parts: list[SeedScore]) -> SeedScore:
    """One seed over all folds."""
    return SeedScore(
        seed=parts[0].seed,
        best_step=round(fmean(part.best_step for part in parts)),
        dev=round(fmean(part.dev for part in parts), 6),
        test=fmean(part.test for part in parts),
        layer_weights=mean_weights(parts),
    )


def _most_chosen(scores: list[ProbeScore]) -> float:
    """The learning rate of most folds, the smaller of two."""
    times = Counter(score.lr for score in scores)
    return min(times, key=lambda lr: (-times[lr], lr))


def _confusion(scores: list[ProbeScore], classes: tuple[str, ...]) -> tuple[metrics.Confusion, ...]:
    """All folds together; a fold whose training split lacks a class counts its classes differently."""
    together = Counter[tuple[int, int]]()
    for score in scores:
        place = [classes.index(name) for name in score.classes]
        for cell in score.confusion:
            together[place[cell.truth], place[cell.answer]] += cell.times
    return tuple(metrics.Confusion(*pair, together[pair]) for pair in sorted(together))
