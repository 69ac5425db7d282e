"""What every seed's model scored in, the metrics of a fine-tuned model out; and one seed's result to the disk and back."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64
from safetensors.torch import load_file, save

from cache.publish import digest_file, publish_file, read_json, write_json
from pipeline.finetune.examples import AllExamples
from pipeline.finetune.learner import Learner
from pipeline.finetune.settings import FinetuneParams, Frozen
from pipeline.finetune.start import Start
from pipeline.states import Say
from pipeline.student.encoder import count_parameters
from pipeline.tasks.eer import Ranked, equal_error, speaker_interval
from pipeline.tasks.labels import LabelledSplits
from pipeline.tasks.metrics import mean_and_sd, wilson_interval
from pipeline.tasks.voices import VoiceSplits


class SeedResult(NamedTuple):
    """One seed that is done."""

    seed: int
    step: int
    """Of the weights that were judged."""
    dev: dict[str, float]
    test: dict[str, float]
    trial_scores: list[Float64[np.ndarray, " _"]]
    """Of every list of test trials, the one that counts first."""


def save_result(directory: Path, learner: Learner, result: SeedResult) -> None:
    """Keep a seed's weights and scores; its states are of no more use."""
    tensors = {f"learner.{name}": tensor.detach().cpu().contiguous() for name, tensor in learner.state_dict().items()}
    for number, scores in enumerate(result.trial_scores):
        tensors[f"trials.{number}"] = torch.from_numpy(scores)
    with publish_file(directory / "result.safetensors") as partial:
        partial.write_bytes(save(tensors))
    told = {"seed": result.seed, "step": result.step, "dev": result.dev, "test": result.test}
    write_json(directory / "result.json", told | {"sha256": digest_file(directory / "result.safetensors")})
    for path in [*directory.glob("state-*.json"), *directory.glob("state-*.pt")]:
        path.unlink()


def find_result(directory: Path, learner: Learner, say: Say) -> SeedResult | None:
    """A seed that was done before, its weights loaded into the learner; None where it is not done, or its file damaged."""
    record, tensors = directory / "result.json", directory / "result.safetensors"
    if not record.exists():
        return None
    told = read_json(record)
    if not tensors.exists() or digest_file(tensors) != told["sha256"]:
        say(f"{tensors} is damaged (its SHA-256 differs): seed {told['seed']} is trained again")
        return None
    loaded = load_file(tensors)
    scores = [loaded.pop(f"trials.{n}").numpy() for n in range(sum(name.startswith("trials.") for name in loaded))]
    learner.load_state_dict({name.removeprefix("learner."): tensor for name, tensor in loaded.items()})
    return SeedResult(told["seed"], told["step"], told["dev"], told["test"], scores)


def metrics_of(
    params: FinetuneParams,
    start: Start,
    examples: AllExamples,
    learner: Learner,
    results: list[SeedResult],
    seconds: dict[str, float],
) -> dict[str, Any]:
    """metrics.json: what a table of systems is made of.

    Args:
        params: the settings.
        start: what the model began as.
        examples: labels and trials.
        learner: one of the models, for its size.
        results: of all seeds.
        seconds: of training audio, of each task.
    """
    tasks = {}
    if examples.kws is not None:
        tasks["kws"] = _keywords(examples.kws, results)
    if examples.sv is not None:
        tasks["sv"] = _speakers(examples, examples.sv, results)
    model = learner.model
    left_behind = sum(count_parameters(part) for part in model.left_behind)
    return {
        "tasks": tasks,
        "parameters": {
            "encoder": count_parameters(model.encoder),
            "heads": count_parameters(model.heads) - left_behind,
            "left_behind": left_behind,
        },
        "frozen": isinstance(params.encoder, Frozen),
        "starts_from": start.facts,
        "steps": params.train.steps,
        "chosen_by": "the lowest dev error" if params.train.publish == "best" else "the last step",
        "train_seconds": seconds,
    }


def _keywords(keywords: LabelledSplits, results: list[SeedResult]) -> dict[str, Any]:
    told = _over_seeds(results, "kws_accuracy")
    return told | {
        "metric": "accuracy",
        "higher_is_better": True,
        "interval": list(wilson_interval(told["mean"], len(keywords.test))),
        "chance": keywords.chance,
        "counts": {split: len(getattr(keywords, split)) for split in ("train", "dev", "test")},
        "classes": len(keywords.names),
    }


def _speakers(examples: AllExamples, voices: VoiceSplits, results: list[SeedResult]) -> dict[str, Any]:
    headline, *others = examples.trials("test")
    rates = {
        asked.name: mean_and_sd([equal_error(Ranked(r.trial_scores[at], asked.same).rates()).rate for r in results])[0]
        for at, asked in enumerate(others, 1)
    }
    runs = [Ranked(result.trial_scores[0], headline.same) for result in results]
    costs = _over_seeds(results, "sv_min_dcf")
    return _over_seeds(results, "sv_eer") | {
        "metric": "EER",
        "higher_is_better": False,
        "interval": list(speaker_interval(runs, headline.speakers, headline.same)),
        "chance": 0.5,
        "min_dcf": costs["mean"],
        "min_dcf_sd": costs["sd"],
        "list": headline.name,
        "other_lists": rates,
        "counts": {"train": len(voices.train), "dev_trials": len(voices.dev), "test_trials": len(headline)},
        "classes": len(voices.names),
    }


def _over_seeds(results: list[SeedResult], name: str) -> dict[str, Any]:
    mean, sd = mean_and_sd([result.test[name] for result in results])
    dev, _ = mean_and_sd([result.dev[name] for result in results])
    rows = [{"seed": r.seed, "step": r.step, "dev": r.dev[name], "test": r.test[name]} for r in results]
    return {"mean": mean, "sd": sd, "dev": dev, "seeds": rows}
