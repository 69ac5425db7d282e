"""What a report knows of a run, in order: facts that `gather` reads from the products, and what follows from them alone."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.report.products import CostFile, MetricsFile, ProfileFile, ScoreFile, SimilarityFile, TunedFile
from pipeline.report.superb import Superb
from pipeline.tasks.labels import TASKS

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
    """As it was measured; where it was not, the file of a student as it lies on disk, of others four bytes a parameter."""
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
class Tuned:
    """A model that was fine-tuned."""

    name: str
    found: TunedFile

    @property
    def is_joint(self) -> bool:
        """Whether it learned more than one task."""
        return len(self.found.tasks) > 1


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
    profile: ProfileFile | None
    """What models cost; None where nobody measured it."""
    tuned: tuple[Tuned, ...]
    """Models that were fine-tuned, in the order of their names."""
    superb: Superb | None
    """SUPERB-like scores; None where they are not asked for."""

    def best(self, task: str) -> float:
        """The best score of a task: the highest, or the lowest where the metric is an error rate."""
        means = [score.mean for (_, of), score in self.scores.items() if of == task]
        return max(means) if TASKS[task].higher_is_better else min(means)

    def any_score(self, task: str) -> ScoreFile:
        """What the scores of a task have in common can be read from any: its test split, its floor, its settings."""
        return next(score for (_, of), score in self.scores.items() if of == task)

    def best_of(self, task: str, role: str) -> float | None:
        """The best score of a task in one group; None where none of it was probed."""
        members = {model.name for model in self.of_role(role)}
        means = [score.mean for (name, of), score in self.scores.items() if of == task and name in members]
        return (max if TASKS[task].higher_is_better else min)(means) if means else None

    def cost(self, name: str) -> CostFile | None:
        """What a model costs at the longest utterance that was measured."""
        found = self.profile.models.get(name) if self.profile is not None else None
        return found.costs[-1] if found is not None else None

    def of_role(self, role: str) -> list[Model]:
        """The models of one group."""
        return [model for model in self.models if model.role == role]
