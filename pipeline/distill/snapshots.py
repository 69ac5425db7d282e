"""Students of some validations: an encoder in, a folder of its own out; the latest few of them and the best are kept.

They are whole students with a hash of their weights (`pipeline.student.checkpoint`), so any of them can be extracted and
judged like the published one.
"""

import shutil
from pathlib import Path
from typing import Any

from cache.publish import publish_dir
from pipeline.distill.settings import TrainParams
from pipeline.distill.state import Progress
from pipeline.student.checkpoint import save_student
from pipeline.student.encoder import Encoder


class Snapshots:
    """Those of one training."""

    def __init__(self, directory: Path, facts: dict[str, Any], train: TrainParams) -> None:
        self.directory, self.facts = directory, facts
        self.latest = train.keep
        self.wants_best = bool(train.keep) or train.publish == "best"

    def take(self, encoder: Encoder, progress: Progress) -> None:
        """Keep a student that was just validated, and drop those that are neither among the latest nor the best."""
        if not self.wants_best:
            return
        with publish_dir(self._place(progress.step)) as partial:
            save_student(partial, encoder, {**self.facts, "step": progress.step, "dev": progress.dev})
        best = None if progress.best is None else self._place(int(progress.best["step"]))
        steps = sorted(p for p in self.directory.glob("step-*") if p.is_dir())
        for old in [p for p in steps if p > self._place(progress.step)]:
            shutil.rmtree(old)  # of a run that was killed after it: it will be made again
        steps = [p for p in steps if p.exists()]
        for old in steps[: -self.latest] if self.latest else steps:
            if old != best:
                shutil.rmtree(old)

    def copy(self, step: int, into: Path) -> None:
        """Put one of them into a folder that is there."""
        for path in self._place(step).iterdir():
            shutil.copyfile(path, into / path.name)

    def publish(self, into: Path) -> None:
        """Copy all that are kept into a folder, which is made if there are any and they were asked for."""
        if self.latest and self.directory.is_dir():
            shutil.copytree(self.directory, into, ignore=shutil.ignore_patterns(".*"))

    def _place(self, step: int) -> Path:
        return self.directory / f"step-{step:09d}"
