"""Paths of models in, as they are given on the command line; the folders and files of the models out."""

from collections.abc import Sequence
from pathlib import Path


def model_paths(given: Sequence[Path], of: str, params: Path) -> list[Path]:
    """The paths that were given; or, where `of` is a key of the params file, those below the one that was given.

    Raises:
        SettingsError: the key has no list of names.
    """
    from stages._params import read_params

    if not of:
        return list(given)
    names: list[str] = read_params(of, list[str], params)
    return [folder / name for folder in given for name in names]
