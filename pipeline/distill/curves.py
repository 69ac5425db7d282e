"""Rows of a training in, a CSV out that a killed run goes on writing without a row lost or doubled; loggers are told, too."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from pipeline.distill.world import World


@runtime_checkable
class Log(Protocol):
    """Somebody who is told every row: TensorBoard, Weights & Biases."""

    def begin(self, first: int, run: Path) -> None:
        """Rows from step `first` on are told next; what a killed run told of them is void. `run` holds the state."""
        ...

    def row(self, step: int, values: Mapping[str, float]) -> None:
        """One row."""
        ...

    def flush(self) -> None:
        """A state is about to be saved: no row until here is told again."""
        ...

    def close(self) -> None:
        """The training has ended or is broken off."""
        ...


class Curves:
    """A growing CSV. Its length is part of the training's state: what a killed run wrote after it is cut off.

    Of several processes the first one writes.
    """

    def __init__(
        self,
        path: Path,
        terms: Sequence[str],
        more: Sequence[str],
        targets: Sequence[str],
        keep_bytes: int,
        first: int,
        world: World,
        logs: Sequence[Log] = (),
    ) -> None:
        """Open it, and write its head where it is new.

        Args:
            path: the file.
            terms: of the loss; each is a column, and with dev_ before it another.
            more: of training alone.
            targets: whose losses are told at validations; each with dev_ before it is a column.
            keep_bytes: of what is there.
            first: step that is made next: no row so far is of it or of a later one.
            world: the processes of the training.
            logs: told every row as well.
        """
        dev = [f"dev_{name}" for name in (*terms, *targets)]
        self._columns = ("rate", *terms, *more, "grad_norm", *dev)
        self._leads, self._logs = world.leads, logs
        self._file = open(path if world.leads else os.devnull, "r+b" if keep_bytes else "wb")  # noqa: SIM115  # by __exit__
        if not world.leads:
            return
        self._file.truncate(keep_bytes)
        self._file.seek(keep_bytes)
        for log in self._logs:
            log.begin(first, path.parent)
        if not keep_bytes:
            self._file.write((",".join(["step", *self._columns]) + "\n").encode())

    def add(self, step: int, **values: float) -> None:
        """One row; columns without a value stay empty."""
        if not self._leads:
            return
        cells = [f"{values[c]:.9g}" if c in values else "" for c in self._columns]
        self._file.write((",".join([str(step), *cells]) + "\n").encode())
        for log in self._logs:
            log.row(step, values)

    def flush(self) -> int:
        """Bring all rows to the disk and give their length in bytes."""
        if not self._leads:
            return 0
        for log in self._logs:
            log.flush()
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, *error: object) -> None:
        if self._leads:
            for log in self._logs:
                log.close()
        self._file.close()
