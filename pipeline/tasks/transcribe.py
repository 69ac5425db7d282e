"""Speech recognition: frames of a frozen model and texts in, a word error rate with its uncertainty out.

SUPERB's ASR (s3prl: Featurizer, `downstream/asr`, Adam, no schedule, clip 1, best dev checkpoint, greedy answers), with
the learning rate chosen on dev. Heads of this size are dear: all rates are tried with the first seed, the best is trained
with the others. The test split is looked at once, by the chosen heads.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pipeline.tasks import metrics, misses
from pipeline.tasks.asr import AsrParams
from pipeline.tasks.beam import Beam
from pipeline.tasks.characters import Texts, TextSplits, best_constant
from pipeline.tasks.frames import FrameFeatures
from pipeline.tasks.score import Miss, SeedScore, at_edge, mean_weights, refuse_diverged
from pipeline.tasks.sidebyside import SideBySide
from pipeline.tasks.speechruns import Heard, Run, greedy, listen, train
from pipeline.tasks.textscore import AsrScore, BeamScore
from pipeline.tasks.worderrors import TextErrors, counted, summed, word_error_rate


def transcribe(
    features: FrameFeatures,
    splits: TextSplits,
    params: AsrParams,
    device: torch.device,
    on_step: Callable[[float], None] | None = None,
) -> AsrScore:
    """Try every rate with the first seed, train the others at the best, score them on test.

    `on_step` hears of every update, however many runs take it side by side.
    """
    beam = None if params.beam is None else Beam(params.beam, splits.alphabet, splits.train.texts)
    features.hold([*splits.dev.ids, *splits.train.ids])
    first, *more = params.seeds
    with SideBySide(device) as cores:
        rates = train(features, splits, params, [(first, rate) for rate in params.lrs], device, cores, on_step)
        refuse_diverged("asr", (run.best_step for run in rates), params.lrs)
        chosen = min(rates, key=lambda run: run.rank)
        others = [(seed, chosen.rate) for seed in more]
        runs = [chosen, *(train(features, splits, params, others, device, cores, on_step) if others else [])]
        heard = listen(runs, features, splits.test, splits.alphabet, cores)
        with_lm = None if beam is None else rescored(beam, chosen, heard, features, splits, cores)

    answers = [greedy(of_seed, splits.alphabet) for of_seed in heard]
    found = error_rates(splits.test, answers)
    seeds = tuple(
        SeedScore.of(seed, run.best_step, run.dev, test, run.head.layer_weights)
        for seed, run, test in zip(params.seeds, runs, found.tests, strict=True)
    )
    return AsrScore(
        metric=splits.task.metric,
        higher_is_better=splits.task.higher_is_better,
        mean=found.mean,
        sd=found.sd,
        interval=found.interval,
        chance=1.0,
        majority=word_error_rate(splits.test.texts, [best_constant(splits.train.texts)] * len(splits.test)),
        lr=chosen.rate,
        lr_at_edge=at_edge(chosen.rate, params.lrs),
        dev_by_lr=tuple((run.rate, round(run.dev, 6)) for run in rates),
        seeds=seeds,
        layers=features.layers,
        layer_weights=mean_weights(seeds),
        classes=splits.alphabet.characters,
        counts={"train": len(splits.train), "dev": len(splits.dev), "test": len(splits.test)},
        misses=misses_of(splits.test, answers[0]),
        cer=found.cer,
        errors=found.errors,
        character_errors=found.character_errors,
        test_words=splits.test.num_words,
        test_characters=sum(map(len, splits.test.texts)),
        left_out=len(splits.unfit),
        beam=with_lm,
    )


class ErrorRates(NamedTuple):
    """The answers of all seeds to one split."""

    mean: float
    sd: float | None
    interval: metrics.Interval
    tests: tuple[float, ...]
    cer: float
    errors: TextErrors
    character_errors: TextErrors


def error_rates(said: Texts, answers: Sequence[Sequence[str]]) -> ErrorRates:
    """Errors of words and of characters, by seed and together, and the interval of the mean for so many utterances."""
    errors = [[counted(*pair) for pair in zip(said.texts, of_seed, strict=True)] for of_seed in answers]
    edits = torch.tensor([[sum(one.words) for one in of_seed] for of_seed in errors], dtype=torch.float64)  # (N, U)
    tests = (edits.sum(1) / said.num_words).tolist()
    mean, sd = metrics.mean_and_sd(tests)
    by_character = summed([one.characters for of_seed in errors for one in of_seed])
    return ErrorRates(
        mean=mean,
        sd=sd,
        interval=metrics.bootstrap_interval(edits.mean(0), torch.tensor([len(text.split()) for text in said.texts])),
        tests=tuple(tests),
        cer=sum(by_character) / (sum(map(len, said.texts)) * len(answers)),
        errors=summed([one.words for of_seed in errors for one in of_seed]),
        character_errors=by_character,
    )


def misses_of(said: Texts, answers: Sequence[str]) -> tuple[Miss, ...]:
    """The worst utterances, by errors over true words."""
    return misses.worst(
        Miss((name,), text, answer, round(rate, 6))
        for name, text, answer in zip(said.ids, said.texts, answers, strict=True)
        if (rate := word_error_rate([text], [answer])) > 0
    )


def rescored(
    beam: Beam,
    first: Run,
    heard: Sequence[Sequence[Heard]],
    features: FrameFeatures,
    splits: TextSplits,
    cores: SideBySide,
) -> BeamScore:
    """Choose the weights on dev, with the first seed's head, and answer test once more."""
    on_dev = [one.log_probs for one in listen([first], features, splits.dev, splits.alphabet, cores)[0]]
    tried = [
        (weights, round(word_error_rate(splits.dev.texts, beam.answers(on_dev, weights)), 6)) for weights in beam.grid
    ]
    chosen, dev = min(tried, key=lambda row: (row[1], row[0]))
    found = error_rates(splits.test, [beam.answers([one.log_probs for one in of_seed], chosen) for of_seed in heard])
    return BeamScore(
        mean=found.mean,
        sd=found.sd,
        interval=found.interval,
        tests=found.tests,
        cer=found.cer,
        errors=found.errors,
        lm_weight=chosen.lm,
        word_bonus=chosen.word,
        dev=dev,
        dev_by_weights=tuple((*weights, wer) for weights, wer in tried),
        lexicon=len(beam.words),
        unknown=sum(word not in beam.words for text in splits.test.texts for word in text.split()),
    )
