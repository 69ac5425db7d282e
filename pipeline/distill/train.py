"""Distillation: settings, targets, waveforms and perhaps an init in; a folder with the student, its heads and curves out.

While it trains, its state lies in a hidden sibling of the output, where neither DVC nor a reader looks. A killed run goes
on from there, on a CPU bit for bit; a state of other settings, targets or audio is thrown away, and said to be.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from cache.errors import DataError, DecantError, Interrupted, StoreError
from cache.frames import RATE_HZ
from cache.manifest import Manifest
from cache.process import exclusive
from cache.publish import digest_file, digest_json, named_io_errors, publish_dir, write_json
from cache.ragged import Store
from pipeline.distill.batches import Batch, BatchReader
from pipeline.distill.curves import Curves
from pipeline.distill.ensemble import TargetMaker
from pipeline.distill.heads import heads_state
from pipeline.distill.learner import Learner, StudentParams, Update
from pipeline.distill.plan import Item, WithinShards, plan_epoch
from pipeline.distill.state import Progress, load_state, save_state
from pipeline.interrupt import stop_requested
from pipeline.layers.targets import Adopted, Targets, check_targets, open_targets, targets_json
from pipeline.ordered import ordered_map
from pipeline.states import Say, discard_other
from pipeline.student.checkpoint import save_student
from pipeline.student.encoder import count_parameters

AHEAD = 3  # dev batches read while one is computed

Tick = Callable[..., None]


def distil(
    params: StudentParams,
    targets: Targets,
    manifest: Manifest,
    waves: Store,
    init: Path | None,
    out: Path,
    device: str,
    tick: Tick,
    say: Say,
    readers: int = 1,
    verify: float = 1.0,
) -> dict[str, Any]:
    """Train a student and publish it; gives its metrics.

    Args:
        params: the student's settings.
        targets: the arrays it predicts.
        manifest: the utterances; those of split train are learned from, those of split dev validate.
        waves: their waveforms.
        init: weights to adopt, where the settings say so.
        out: the student's folder.
        device: cpu, cuda, cuda:1.
        tick: told each step, with a note.
        say: told what a person should know.
        readers: processes that read ahead; changes speed, not what is computed.
        verify: share of reads of the targets whose checksums are compared (`cache.ragged.Store`).

    Raises:
        SettingsError: the init does not fit, teachers cannot be combined so, or an utterance does not fit into a batch.
        DataError: the manifest lacks a split, or its utterances are not those of the stores.
        StoreError: a store of the targets is missing, unfinished or not the one that was meant; or the targets were
            chosen for another ensemble.
        ResourceError: another process trains into the same folder.
        Interrupted: a signal came; the state is saved.
        DecantError: the loss is not finite.
    """
    init = init if isinstance(params.init, Adopted) else None
    run = out.with_name(f".{out.name}.training.partial")
    with named_io_errors(out), exclusive(run / "lock"):
        facts = {
            "settings": params.model_dump(mode="json"),
            "targets": targets_json(targets, numbers=False),
            "init": None if init is None or not init.exists() else digest_file(init),
            "audio": digest_json([[u.id, u.audio, u.split] for u in manifest]),
        }
        check_targets(params.ensemble, targets)
        features = open_targets(targets, verify)
        manifest = _those_kept(manifest, features, targets, say)
        splits = _splits(params, manifest)
        arrays = [list(store.arrays) for store in targets.stores]
        learner = Learner(params, targets, init, device, TargetMaker(params.ensemble, targets, features, device))
        splits_read = {n: BatchReader(split, waves, features, arrays) for n, split in splits.items() if len(split)}
        discard_other(run, facts, device, say)  # after all checks: a wrong path must not cost a state
        with stop_requested() as stopping:
            progress = _train(learner, splits_read, run, readers, stopping, tick, say)
        metrics = {
            "dev": progress.dev,
            "steps": progress.step,
            "epochs": progress.epoch,
            "parameters": {"student": count_parameters(learner.encoder), "heads": count_parameters(learner.heads)},
            "train_utterances": len(splits["train"]),
            "train_seconds": int(splits["train"].samples.sum()) / RATE_HZ,
        }
        with publish_dir(out) as partial:
            save_student(partial, learner.encoder, facts)
            (partial / "heads.safetensors").write_bytes(save(heads_state(learner.heads)))
            shutil.copyfile(run / "curves.csv", partial / "curves.csv")
            write_json(partial / "metrics.json", metrics)
        shutil.rmtree(run)  # only now: until the student is published the state is what a rerun needs
    return metrics


def _those_kept(manifest: Manifest, features: Sequence[Store], targets: Targets, say: Say) -> Manifest:
    """The utterances that have targets: all, but for those that extraction was told to skip for their length."""
    settings = [store.fingerprint.get("long", {}) for store in features]
    shortest = min((long["max_sec"] for long in settings if long.get("kind") == "skip"), default=None)
    kept = manifest if shortest is None else manifest.up_to(shortest)
    if {kept.audio_digest} != {targets.audio, *(store.fingerprint["audio"] for store in features)}:
        raise StoreError(
            "the targets were extracted from other audio, or from a selection of it, than this manifest lists; "
            "extract with keep.select: all, then run `decant targets` again"
        )
    if len(kept) < len(manifest):
        say(f"{len(manifest) - len(kept)} utterances of more than {shortest:g} s have no targets")
    return kept


def _splits(params: StudentParams, manifest: Manifest) -> dict[str, Manifest]:
    splits = {name: manifest.select(split=name) for name in ("train", "dev")}
    for name in ("train", "dev") if params.train.validate_every is not None else ("train",):
        if not len(splits[name]):
            hint = "; set train.validate_every: null to train without" if name == "dev" else ""
            raise DataError(f"the manifest has no utterance of split {name!r}{hint}")
    return splits


def _train(
    learner: Learner,
    splits: dict[str, BatchReader],
    run: Path,
    readers: int,
    stopping: Callable[[], bool],
    tick: Tick,
    say: Say,
) -> Progress:
    """Bring the learner from where its state is to the last step."""
    train, reader = learner.params.train, splits["train"]
    progress = load_state(run, learner, learner.optimizer, say)
    curves = Curves(run / "curves.csv", train.loss_weights.terms, 0 if progress is None else progress.curves_bytes)
    with curves:
        if progress is None:
            progress = Progress(dev=_validate(learner, splits))
            curves.add(step=0, **_dev_columns(progress))
        elif progress.step < train.steps:
            say(f"going on after step {progress.step} of {train.steps}")
        tick(progress.step, found=True)
        if progress.step == train.steps:
            return progress
        sizes: dict[int, int] = {}  # batches of the epochs that are planned
        plan = islice(_plans(learner.params, reader, progress, sizes), train.steps - progress.step)
        with reader.ahead(plan, train.batch_seconds, readers, learner.device) as batches:
            for batch in batches:
                update = learner.update(batch, progress.step + 1)
                progress.step += 1
                progress.position += 1
                if not update.is_finite:
                    raise _not_finite(learner, batch, update, run, progress.step)
                _add_up(progress, update)
                last = progress.step == train.steps
                validating = train.validate_every is not None and (last or progress.step % train.validate_every == 0)
                if validating:
                    progress.dev = _validate(learner, splits)
                if last or validating or progress.step % train.log_every == 0:
                    means = {name: value / progress.summed for name, value in progress.sums.items()}
                    dev = _dev_columns(progress) if validating else {}
                    curves.add(step=progress.step, rate=update.rate, **means, **dev)
                    progress.sums, progress.summed = {}, 0
                if progress.position == sizes[progress.epoch]:
                    progress.epoch, progress.position = progress.epoch + 1, 0
                stop = stopping() and not last
                if last or stop or progress.step % train.checkpoint_every == 0:
                    progress.curves_bytes = curves.flush()
                    save_state(run, progress, learner, learner.optimizer)
                tick(1, note=f"l1 {update.terms['l1']:.3f} cosine {update.terms['cosine']:.3f}")
                if stop:
                    raise Interrupted(
                        f"stopped after step {progress.step} of {train.steps} with its state saved; the same command goes on"
                    )
    return progress


def _plans(
    params: StudentParams, reader: BatchReader, progress: Progress, sizes: dict[int, int]
) -> Iterator[list[Item]]:
    """Batches from where the training is on, epoch after epoch; says in `sizes` how many each epoch has."""
    train, shuffle = params.train, params.train.shuffle
    epoch, position = progress.epoch, progress.position
    while True:
        local = (reader.shards, shuffle.together) if isinstance(shuffle, WithinShards) else ()
        plan = plan_epoch(reader.samples, train.crop, train.batch_seconds, params.seed, epoch, *local)
        sizes[epoch] = len(plan)
        yield from plan[position:]
        epoch, position = epoch + 1, 0


def _validate(learner: Learner, splits: dict[str, BatchReader]) -> dict[str, float] | None:
    """Loss terms on the dev split, always with the plan of epoch 0; read by a thread, which waits for torch alone."""
    train = learner.params.train
    if train.validate_every is None:
        return None
    reader = splits["dev"]
    plan = plan_epoch(reader.samples, train.crop, train.batch_seconds, learner.params.seed, 0)
    with ThreadPoolExecutor(1) as executor:
        return learner.evaluate(ordered_map(executor, reader.read, plan, AHEAD))


def _dev_columns(progress: Progress) -> dict[str, float]:
    return {f"dev_{name}": value for name, value in (progress.dev or {}).items()}


def _add_up(progress: Progress, update: Update) -> None:
    for name, value in {**update.terms, "grad_norm": update.grad_norm}.items():
        progress.sums[name] = progress.sums.get(name, 0.0) + value
    progress.summed += 1


def _not_finite(learner: Learner, batch: Batch, update: Update, run: Path, step: int) -> DecantError:
    """Keep what led to a loss that is no number, and the error that tells of it. The last good state stays."""
    learner.eval()
    with torch.no_grad():
        _, predicted = learner(batch)
    place = run / f"not-finite-{step:09d}"
    place.mkdir(exist_ok=True)
    tensors = {"waves": batch.waves, "samples": batch.samples, "frames": batch.frames}
    tensors |= {f"targets.{k}": rows for k, rows in enumerate(batch.targets)}
    tensors |= {f"predicted.{g}": p.float().cpu().contiguous() for g, p in enumerate(predicted)}
    (place / "batch.safetensors").write_bytes(save(tensors))
    write_json(place / "batch.json", {"step": step, "ids": batch.ids, "rate": update.rate})
    targets = learner.make_targets([rows.to(learner.device) for rows in batch.targets])
    bad = [
        name
        for b, (name, count) in enumerate(zip(batch.ids, batch.frames.tolist(), strict=True))
        if not all(bool(torch.isfinite(group[b, :, :count]).all()) for group in targets)
    ]
    where = f"batch and predictions are in {place}"
    if bad:
        return DataError(f"step {step}: the targets of {', '.join(bad)} are not finite; extract them again; {where}")
    ids = ", ".join(batch.ids[:8]) + (" ..." if len(batch.ids) > 8 else "")
    return DecantError(
        f"step {step}: loss or gradient is not finite (batch of {ids}); "
        f"lower train.learning_rate, set train.clip, or use precision: float32; {where}"
    )
