"""Fine-tuning: settings, a model, waveforms, labels and trials in; a folder with the model, its heads and its scores out.

Seeds are trained one after the other, each with a state of its own in a hidden sibling of the output. A killed run goes on
from there, on a CPU bit for bit; states of other settings, labels or audio, or of another model to start from, are thrown
away, and said to be. Started by torchrun, every process computes its share of every step, and the first one writes.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.torch import save

from cache.frames import RATE_HZ
from cache.manifest import Manifest
from cache.process import exclusive
from cache.publish import named_io_errors, publish_dir, write_json
from cache.ragged import Store
from pipeline.corpora.trials import Trial
from pipeline.distill.batches import BatchReader
from pipeline.distill.curves import Log
from pipeline.distill.world import ALONE, World, wait_for_all
from pipeline.distortion.distort import folders_of
from pipeline.finetune.examples import AllExamples, examples_of
from pipeline.finetune.judge import judge
from pipeline.finetune.learner import Learner
from pipeline.finetune.loop import Run, train
from pipeline.finetune.plan import Pool, check_sizes
from pipeline.finetune.results import SeedResult, find_result, metrics_of, save_result
from pipeline.finetune.settings import FinetuneParams
from pipeline.finetune.start import Start
from pipeline.interrupt import stop_requested
from pipeline.states import Say, discard_other
from pipeline.student.checkpoint import save_student


class Inputs(NamedTuple):
    """What is there before the first step."""

    facts: dict[str, Any]
    """All that decides what a seed computes, by name."""
    examples: AllExamples
    manifest: Manifest
    """Of the utterances that are read."""
    pools: dict[str, Pool]


def open_inputs(params: FinetuneParams, start: Start, manifest: Manifest, trials: Sequence[Trial] | None) -> Inputs:
    """Check that all of it fits together; writes nothing. Arguments and errors are those of `finetune`."""
    examples = examples_of(params.tasks, manifest, trials)
    read = Manifest(tuple(manifest.by_id[name] for name in examples.ids(manifest)))
    number_of = {u.id: number for number, u in enumerate(read)}
    pools = {}
    for task, labelled in examples.train.items():
        utterances = np.array([number_of[name] for name in labelled.ids], dtype=np.int64)
        classes = np.array(labelled.classes, dtype=np.int64)
        pools[task] = Pool(task, params.tasks.named[task], utterances, read.samples[utterances], classes)
        check_sizes(pools[task])
    facts = {
        "settings": params.model_dump(mode="json", exclude={"starts_from", "seeds"}),
        "start": start.digest,
        "labels": examples.digest(manifest),
        "noise": folders_of(params.augment),
    }
    return Inputs(facts, examples, read, pools)


def finetune(
    params: FinetuneParams,
    start: Start,
    manifest: Manifest,
    waves: Store,
    trials: Sequence[Trial] | None,
    out: Path,
    device: str,
    tick: Callable[..., None],
    say: Say,
    readers: int = 1,
    world: World = ALONE,
    logs_of: Callable[[int], Sequence[Log]] = lambda seed: (),
) -> dict[str, Any]:
    """Train every seed, judge each on test, and publish the first one's model; gives the metrics.

    Args:
        params: the settings.
        start: the model that is there.
        manifest: the utterances, with their tasks.
        waves: their waveforms.
        trials: of speaker verification; None where none were given.
        out: the folder to write.
        device: cpu, cuda, cuda:1.
        tick: told each step, with a note.
        say: told what a person should know.
        readers: processes that read ahead, 0: a thread does; changes speed, not what is computed.
        world: this process among those that share every step; all must see `out`.
        logs_of: a seed's loggers, told every row of its curves.

    Raises:
        SettingsError: an utterance does not fit into a batch, or trials are missing.
        DataError: a task lacks utterances, labels or trials, or the waveforms are of others.
        StoreError: a shard is damaged or missing.
        ResourceError: another process trains into the same folder, or one of this training has gone.
        Interrupted: a signal came; the state is saved.
        DecantError: a loss is not finite.
    """
    directory = out.with_name(f".{out.name}.training.partial")
    with ExitStack() as held:
        held.enter_context(named_io_errors(out))
        if world.leads:
            held.enter_context(exclusive(directory / "lock"))
        inputs = open_inputs(params, start, manifest, trials)
        if world.leads:  # after all checks: a wrong path must not cost a state
            discard_other(directory, inputs.facts, device if world.size == 1 else f"{world.size} x {device}", say)
        wait_for_all(world)
        results: list[SeedResult] = []
        with stop_requested() as stopping:
            for seed in params.seeds:
                place = directory / f"state-seed-{seed}"
                if world.leads:
                    place.mkdir(exist_ok=True)
                learner = _learner(params, start, inputs.examples, seed, device, world)
                found = find_result(place, learner, say)
                wait_for_all(world)
                if found is not None:
                    tick(params.train.steps, found=True)
                else:
                    distort = None if params.augment is None else params.augment.distort
                    reader = BatchReader(inputs.manifest, waves, [], [], distort, seed)
                    run = Run(
                        *(params, inputs.examples, inputs.pools, reader, place, seed, readers, world),
                        *(stopping, tick, say, logs_of(seed)),
                    )
                    found = _trained(learner, run)
                    if world.leads:
                        save_result(place, learner, found)
                results.append(found)
                if seed == params.seeds[0]:
                    first = learner
        heard = {task: _seconds(pool) for task, pool in inputs.pools.items()}
        metrics = metrics_of(params, start, inputs.examples, first, results, heard)
        if world.leads:
            _publish(out, directory, params, start, inputs, first, metrics)
        wait_for_all(world)
    return metrics


def _trained(learner: Learner, run: Run) -> SeedResult:
    progress = train(learner, run)
    judged = judge(learner, run.reader, run.examples, "test")
    step, dev = progress.step, progress.dev or {}
    if run.params.train.publish == "best" and progress.best is not None:
        step = int(progress.best["step"])
        dev = {name: value for name, value in progress.best.items() if name != "step"}
    return SeedResult(run.seed, step, dev, judged.scores, judged.trial_scores)


def _learner(
    params: FinetuneParams, start: Start, examples: AllExamples, seed: int, device: str, world: World
) -> Learner:
    class_of = {
        task: dict(zip(labelled.ids, labelled.classes, strict=True)) for task, labelled in examples.train.items()
    }
    return Learner(params, start.encoder(params), examples.classes, class_of, seed, device, world)


def _seconds(pool: Pool) -> float:
    return int(pool.samples.sum()) / RATE_HZ


def _publish(
    out: Path,
    directory: Path,
    params: FinetuneParams,
    start: Start,
    inputs: Inputs,
    learner: Learner,
    metrics: dict[str, Any],
) -> None:
    with publish_dir(out) as partial:
        facts = {
            "kind": "finetuned",
            "settings": params.model_dump(mode="json"),
            "starts_from": start.facts,
            "labels": inputs.facts["labels"],
            "classes": {task: list(names) for task, names in inputs.examples.classes.items()},
        }
        save_student(partial, learner.model.encoder, facts)
        heads = {name: tensor.detach().cpu().contiguous() for name, tensor in learner.model.heads.state_dict().items()}
        (partial / "heads.safetensors").write_bytes(save(heads))
        (partial / "curves.csv").write_text(_curves(directory, params.seeds))
        write_json(partial / "metrics.json", metrics)
    shutil.rmtree(directory)  # only now: until the model is published the states are what a rerun needs


def _curves(directory: Path, seeds: Sequence[int]) -> str:
    """The rows of all seeds, with the seed before each."""
    lines: list[str] = []
    for seed in seeds:
        head, *rows = (directory / f"state-seed-{seed}" / "curves.csv").read_text().splitlines()
        lines += [*([] if lines else [f"seed,{head}"]), *(f"{seed},{row}" for row in rows)]
    return "\n".join(lines) + "\n"
