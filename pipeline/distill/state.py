"""The state of a distillation: everything the next step depends on in, a checked file out, and back (`pipeline.states`)."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from pipeline.states import Say, load_checked, save_checked
from pipeline.student.shape import EncoderShape


@dataclass(slots=True)
class Progress:
    """How far a training is: with the plan of `epoch` this says which batches come next."""

    step: int = 0
    """Updates made, in all phases."""
    phase: int = 0
    """Which phase they lead into; a phase that is done is left only when the next one has made a step."""
    epoch: int = 0
    position: int = 0
    """Batches of the epoch that are done."""
    batches: int = 0
    """Batches of all epochs that are done."""
    sums: dict[str, float] = field(default_factory=dict)
    """Training terms added up since the last row of the curves."""
    summed: int = 0
    """Steps in those sums."""
    dev: dict[str, float] | None = None
    """Latest validation."""
    best: dict[str, int | float] | None = None
    """The validation with the smallest loss, with its step."""
    curves_bytes: int = 0
    """Length of curves.csv: rows of steps that a resumed run makes again are cut off."""


class Saved(NamedTuple):
    """A state that was found."""

    progress: Progress
    shape: EncoderShape
    """Of the student: pruning changes it between phases."""
    tensors: dict[str, Any]

    def restore(self, modules: nn.Module, optimizer: Optimizer) -> None:
        """Bring a learner of the same phase and shape to this state."""
        modules.load_state_dict(self.tensors["modules"])
        optimizer.load_state_dict(self.tensors["optimizer"])


def save_state(
    directory: Path, progress: Progress, shape: EncoderShape, modules: nn.Module, optimizer: Optimizer
) -> None:
    """Write a state. Plans, crops, noise and dropout are functions of (seed, batch), so three integers say what comes next."""
    tensors = {"modules": modules.state_dict(), "optimizer": optimizer.state_dict()}
    record = {"progress": asdict(progress), "shape": shape.model_dump(mode="json")}
    save_checked(directory, progress.step, record, tensors)


def find_state(directory: Path, say: Say) -> Saved | None:
    """The newest intact state; None where there is none."""
    state = load_checked(directory, say)
    if state is None:
        return None
    shape = EncoderShape.model_validate(state.record["shape"])
    return Saved(Progress(**state.record["progress"]), shape, state.tensors)
