"""The state of a distillation: everything the next step depends on in, a checked file out, and back (`pipeline.states`)."""

from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn
from torch.optim import Optimizer

from pipeline.states import Say, load_checked, restore_random, save_checked


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
    """Write a state; plans and crops are functions of (seed, epoch), so torch's random state is all that dropout needs."""
    tensors = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
    save_checked(directory, progress.step, {"progress": asdict(progress)}, tensors)


def load_state(directory: Path, modules: nn.Module, optimizer: Optimizer, say: Say) -> Progress | None:
    """Bring model, optimiser and random state back to the newest intact state; None where there is none."""
    state = load_checked(directory, say)
    if state is None:
        return None
    modules.load_state_dict(state.tensors["modules"])
    optimizer.load_state_dict(state.tensors["optimizer"])
    restore_random(state)
    return Progress(**state.record["progress"])
