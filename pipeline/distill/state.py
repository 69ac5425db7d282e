"""The state of a training: everything the next step depends on in, a checked file out, and back.

A state is two files: the tensors, then a small JSON that names them with their SHA-256. Without the JSON a state does not
exist, so kill -9 while one is written leaves the one before; a state whose bytes have changed is passed over for the one
before. Two are kept.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from cache.errors import StoreError
from cache.publish import digest_file, publish_file, read_json, write_json

KEPT = 2

Say = Callable[[str], None]


@dataclass(slots=True)
class Progress:
    """How far a training is: with the plan of `epoch` this says which batch comes next."""

    step: int = 0
    """Updates made."""
    epoch: int = 0
    position: int = 0
    """Batches of the epoch that are done."""
    sums: dict[str, float] = field(default_factory=dict)
    """Training terms added up since the last row of the curves."""
    summed: int = 0
    """Steps in those sums."""
    dev: dict[str, float] | None = None
    """Latest validation."""
    curves_bytes: int = 0
    """Length of curves.csv: rows of steps that a resumed run makes again are cut off."""


def save_state(directory: Path, progress: Progress, modules: nn.Module, optimizer: Optimizer) -> None:
    """Write a state and drop those before the last `KEPT`."""
    name = f"state-{progress.step:09d}"
    tensors = {
        "modules": modules.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),  # dropout; plans and crops are functions of (seed, epoch) and need no state
        "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }
    with publish_file(directory / f"{name}.pt") as partial, open(partial, "wb") as file:
        torch.save(tensors, file)  # given a path it would hide what the disk refuses
    digest = digest_file(directory / f"{name}.pt")
    write_json(directory / f"{name}.json", {"progress": asdict(progress), "sha256": digest})
    for record in _records(directory)[KEPT:]:
        record.unlink()  # the record first: tensors without one are no state
        record.with_suffix(".pt").unlink(missing_ok=True)


def load_state(directory: Path, modules: nn.Module, optimizer: Optimizer, say: Say) -> Progress | None:
    """Bring model, optimiser and random state back to the newest intact state; None where there is none."""
    for record in _records(directory):
        tensors = record.with_suffix(".pt")
        try:
            described = read_json(record)
            intact = tensors.exists() and digest_file(tensors) == described["sha256"]
        except StoreError:
            intact = False
        if not intact:
            say(f"{tensors} is damaged (its SHA-256 differs) and is not used; going back to the state before it")
            continue
        state = torch.load(tensors, map_location="cpu", weights_only=True)
        modules.load_state_dict(state["modules"])
        optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if torch.cuda.is_available() and len(state["random_cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        return Progress(**described["progress"])
    return None


def _records(directory: Path) -> list[Path]:
    """Records of states, newest first."""
    return sorted(directory.glob("state-*.json"), reverse=True)
