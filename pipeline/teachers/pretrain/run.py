"""Pretraining: settings, recordings and perhaps a teacher to start from in, a Hugging Face folder out.

Rounds of units and of steps that predict them, or one round of the contrastive objective. A killed run goes on from its last
state, on a CPU bit for bit: the state holds weights, optimiser, both generators and the place in the epoch, and the units of
the round lie beside it. What differs from fairseq: batches are cropped to their shortest recording instead of padded, and
there are no LayerDrop and, in masked prediction, no penalty on the convolutions' output.
"""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int16
from torch import Tensor, nn

from cache.errors import DecantError, Interrupted, StoreError
from cache.process import exclusive
from cache.publish import digest_file, read_json, write_json
from pipeline.distortion.distort import folders_of
from pipeline.interrupt import stop_requested
from pipeline.ordered import ordered_map
from pipeline.padding import INT16_SCALE, normalise_waves
from pipeline.states import Say, State, discard, discard_other, load_checked, restore_random, save_checked
from pipeline.teachers.contrastive import Contrastive
from pipeline.teachers.objective import Prediction
from pipeline.teachers.pretrain.batches import Batch, BatchMaker, Recordings, draws
from pipeline.teachers.pretrain.masked_units import MaskedPrediction
from pipeline.teachers.pretrain.models import Start, check_start, first_model, layer_of, write_model
from pipeline.teachers.pretrain.optimiser import make_optimiser, rate_at
from pipeline.teachers.pretrain.settings import Iteration, MaskedUnits, PretrainParams
from pipeline.teachers.units import LayerUnits, UnitFile, fit_clusters, mfcc, write_units

LOG_STEPS = 25
AHEAD = 3  # batches made while one is trained on

