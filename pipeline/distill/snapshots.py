"""Students of some validations: a learner in, a folder for each out; the latest few of them and the best are kept.

They are whole students with a hash of their weights (`pipeline.student.checkpoint`) and the heads they were trained with,
so any of them can be extracted and judged like the published one.
"""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save

from cache.publish import publish_dir
from pipeline.distill.learner import Learner
from pipeline.distill.settings import TrainParams
from pipeline.distill.state import Progress
from pipeline.states import Say
from pipeline.student.checkpoint import save_student


class Snapshots:
    """Those of one training."""

    def __init__(self, directory: Path, facts: dict[str, Any], train: TrainParams) -> None:
        self.directory, self.facts = directory, facts
        self.latest = train.keep
        self.wants_best = bool(train.keep) or train.publish == "best"

    def take(self, learner: Learner, progress: Progress) -> None:
        """Keep a student that was just validated."""
        if not self.wants_best:
            return
        with publish_dir(self._place(progress.step)) as partial:
            write_student(partial, learner, {**self.facts, "step": progress.step, "dev": progress.dev})
        for later in self._after(progress.step):
            shutil.rmtree(later)  # of a run that was killed after it: it will be made again

    def drop(self, progress: Progress) -> None:
        """Drop those that are neither among the latest nor the best: after a state is saved, which may need them."""
        if not self.wants_best:
            return
        best = None if progress.best is None else self._place(int(progress.best["step"]))
        steps = self._after(0)
        for old in steps[: -self.latest] if self.latest else steps:
            if old != best:
                shutil.rmtree(old)

    def forget(self, progress: Progress, say: Say) -> None:
        """Where a training goes on from a state that names a best student which is gone, look for another."""
        best = progress.best
        if self.wants_best and best is not None and not self._place(int(best["step"])).is_dir():
            say(f"the best student so far, of step {best['step']:.0f}, is gone: the best of those to come counts")
            progress.best = None

    def copy(self, step: int, into: Path) -> None:
        """Put one of them into a folder that is there."""
        for path in self._place(step).iterdir():
            shutil.copyfile(path, into / path.name)

    def publish(self, into: Path) -> None:
        """Copy all that are kept into a folder, which is made if there are any and they were asked for."""
        if self.latest and self.directory.is_dir():
            shutil.copytree(self.directory, into, ignore=shutil.ignore_patterns(".*"))

    def _after(self, step: int) -> list[Path]:
        return sorted(p for p in self.directory.glob("step-*") if p.is_dir() and p > self._place(step))

    def _place(self, step: int) -> Path:
        return self.directory / f"step-{step:09d}"


def write_student(directory: Path, learner: Learner, facts: dict[str, Any]) -> None:
    """Write weights and shape of a student, and the heads or linears that predict from it, into a folder that is there."""
    save_student(directory, learner.encoder, facts)
    heads = {name: tensor.detach().cpu().contiguous() for name, tensor in learner.predictor.kept().items()}
    (directory / "heads.safetensors").write_bytes(save(heads))
