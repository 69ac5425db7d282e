"""Speaker verification: frames of a frozen model, training speakers and trials in, an EER with its uncertainty out.

SUPERB's ASV (s3prl, `downstream/sv_voxceleb1`: Featurizer, x-vector, AM-softmax over the training speakers, AdamW, crops,
cosine scores), with the learning rate swept and chosen on dev. SUPERB has no dev trials and reports the best *test* EER
of all checkpoints; here dev trials choose checkpoint and rate, and the test trials are scored once, by the chosen heads.

The head is dear, so rates are tried with the first seed, and the other seeds are trained at the best. Runs see the same
batches, read once for all; a seed is where its head starts.
"""

from collections.abc import Callable, Sequence
from statistics import fmean

import numpy as np
import torch
from jaxtyping import Float
from pydantic import BaseModel, Field

from cache.frames import HOP, RATE_HZ
from pipeline.seeds import Seeds
from pipeline.tasks import metrics
from pipeline.tasks.eer import DetectionCost, Ranked, equal_error, min_dcf, speaker_interval
from pipeline.tasks.frames import FrameFeatures
from pipeline.tasks.margin import AmSoftmax
from pipeline.tasks.misses import worst
from pipeline.tasks.score import Miss, SeedScore, at_edge, mean_weights, refuse_diverged
from pipeline.tasks.sidebyside import SideBySide
from pipeline.tasks.voicerun import VoiceRun, cosines, embed, train, training_batches
from pipeline.tasks.voices import Asked, VoiceSplits
from pipeline.tasks.voicescore import CostScore, ListScore, SvScore
from pipeline.tasks.xvector import VoiceHead


class SvParams(BaseModel, frozen=True, extra="forbid"):
    """How the head of speaker verification is trained; the same for every model."""

    head_width: int = Field(ge=1)
    """Channels between the weighted sum and the x-vector network; SUPERB: 512."""
    channels: int = Field(ge=1)
    """Channels of its first four layers; SUPERB: 512."""
    pooled_width: int = Field(ge=1)
    """Channels of the fifth, of which mean and standard deviation are taken; SUPERB: 1500."""
    embedding: int = Field(ge=1)
    """Width of an embedding; SUPERB: 512."""
    scale: float = Field(gt=0)
    """What cosines are multiplied by before the softmax over speakers; SUPERB: 30."""
    margin: float = Field(ge=0, lt=2)
    """Cosine by which the true speaker has to win; SUPERB: 0.4."""
    normalise_layers: bool
    """LayerNorm without affine over every frame of every layer before the sum; SUPERB: false."""
    crop_sec: float | None = Field(gt=0)
    """Longer training utterances are cut to this, each time anew; null takes all of them. SUPERB: 8."""
    speakers_balanced: bool
    """Draw every training speaker equally often; SUPERB: false."""
    lrs: tuple[float, ...] = Field(min_length=1)
    """Learning rates to try with the first seed; the best on dev is used for all. SUPERB's default: 0.0001."""
    seeds: Seeds
    """Each seed starts the head; order and crops of the examples are drawn from the first. The score is their mean."""
    steps: int = Field(ge=1)
    """Updates of every run; SUPERB: 200 000."""
    batch: int = Field(ge=1)
    """Utterances in an update; SUPERB: 50, in five parts."""
    weight_decay: float = Field(ge=0)
    """Of AdamW; SUPERB: 0.01, which is torch's default."""
    clip_norm: float | None = Field(gt=0)
    """Gradient norm above which an update is scaled down; SUPERB: 1000."""
    validate_every: int = Field(ge=1)
    """Updates between two looks at the dev trials."""
    patience: int | None = Field(ge=1)
    """Validations without a better one after which a run is over; null trains for all steps."""
    list: str | None
    """The list of test trials whose EER is the score, such as voxceleb1/vox1-o; null where there is only one."""
    costs: tuple[DetectionCost, ...]
    """Detection costs to report beside the EER; SUPERB: none."""

    @property
    def crop_frames(self) -> int | None:
        """Frames of a crop."""
        return None if self.crop_sec is None else max(1, round(self.crop_sec * RATE_HZ / HOP))

    @property
    def total_steps(self) -> int:
        """Updates of the sweep, and of the other seeds after it."""
        return self.steps * (1 + (len(self.lrs) > 1 and len(self.seeds) > 1))