OnProgress = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Job:
    """All that a pretraining reads."""

    params: PretrainParams
    recordings: Recordings
    start: Start | None
    normalise: bool
    """Whether each waveform is brought to zero mean and unit variance before the model."""
    device: str

    def facts(self) -> dict[str, Any]:
        """All that decides what it computes; a state of other facts is thrown away."""
        return {
            "settings": self.params.model_dump(mode="json"),
            "normalise": self.normalise,
            "audio": self.recordings.digest,
            "starts_from": None if self.start is None else self.start.pinned.digest,
            "folders": folders_of(self.params),
        }

    def hear(self, waves: Float[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        """Waveforms as the model takes them, on its device."""
        waves = waves.to(self.device)
        samples = torch.full((len(waves),), waves.shape[1], device=waves.device)
        return normalise_waves(waves, samples) if self.normalise else waves


@contextmanager
def training_folder(out: Path) -> Iterator[Path]:
    """The hidden sibling of a product in which its training is kept until the product is published.

    Raises:
        ResourceError: another process trains the same product.
    """
    run = out.with_name(f".{out.name}.training.partial")
    with exclusive(run / "lock"):
        yield run
        shutil.rmtree(run)  # only now: until then the state is what a rerun needs


def pretrain(
    job: Job,
    run: Path,
    out: Path,
    on_progress: OnProgress = lambda seconds, note="", found=False: None,
    say: Say = lambda line: None,
) -> None:
    """Train, and write the model to the folder `out`; the same seed, threads and machine give the same bytes.

    Args:
        job: what to train, and on what.
        run: the folder of states.
        out: an existing folder.
        on_progress: called with the seconds of audio trained on since the last call, a note, and whether they were found done.
        say: told what a person should know.

    Raises:
        SettingsError: settings that do not fit each other or the teacher that is started from.
        DataError: folders of noise without usable audio.
        Interrupted: a signal came; the state is saved.
        DecantError: the loss is not finite.
    """
    check_start(job.params, job.start)
    discard_other(run, job.facts(), job.device, say)  # after the checks: a wrong setting must not cost a state
    with torch.random.fork_rng(devices=[]), stop_requested() as stopping:
        torch.manual_seed(job.params.seed)
        model = _train(job, run, stopping, on_progress, say)
    write_model(out, model, job.start if job.params.takes == "model" else None, job.normalise)


def _train(job: Job, run: Path, stopping: Callable[[], bool], on_progress: OnProgress, say: Say) -> nn.Module:
    """All rounds, from where the state is; gives the trained trunk."""
    params = job.params
    state = load_checked(run, say)
    if state is not None and not _units_intact(job, run, state.record["round"]):
        say(f"the units of {run} are damaged and cannot be made again from a model in training: starting at step 0")
        discard(run)
        discard_other(run, job.facts(), job.device, say)  # writes down anew what it is of
        state = None
    first = 0 if state is None else int(state.record["round"])
    if state is not None:
        say(f"going on after step {state.record['step']} of {params.steps[first]} of round {first + 1}")
        done = params.batch_seconds * (sum(params.steps[:first]) + state.record["step"])
        on_progress(done, found=True)
    model = first_model(params, job.start).to(job.device)
    for number in range(first, len(params.steps)):
        units = None
        if isinstance(params.objective, MaskedUnits):
            iteration = params.objective.iterations[number]
            on_progress(0.0, f"round {number + 1}: {iteration.clusters} units of {describe_units(iteration)}")

            def named(recordings: int, of: int, number: int = number) -> None:
                on_progress(0.0, f"round {number + 1}: units of {recordings} of {of} recordings")
                if stopping():
                    raise Interrupted(
                        f"stopped before the units of round {number + 1} were made; the same command makes them anew"
                    )

            units = units_of_round(job, run, number, iteration, model, named)
            if iteration.restart and number:
                model = first_model(params, job.start).to(job.device)
        objective = make_objective(params, model, number).to(job.device)
        maker = BatchMaker(params, job.recordings, units, number)
        for seconds, note in _train_round(job, run, number, objective, maker, state, stopping):
            on_progress(seconds, f"round {number + 1}: {note}")
        state = None
    return model


def _train_round(
    job: Job,
    run: Path,
    number: int,
    objective: nn.Module,
    maker: BatchMaker,
    state: State | None,
    stopping: Callable[[], bool],
) -> Iterator[tuple[float, str]]:
    """Train in place; yields seconds of audio and a note every few steps."""
    params, steps = job.params, job.params.steps[number]
    optimiser = make_optimiser(objective, params.weight_decay)
    done, place = 0, None
    if state is not None:
        objective.load_state_dict(state.tensors["modules"])
        optimiser.load_state_dict(state.tensors["optimizer"])
        restore_random(state)  # after everything that draws
        done, place = int(state.record["step"]), state.record["place"]
    objective.train()
    drawn = islice(draws(params, job.recordings.frames, number, done, place), steps - done)
    seconds, losses, hits, since = 0.0, 0.0, 0.0, 0
    with ThreadPoolExecutor(1) as executor:
        # ahead of a GPU only: on a CPU a second thread would take its cores, with OpenMP threads of its own
        ahead = torch.device(job.device).type != "cpu"
        for batch in ordered_map(executor, maker, drawn, AHEAD) if ahead else map(maker, drawn):
            step = batch.draw.step
            for group in optimiser.param_groups:
                group["lr"] = rate_at(step, steps, params.lr, params.warmup)
            loss, accuracy = _update(job, objective, optimiser, batch, step, steps)
            seconds += batch.waves.numel() / 16_000
            losses, hits, since = losses + loss, hits + accuracy, since + 1
            stop = stopping() and step < steps
            if stop or step == steps or step % params.checkpoint_every == 0:
                record = {"round": number, "step": step, "place": batch.draw.place}
                tensors = {"modules": objective.state_dict(), "optimizer": optimiser.state_dict()}
                save_checked(run, sum(params.steps[:number]) + step, record, tensors)
            if step % LOG_STEPS == 0 or step == steps:
                yield seconds, f"step {step}, loss {losses / since:.3f}, accuracy {100 * hits / since:.1f} %"
                seconds, losses, hits, since = 0.0, 0.0, 0.0, 0
            if stop:
                raise Interrupted(
                    f"stopped after step {step} of {steps} of round {number + 1} with its state saved; the same command goes on"
                )


def _update(
    job: Job, objective: nn.Module, optimiser: torch.optim.Optimizer, batch: Batch, step: int, steps: int
) -> tuple[float, float]:
    """One step; gives loss and accuracy.

    Raises:
        DecantError: the loss or its gradient is not finite; the weights are as before.
    """
    half = job.params.precision == "bfloat16"
    with torch.autocast(torch.device(job.device).type, dtype=torch.bfloat16, enabled=half):
        prediction = predict(objective, job, batch, (step - 1) / steps)
    optimiser.zero_grad()
    prediction.loss.backward()
    norm = nn.utils.clip_grad_norm_(objective.parameters(), job.params.clip)
    loss, accuracy, size = torch.stack([*prediction, norm]).detach().tolist()  # one wait for the device
    if not np.isfinite([loss, size]).all():
        names = [job.recordings.ids[u] for u in batch.draw.utterances[:8]]
        raise DecantError(
            f"step {step}: loss {loss} and gradient {size} are not finite (batch of {', '.join(names)}); lower lr or clip"
            + (", or use precision: float32" if half else "")
        )
    optimiser.step()
    return loss, accuracy


def predict(objective: nn.Module, job: Job, batch: Batch, progress: float) -> Prediction:
    """The objective's answer to one batch."""
    waves, hidden = job.hear(batch.waves), batch.hidden.to(job.device)
    asked = progress if batch.units is None else batch.units.to(job.device)
    answer: Prediction = objective(waves, hidden, asked)
    return answer


def make_objective(params: PretrainParams, model: nn.Module, number: int) -> nn.Module:
    """The model with what its objective adds to it, which is left behind after training."""
    if isinstance(params.objective, MaskedUnits):
        return MaskedPrediction(model, params.objective, params.objective.iterations[number].clusters)
    return Contrastive(model, params.objective)


def units_of_round(
    job: Job, run: Path, number: int, iteration: Iteration, model: nn.Module, on_named: Callable[[int, int], None]
) -> UnitFile:
    """The unit of every frame that this round predicts, from the clean audio; made once, then read from their file."""
    objective = job.params.objective
    assert isinstance(objective, MaskedUnits)
    path = run / f"units-{number}.u16"
    if not _units_intact(job, run, number):

        def layer(wave: Int16[np.ndarray, " _"]) -> Any:
            assert isinstance(iteration.units, LayerUnits)
            heard = job.hear(torch.from_numpy(wave).float()[None] * INT16_SCALE)
            return layer_of(model, heard[0], iteration.units.layer)

        model.eval()
        featurise = layer if isinstance(iteration.units, LayerUnits) else mfcc
        fitted = (iteration.units.centre, iteration.clusters, objective.fit_frames, job.params.seed)
        name = fit_clusters(job.recordings, featurise, *fitted)
        write_json(path.with_suffix(".json"), {"sha256": write_units(path, job.recordings, name, on_named)})
    return UnitFile(path, job.recordings.frames)


def _units_intact(job: Job, run: Path, number: int) -> bool:
    """Whether the units of a round are there as they were written; true of an objective that has none."""
    if not isinstance(job.params.objective, MaskedUnits):
        return True
    path = run / f"units-{number}.u16"
    try:
        return path.exists() and digest_file(path) == read_json(path.with_suffix(".json"))["sha256"]
    except StoreError:
        return False


def describe_units(iteration: Iteration) -> str:
    """What is clustered, in words."""
    return f"layer {iteration.units.layer}" if isinstance(iteration.units, LayerUnits) else "MFCCs"
