"""Rows of a training in, a CSV out that a killed run goes on writing without a row lost or doubled."""

import os
from collections.abc import Sequence
from pathlib import Path


class Curves:
    """A growing CSV. Its length is part of the training's state: what a killed run wrote after it is cut off."""

    def __init__(self, path: Path, terms: Sequence[str], keep_bytes: int) -> None:
        """Open it, and write its head where it is new.

        Args:
            path: the file.
            terms: of the loss; each is a column, and with dev_ before it another.
            keep_bytes: of what is there.
        """
        self._columns = ("rate", *terms, "grad_norm", *(f"dev_{term}" for term in terms))
        self._file = open(path, "r+b" if keep_bytes else "wb")  # noqa: SIM115  # closed by __exit__
        self._file.truncate(keep_bytes)
        self._file.seek(keep_bytes)
        if not keep_bytes:
            self._file.write((",".join(["step", *self._columns]) + "\n").encode())

    def add(self, step: int, **values: float) -> None:
        """One row; columns without a value stay empty."""
        cells = [f"{values[c]:.9g}" if c in values else "" for c in self._columns]
        self._file.write((",".join([str(step), *cells]) + "\n").encode())

    def flush(self) -> int:
        """Bring all rows to the disk and give their length in bytes."""
        self._file.flush()
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> "Curves":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()