def verify(
    features: FrameFeatures,
    splits: VoiceSplits,
    params: SvParams,
    device: torch.device,
    on_step: Callable[[float], None] | None = None,
) -> SvScore:
    """Try every learning rate, choose on dev, train the other seeds at the best, score the test trials.

    `on_step` hears of every update.
    """
    runs, tried, embeddings = _trained(features, splits, params, device, on_step)
    lr = runs[0].lr
    place = {name: number for number, name in enumerate(splits.test_ids)}
    scores = [[cosines(of_run[[place[name] for name in t.ids]], t) for of_run in embeddings] for t in splits.tests]
    lists = tuple(list_score(asked, of_list, params.costs) for asked, of_list in zip(splits.tests, scores, strict=True))
    headline, asked = lists[splits.headline], splits.tests[splits.headline]
    seeds = tuple(
        SeedScore.of(seed, run.best_step, run.best.eer, eer, run.head.layer_weights)
        for seed, run, eer in zip(params.seeds, runs, headline.tests, strict=True)
    )
    return SvScore(
        metric=splits.task.metric,
        higher_is_better=splits.task.higher_is_better,
        mean=headline.mean,
        sd=headline.sd,
        interval=headline.interval,
        chance=0.5,
        majority=0.5,
        lr=lr,
        lr_at_edge=at_edge(lr, params.lrs),
        dev_by_lr=tuple((lr, round(dev, 6)) for lr, dev in tried),
        seeds=seeds,
        layers=features.layers,
        layer_weights=mean_weights(seeds),
        classes=splits.names,
        counts={"train": len(splits.train), "dev": len(splits.dev.ids), "test": len(asked.ids)},
        misses=worst_trials(asked, scores[splits.headline][0]),
        headline=headline.name,
        min_dcf=headline.min_dcf,
        trials={"dev": len(splits.dev), "test": len(asked)},
        speakers={"train": len(splits.names), "dev": voices(splits.dev), "test": voices(asked)},
        lists=lists,
    )


def _trained(
    features: FrameFeatures,
    splits: VoiceSplits,
    params: SvParams,
    device: torch.device,
    on_step: Callable[[float], None] | None,
) -> tuple[list[VoiceRun], list[tuple[float, float]], list[Float[np.ndarray, "U E"]]]:
    """A run of every seed at the best rate, the dev EER of every rate, and what each run makes of the test utterances."""

    def trained(side: SideBySide, pairs: Sequence[tuple[int, float]]) -> list[VoiceRun]:
        runs = [run_of(features, splits, params, seed, lr, device) for seed, lr in pairs]
        generator = torch.Generator().manual_seed(params.seeds[0])
        batches = training_batches(
            features, splits.train, params.batch, params.crop_frames, params.speakers_balanced, generator
        )
        often = params.validate_every, params.patience
        train(runs, batches, features, splits.dev, params.steps, *often, side, on_step)
        return runs

    first, *others = params.seeds
    features.hold([*splits.dev.ids, *splits.train.ids])
    with SideBySide(device) as side:
        if len(params.lrs) == 1:  # nothing to choose
            runs = trained(side, [(seed, params.lrs[0]) for seed in params.seeds])
            tried = [(params.lrs[0], fmean(run.best.eer for run in runs))]
            refuse_diverged("sv", (run.best_step for run in runs), params.lrs)
        else:
            sweep = trained(side, [(first, lr) for lr in params.lrs])
            tried = [(run.lr, run.best.eer) for run in sweep]
            refuse_diverged("sv", (run.best_step for run in sweep), params.lrs)
            chosen = min(sweep, key=lambda run: (run.best, run.lr))
            runs = [chosen, *trained(side, [(seed, chosen.lr) for seed in others])] if others else [chosen]
        return runs, tried, embed(runs, features, splits.test_ids, side)


def run_of(
    features: FrameFeatures, splits: VoiceSplits, params: SvParams, seed: int, lr: float, device: torch.device
) -> VoiceRun:
    """A head as its seed starts it."""
    generator = torch.Generator().manual_seed(seed)
    widths = params.head_width, params.channels, params.pooled_width, params.embedding
    head = VoiceHead(len(features.layers), features.width, *widths, generator)
    loss = AmSoftmax(params.embedding, len(splits.names), params.scale, params.margin, generator)
    return VoiceRun(head, loss, lr, params.weight_decay, params.clip_norm, device)


def list_score(asked: Asked, scores: Sequence[Float[np.ndarray, " N"]], costs: Sequence[DetectionCost]) -> ListScore:
    """Error rates of one list, given the scores of every seed."""
    runs = [Ranked(of_seed, asked.same) for of_seed in scores]
    rates = [run.rates() for run in runs]
    tests = tuple(equal_error(of_seed).rate for of_seed in rates)
    found = tuple(
        CostScore(cost.p_target, cost.miss, cost.false_alarm, *metrics.mean_and_sd([min_dcf(r, cost) for r in rates]))
        for cost in costs
    )
    interval = speaker_interval(runs, asked.speakers, asked.same)
    mean, sd = metrics.mean_and_sd(tests)
    return ListScore(
        name=asked.name,
        trials=len(asked),
        same=int(asked.same.sum()),
        speakers=voices(asked),
        mean=mean,
        sd=sd,
        interval=interval,
        min_dcf=found,
        tests=tests,
    )


def worst_trials(asked: Asked, scores: Float[np.ndarray, " N"]) -> tuple[Miss, ...]:
    """Trials on the wrong side of the threshold at which both errors are equally frequent, the farthest first."""
    threshold = equal_error(Ranked(scores, asked.same).rates()).threshold
    beyond = np.where(asked.same, threshold - scores, scores - threshold)
    words = "two speakers", "one speaker"
    return worst(
        Miss(
            tuple(asked.ids[number] for number in asked.pairs[trial].tolist()),
            words[int(asked.same[trial])],
            words[int(not asked.same[trial])],
            round(float(beyond[trial]), 6),
        )
        for trial in np.flatnonzero(beyond > 0).tolist()
    )


def voices(asked: Asked) -> int:
    """How many people are asked about."""
    return len(np.unique(asked.speakers))
