"""Paths of models, as they are given on the command line, in; the model to run, or the mean of several, out."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.upstream import Upstream


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


def open_models(paths: list[Path], device: str) -> "Upstream":
    """The model, or the mean of several.

    Raises:
        StoreError: something that is no model.
        SettingsError: models of different shapes.
    """
    from pipeline.blend import Blend

    models = [open_model(path, device) for path in paths]
    return models[0] if len(models) == 1 else Blend(models)


def open_model(path: Path, device: str) -> "Upstream":
    """Whatever lies at `path`, told by the file it has.

    Raises:
        StoreError: nothing there that is a model.
    """
    from cache.errors import StoreError

    if path.suffix == ".json" and path.exists():
        from pipeline.logmel import load_logmel

        return load_logmel(path, device)
    if (path / "teacher.json").exists():
        from pipeline.teachers.forward import load_teacher

        return load_teacher(path, device)
    if (path / "shape.json").exists():
        from pipeline.student.upstream import load_student_upstream

        return load_student_upstream(path, device)
    raise StoreError(
        f"{path} is no model: it has neither teacher.json nor shape.json; make it with `dvc repro teacher` or `distill`"
    )
