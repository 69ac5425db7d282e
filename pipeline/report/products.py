"""A product on disk in, the part of it that a report says out; what does not fit is refused by file and field."""

from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from cache.errors import StoreError
from cache.publish import read_json


class ArrayFile(BaseModel, frozen=True):
    """One array of a receipt."""

    width: int | None
    codec: str
    shards: tuple[tuple[int, str], ...]


class ReceiptFile(BaseModel, frozen=True):
    """What a report reads of a receipt; the rest is left alone."""

    kind: str
    key: str
    fingerprint: dict[str, Any]
    arrays: dict[str, ArrayFile]
    utterances: int
    rows: int


class ScoreFile(BaseModel, frozen=True):
    """What a report reads of a probe's score."""

    model: str
    task: str
    description: dict[str, Any]
    mean: float
    sd: float | None
    interval: tuple[float, float]
    chance: float
    majority: float
    lr: float
    lr_at_edge: bool
    layers: tuple[str, ...]
    layer_weights: tuple[float, ...]
    classes: tuple[str, ...]
    counts: dict[str, int]
    params: dict[str, Any]


class SimilarityFile(BaseModel, frozen=True):
    """What `decant similarity` wrote of one teacher."""

    teacher: str
    key: str
    settings: dict[str, Any]
    frames: int
    layers: tuple[int, ...]
    matrix: tuple[tuple[float, ...], ...]


class MetricsFile(BaseModel, frozen=True):
    """What a report reads of a student's metrics.json."""

    steps: int
    dev: dict[str, float] | None
    parameters: dict[str, int]


FileModel = TypeVar("FileModel", bound=BaseModel)


def files(folder: Path, pattern: str, what: str, stage: str) -> list[Path]:
    """The products in a folder, in order; none is a refusal."""
    found = sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
    found = [path for path in found if not path.parent.name.startswith(".")]
    if not found:
        raise StoreError(f"{folder} holds no {what}; run `decant {stage}` (or `dvc repro`) before the report")
    return found


def parsed(path: Path, model: type[FileModel]) -> FileModel:
    """One JSON product, with the first misfit named."""
    try:
        return model.model_validate(read_json(path))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole file"
        raise StoreError(
            f"{path}: {where}: {first['msg'].lower()}; delete it and run the stage that writes it again (`dvc repro`)"
        ) from error
