"""Paths of models in, the model to run out: a teacher, a student, the log-mel baseline, or the mean of several.

Which kind a path is, the file there says. Nothing that trains a student may import this: it reaches the teachers.
"""

from collections.abc import Sequence
from pathlib import Path

from cache.errors import StoreError
from pipeline.upstream import Upstream


def open_models(paths: Sequence[Path], device: str) -> Upstream:
    """The model, or the mean of several.

    Raises:
        StoreError: something that is no model.
        SettingsError: models of different shapes.
    """
    from pipeline.blend import Blend

    models = [open_model(path, device) for path in paths]
    return models[0] if len(models) == 1 else Blend(models)


def open_model(path: Path, device: str) -> Upstream:
    """Whatever lies at `path`, told by the file it has.

    Raises:
        StoreError: nothing there that is a model.
    """
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
