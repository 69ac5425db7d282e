"""A step whose loss or gradient is no number in; the batch that did it on disk, and the error that tells of it, out."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from cache.errors import DataError, DecantError
from cache.publish import write_json
from pipeline.distill.batches import Batch, BatchReader
from pipeline.distill.learner import Learner, Update, seed_of
from pipeline.distill.plan import Item, Planned
from pipeline.distill.world import add_up, wait_for_all


def not_finite(
    learner: Learner, reader: BatchReader, planned: Sequence[Planned], update: Update, directory: Path, number: int
) -> DecantError:
    """Find the batch, keep it with what was predicted, and say what can be done.

    Every process gets here in the same step, for they share its sums: the first one whose own batches are to blame speaks.

    Args:
        learner: as it was before the update, which was not made.
        reader: of what is trained on.
        planned: this process's batches of the step.
        update: what the step would have done.
        directory: of the training; its states are from before.
        number: of the step.
    """
    batch, predicted, is_ours = _culprit(learner, reader, planned)
    if _speaker(is_ours, learner) != learner.world.rank:
        wait_for_all(learner.world)  # for the one that speaks to leave
    place = directory / f"not-finite-{number:09d}-{learner.world.rank}"
    place.mkdir(exist_ok=True)
    tensors = {"waves": batch.waves, "samples": batch.samples, "frames": batch.frames}
    tensors |= {f"targets.{k}": rows for k, rows in enumerate(batch.targets)}
    tensors |= {f"predicted.{g}": p.float().cpu().contiguous() for g, p in enumerate(predicted)}
    (place / "batch.safetensors").write_bytes(save(tensors))
    write_json(place / "batch.json", {"step": number, "ids": batch.ids, "rate": update.rate})
    where = f"batch and predictions are in {place}"
    if bad := _bad_targets(learner, batch):
        return DataError(f"step {number}: the targets of {', '.join(bad)} are not finite; extract them again; {where}")
    ids = ", ".join(batch.ids[:8]) + (" ..." if len(batch.ids) > 8 else "")
    return DecantError(
        f"step {number}: loss or gradient is not finite (batch of {ids}); "
        f"lower train.learning_rate, set train.clip, or use precision: float32; {where}"
    )


def dev_not_finite(learner: Learner, reader: BatchReader, plan: Iterable[list[Item]], step: int) -> DecantError:
    """The error of a validation whose loss is no number; the same one in every process.

    Args:
        learner: as it was validated.
        reader: of the dev split.
        plan: its batches.
        step: after which it was validated.
    """
    if bad := [name for items in plan for name in _bad_targets(learner, reader.read_clean(items))]:
        told = ", ".join(bad[:8]) + (" ..." if len(bad) > 8 else "")
        return DataError(f"step {step}: on the dev split the targets of {told} are not finite; extract them again")
    return DecantError(
        f"step {step}: the loss on the dev split is not finite; lower train.learning_rate, set train.clip, or use "
        "precision: float32"
    )


@torch.no_grad()
def _culprit(learner: Learner, reader: BatchReader, planned: Sequence[Planned]) -> tuple[Batch, Sequence[Tensor], bool]:
    """The first batch with a loss that is no number, or the last one; what is predicted of it; whether it is the former."""
    learner.train()
    for one in planned:  # read anew: the buffers of those before the last are used again
        batch = reader.read(one)
        torch.manual_seed(seed_of(learner.params.seed, one.number))
        per_target, predicted = learner(batch)
        is_bad = not bool(torch.isfinite(per_target["total"]).all())
        if is_bad:
            break
    return batch, predicted, is_bad


def _speaker(is_ours: bool, learner: Learner) -> int:
    """The first process with a bad batch; the first of all where only the gradient is no number."""
    flags = torch.zeros(learner.world.size, device=learner.device)
    flags[learner.world.rank] = float(is_ours)
    return int(add_up(flags, learner.world).argmax())


def _bad_targets(learner: Learner, batch: Batch) -> list[str]:
    """Utterances whose targets are no numbers."""
    targets = learner.make_targets([rows.to(learner.device) for rows in batch.targets])
    return [
        name
        for b, (name, count) in enumerate(zip(batch.ids, batch.frames.tolist(), strict=True))
        if not all(bool(torch.isfinite(group[b, :, :count]).all()) for group in targets)
    ]
