"""Rows of a training in, points of TensorBoard and of Weights & Biases out.

Both are extras, imported only when they are asked for. A resumed run tells again of the steps since its last state:
TensorBoard is told to forget those of the killed run, Weights & Biases ignores what it has.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cache.errors import ResourceError
from cache.publish import read_json, write_json
from pipeline.distill.curves import Log
from pipeline.extras import from_extra


class TensorBoard:
    """Scalars train/NAME and dev/NAME in a folder, which `tensorboard --logdir` shows."""

    def __init__(self, directory: Path) -> None:
        """Nothing is written yet.

        Raises:
            SettingsError: the extra is not installed.
        """
        from_extra("tensorboard", "tensorboard")
        self._module = from_extra("torch.utils.tensorboard", "tensorboard")
        self._directory = directory

    def begin(self, first: int, run: Path) -> None:
        """Open a file of its own, whose first record voids what earlier ones hold of step `first` and later."""
        self._writer = self._module.SummaryWriter(str(self._directory), purge_step=first)

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """One point for each value."""
        for name, value in tagged(values).items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """A state is about to be saved: a run that goes on from it does not tell of its steps again."""
        self._writer.flush()

    def close(self) -> None:
        """The training ends here, done or not."""
        self._writer.close()


class WeightsAndBiases:
    """One run of a project; a training that goes on goes on in the same run."""

    def __init__(self, project: str, name: str, settings: Mapping[str, Any]) -> None:
        """Nobody is asked anything yet.

        Args:
            project: where the run is listed.
            name: of the run: the student's.
            settings: the student's, shown beside the run.

        Raises:
            SettingsError: the extra is not installed.
        """
        self._module = from_extra("wandb", "wandb")
        self._project, self._name, self._settings = project, name, settings

    def begin(self, first: int, run: Path) -> None:
        """Open the run. Its id lies with the state of the training, and is thrown away with it.

        Raises:
            ResourceError: not logged in, or the server cannot be reached.
        """
        record = run / "wandb.json"
        if not record.exists():
            write_json(record, {"id": uuid.uuid4().hex[:12]})
        try:
            self._run = self._module.init(
                project=self._project,
                name=self._name,
                id=read_json(record)["id"],
                resume="allow",
                config=dict(self._settings),
            )
        except self._module.Error as error:
            raise ResourceError(
                f"--wandb {self._project}: {error}; log in with `wandb login`, or set WANDB_MODE=offline and sync later"
            ) from error

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """One row. Steps that the run has already are ignored there."""
        self._run.log(tagged(values), step=step)

    def flush(self) -> None:
        """Rows are sent as they come."""

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


def open_logs(tensorboard: Path | None, wandb: str | None, name: str, params: BaseModel) -> list[Log]:
    """The loggers that were asked for.

    Args:
        tensorboard: folder.
        wandb: project.
        name: of the student.
        params: its settings, or those of a fine-tuning.

    Raises:
        SettingsError: the extra of one is not installed.
    """
    logs: list[Log] = []
    if tensorboard is not None:
        logs.append(TensorBoard(tensorboard))
    if wandb is not None:
        logs.append(WeightsAndBiases(wandb, name, params.model_dump(mode="json")))
    return logs


def tagged(values: Mapping[str, float]) -> dict[str, float]:
    """Columns of curves.csv by what they are of: dev/total and train/total lie in one group each."""
    return {f"dev/{n.removeprefix('dev_')}" if n.startswith("dev_") else f"train/{n}": v for n, v in values.items()}
