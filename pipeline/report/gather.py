"""The products of a run in, one `Run` out: everything a report says, read, checked and put in order.

Nothing is computed twice here: scores come from probes, bytes from receipts, losses from training. A product that is
missing, unreadable or made from another version of its input is refused by name, because a table in which one row is
stale looks exactly like one in which none is.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from cache.errors import StoreError
from cache.frames import RATE_HZ
from cache.manifest import SPLITS, Manifest, read_manifest
from cache.names import PROJECTION, keeps_layers
from cache.publish import read_json
from pipeline.report.products import MetricsFile, ReceiptFile, ScoreFile, SimilarityFile, files, parsed
from pipeline.tasks.labels import TASKS, whole_task

TERMS = ("l1", "l2", "cosine", "total")  # of a loss; what else was validated are the losses of single targets


class CurvePoint(NamedTuple):
    """One line of curves.csv: train is the mean since the line before, dev is there where the student was validated."""

    step: int
    train: float | None
    dev: float | None
    sparsity: float | None
    """Share of the parameters that the gates of a pruned student are expected to remove; until they are closed."""
    targets: dict[str, float]
    """Where the student was validated: target -> its loss."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """What one corpus gave."""

    name: str
    utterances: int
    hours: float
    speakers: int
    splits: dict[str, int]
    tasks: dict[str, int]
    """Utterances that take part in each; in folds, in any of them."""
    quarantined: int


@dataclass(frozen=True, slots=True)
class StoreFacts:
    """One store on disk, whoever has a receipt of it."""

    name: str
    purposes: tuple[str, ...]
    """waveforms, or targets and/or features: a teacher that is also probed is stored once."""
    layers: tuple[str, ...]
    width: int | None
    codec: str
    utterances: int
    rows: int
    bytes: int
    shards: int
    key: str


@dataclass(frozen=True, slots=True)
class Model:
    """A model that was probed."""

    name: str
    kind: str
    """The family of a teacher, `student`, or `log-mel`."""
    num_layers: int
    width: int
    num_params: int | None
    weight_bytes: int | None
    """Students: the file as it lies on disk; others: four bytes a parameter."""
    untrained: bool

    @property
    def role(self) -> str:
        """teacher | student | baseline: the groups of every table."""
        return {"student": "student", "log-mel": "baseline"}.get(self.kind, "teacher")


@dataclass(frozen=True, slots=True)
class Student:
    """How a student was trained."""

    name: str
    metrics: MetricsFile
    curve: tuple[CurvePoint, ...]
    facts: dict[str, Any]
    """shape.json: shape, settings, targets."""
    unpruned: int | None
    """Parameters before pruning; None where there was none."""

    @property
    def pruned_at(self) -> int | None:
        """The step after which what the gates closed on was removed."""
        settings = self.facts.get("settings", {})
        return settings["train"]["steps"] if settings.get("prune") else None

    @property
    def target_losses(self) -> dict[str, float]:
        """The loss of every target on dev at the last validation: hubert.layer-04 -> loss."""
        validated = [point.targets for point in self.curve if point.targets]
        return validated[-1] if validated else {}

    @property
    def num_targets(self) -> int:
        """Layers it predicts."""
        return sum(len(store["arrays"]) for store in self.facts.get("targets", {}).get("stores", ()))

    @property
    def teachers(self) -> tuple[str, ...]:
        """Whom it learned from, by name."""
        ensemble = self.facts.get("settings", {}).get("ensemble", {})
        each = ensemble.get("teachers") or [ensemble]
        return tuple(one["teacher"] for one in each if "teacher" in one)


@dataclass(frozen=True, slots=True)
class Run:
    """Everything a report says."""

    corpora: tuple[Corpus, ...]
    stores: tuple[StoreFacts, ...]
    models: tuple[Model, ...]
    """Teachers, students, baselines; larger first within each."""
    students: tuple[Student, ...]
    tasks: tuple[str, ...]
    scores: dict[tuple[str, str], ScoreFile]
    """(model, task) -> score; a pair that was not probed is absent."""
    similarities: tuple[SimilarityFile, ...]
    """Of the teachers whose layers were compared."""

    def best(self, task: str) -> float:
        """The best score of a task: the highest, or the lowest where the metric is an error rate."""
        means = [score.mean for (_, of), score in self.scores.items() if of == task]
        return max(means) if TASKS[task].higher_is_better else min(means)

    def any_score(self, task: str) -> ScoreFile:
        """What the scores of a task have in common can be read from any: its test split, its floor, its settings."""
        return next(score for (_, of), score in self.scores.items() if of == task)

    def of_role(self, role: str) -> list[Model]:
        """The models of one group."""
        return [model for model in self.models if model.role == role]


def gather(
    manifest: Path,
    quarantine: Path,
    waves: Path,
    receipts: Path,
    features: Path,
    models: Path,
    probes: Path,
    similarity: Path | None = None,
) -> Run:
    """Read a run from its products.

    Raises:
        StoreError: a product is missing, unreadable, or older than what it was made from.
    """
    read: Manifest = read_manifest(manifest)
    of_teachers = {
        path.stem: receipt
        for path in sorted(receipts.glob("*.json"))
        if not path.name.startswith(".") and (receipt := parsed(path, ReceiptFile)).kind == "features"
    }
    if not of_teachers:
        raise StoreError(
            f"{receipts} holds no receipt of a teacher; run `decant extract` (or `dvc repro`) before the report"
        )
    of_models = {p.stem: parsed(p, ReceiptFile) for p in files(features, "*.json", "receipt of features", "extract")}
    students = tuple(
        _student(path.parent) for path in files(models, "*/shape.json", "student (NAME/shape.json)", "distill")
    )
    scores = {}
    for path in files(probes, "*.json", "score", "probe"):
        score = parsed(path, ScoreFile)
        if score.model not in of_models:
            raise StoreError(
                f"{path} is a score of '{score.model}', which has no receipt in {features}; "
                "delete the score, or run `dvc repro` to bring both in step"
            )
        made_from, now = score.description.get("store"), of_models[score.model].key
        if made_from != now:
            raise StoreError(
                f"{path} was made from features {made_from} and {features / score.model}.json now describes {now}; "
                f"run `decant probe {score.model} {score.task}` again (`dvc repro` does)"
            )
        scores[score.model, score.task] = score
    probed = {name for name, _ in scores}
    known = {student.name: student for student in students}
    described = [_model(name, receipt, models, known) for name, receipt in of_models.items() if name in probed]
    order = {"teacher": 0, "student": 1, "baseline": 2}
    return Run(
        corpora=tuple(_corpora(read, quarantine)),
        stores=tuple(
            _stores(
                [
                    ("waves", "waveforms", parsed(waves, ReceiptFile)),
                    *((name, "targets", receipt) for name, receipt in of_teachers.items()),
                    *((name, "features", receipt) for name, receipt in of_models.items()),
                ]
            )
        ),
        models=tuple(sorted(described, key=lambda m: (order[m.role], m.untrained, -(m.num_params or 0), m.name))),
        students=students,
        tasks=tuple(sorted({task for _, task in scores}, key=lambda task: (*TASKS, task).index(task))),
        scores=scores,
        similarities=() if similarity is None else tuple(_similarities(similarity, of_teachers)),
    )


def _similarities(folder: Path, receipts: dict[str, ReceiptFile]) -> Iterator[SimilarityFile]:
    for path in sorted(folder.glob("*.json")):
        found = parsed(path, SimilarityFile)
        receipt = receipts.get(found.teacher)
        if receipt is None or receipt.key != found.key:
            raise StoreError(
                f"{path} compares layers of the store {found.key}, which no receipt of {found.teacher} describes; "
                f"run `decant similarity {found.teacher}` again (`dvc repro` does), or delete it"
            )
        yield found


def _corpora(manifest: Manifest, quarantine: Path) -> list[Corpus]:
    """One row a corpus; recordings that could not be used are told by the corpus that leads their id."""
    if not quarantine.exists():
        raise StoreError(f"{quarantine} does not exist; `decant prepare` writes it beside the manifest")
    try:
        refused = Counter(row["id"].split("/")[0] for row in read_json(quarantine))
    except (KeyError, TypeError, AttributeError) as error:
        raise StoreError(f"{quarantine} is not a list of quarantined recordings; run `decant prepare` again") from error
    rows = []
    for name in sorted({utterance.corpus for utterance in manifest} | set(refused)):
        members = [utterance for utterance in manifest if utterance.corpus == name]
        splits = Counter(utterance.split for utterance in members)
        rows.append(
            Corpus(
                name=name,
                utterances=len(members),
                hours=sum(utterance.samples for utterance in members) / RATE_HZ / 3600,
                speakers=len({utterance.speaker for utterance in members if utterance.speaker is not None}),
                splits={split: splits[split] for split in SPLITS},
                tasks=dict(sorted(Counter(task for u in members for task in {whole_task(t) for t in u.tasks}).items())),
                quarantined=refused[name],
            )
        )
    return rows


def _stores(receipts: list[tuple[str, str, ReceiptFile]]) -> Iterator[StoreFacts]:
    """One row a store: receipts of the same key describe the same folder."""
    by_key: dict[str, list[tuple[str, str, ReceiptFile]]] = {}
    for row in receipts:
        by_key.setdefault(row[2].key, []).append(row)
    for key, rows in by_key.items():
        arrays = {name: array for _, _, receipt in rows for name, array in receipt.arrays.items()}
        first = next(iter(arrays.values()))
        yield StoreFacts(
            name=", ".join(dict.fromkeys(name for name, _, _ in rows)),
            purposes=tuple(dict.fromkeys(purpose for _, purpose, _ in rows)),
            layers=tuple(layer for layer in sorted(arrays) if keeps_layers(layer)),
            width=first.width,
            codec=first.codec,
            utterances=rows[0][2].utterances,
            rows=rows[0][2].rows,
            bytes=sum(size for array in arrays.values() for size, _ in array.shards),
            shards=sum(len(array.shards) for array in arrays.values()),
            key=key,
        )


def _model(name: str, receipt: ReceiptFile, models: Path, students: dict[str, Student]) -> Model:
    described = receipt.fingerprint.get("model", {})
    student = students.get(name)
    num_params = student.metrics.parameters["student"] if student is not None else described.get("num_params")
    weights = models / name / "weights.safetensors"
    if student is not None:
        weight_bytes = weights.stat().st_size if weights.exists() else None
    else:
        weight_bytes = 4 * num_params if num_params else None
    return Model(
        name=name,
        kind=str(described.get("kind", "student" if student is not None else "teacher")),
        num_layers=sum(name != PROJECTION for name in receipt.arrays),
        width=next(iter(receipt.arrays.values())).width or 0,
        num_params=num_params or None,
        weight_bytes=weight_bytes,
        untrained=student is not None and student.metrics.steps == 0,
    )


def _student(folder: Path) -> Student:
    facts, metrics = read_json(folder / "shape.json"), parsed(folder / "metrics.json", MetricsFile)
    return Student(folder.name, metrics, _curve(folder / "curves.csv"), facts, _unpruned(folder / "shape.json", facts))


def _unpruned(path: Path, facts: dict[str, Any]) -> int | None:
    """The size of the shape that was asked for, of a student that was pruned from it."""
    settings = facts.get("settings", {})
    if not settings.get("prune"):
        return None
    from pipeline.student.shape import EncoderShape
    from pipeline.student.size import full_parameters  # torch: only where a student was pruned

    try:
        return full_parameters(EncoderShape.model_validate(settings["shape"]))
    except (KeyError, ValidationError) as error:
        raise StoreError(
            f"{path}: settings.shape is no shape of a student; run `decant distill {path.parent.name}` again"
        ) from error


def _curve(path: Path) -> tuple[CurvePoint, ...]:
    if not path.exists():
        raise StoreError(f"{path} does not exist; run `decant distill {path.parent.name}` again")
    with open(path, newline="", encoding="utf-8") as file:
        try:
            return tuple(_point(row) for row in csv.DictReader(file))
        except (KeyError, ValueError, TypeError) as error:
            raise StoreError(
                f"{path} is not a training curve ({error}); run `decant distill {path.parent.name}` again"
            ) from error


def _point(row: dict[str, str]) -> CurvePoint:
    found = {name: float(cell) for name, cell in row.items() if name != "step" and cell}
    dev = {name.removeprefix("dev_"): value for name, value in found.items() if name.startswith("dev_")}
    targets = {name: value for name, value in dev.items() if name not in TERMS}
    train = found["total"] if row["total"] else None
    return CurvePoint(int(row["step"]), train, dev.get("total"), found.get("sparsity"), targets)
