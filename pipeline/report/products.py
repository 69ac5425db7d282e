"""A product on disk in, the part of it that a report says out; what does not fit is refused by file and field."""

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, Field, ValidationError

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


class MissFile(NamedTuple):
    """A test error, as `pipeline.tasks.score.Miss` has it."""

    ids: tuple[str, ...]
    truth: str
    answer: str
    badness: float


class DcfFile(NamedTuple):
    """A least detection cost, as `pipeline.tasks.voicescore.CostScore` has it."""

    p_target: float
    miss: float
    false_alarm: float
    mean: float
    sd: float | None


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
    misses: tuple[MissFile, ...]
    params: dict[str, Any]
    cer: float | None = None
    """Of recognition of characters only."""
    min_dcf: tuple[DcfFile, ...] = ()
    """Of verification only."""


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


class RtfFile(BaseModel, frozen=True):
    """Median and quartiles over rounds."""

    median: float
    low: float
    high: float


class CostFile(BaseModel, frozen=True):
    """What `decant profile` found for one length of utterance."""

    seconds: float
    macs_per_second: float
    rtf: RtfFile


class ProfiledFile(BaseModel, frozen=True):
    """What `decant profile` found of one model."""

    digest: str
    num_params: int
    weight_bytes: int
    costs: tuple[CostFile, ...] = Field(min_length=1)


class ProfileFile(BaseModel, frozen=True):
    """What `decant profile` wrote."""

    machine: dict[str, str | int]
    params: dict[str, Any]
    models: dict[str, ProfiledFile]


class TunedTask(BaseModel, frozen=True):
    """One task of a fine-tuned model, on test."""

    mean: float
    sd: float | None
    min_dcf: float | None = None
    """Of a verification only."""


class StartFile(BaseModel, frozen=True):
    """What a fine-tuning began with."""

    kind: str
    name: str


class TunedFile(BaseModel, frozen=True):
    """What a report reads of a fine-tuned model's metrics.json."""

    tasks: dict[str, TunedTask]
    parameters: dict[str, int]
    frozen: bool
    starts_from: StartFile


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
