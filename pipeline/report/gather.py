"""The products of a run in, one `Run` out: everything a report says, read, checked and put in order.

Nothing is computed twice here: scores come from probes, bytes from receipts, losses from training. A product that is
missing, unreadable or made from another version of its input is refused by name, because a table in which one row is
stale looks exactly like one in which none is.
"""

import csv
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cache.errors import StoreError
from cache.frames import RATE_HZ
from cache.manifest import SPLITS, Manifest, read_manifest
from cache.names import PROJECTION, keeps_layers
from cache.publish import read_json
from pipeline.report.products import (
    MetricsFile,
    ProfileFile,
    ReceiptFile,
    ScoreFile,
    SimilarityFile,
    TunedFile,
    files,
    parsed,
)
from pipeline.report.run import TERMS, Corpus, CurvePoint, Model, Run, StoreFacts, Student, Tuned
from pipeline.report.superb import SuperbParams, superb_of
from pipeline.tasks.labels import whole_task

ORDER = ("pr", "asr", "kws", "sid", "sv", "er")
"""Tasks as SUPERB's tables have them: content, speaker, emotion."""


def gather(
    manifest: Path,
    quarantine: Path,
    waves: Path,
    receipts: Path,
    features: Path,
    models: Path,
    probes: Path,
    similarity: Path | None = None,
    profile: Path | None = None,
    superb: SuperbParams | None = None,
) -> Run:
    """Read a run from its products.

    Raises:
        StoreError: a product is missing, unreadable, or older than what it was made from.
        SettingsError: the model that is to score 0 was not probed.
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
    folders = [path.parent for path in files(models, "*/shape.json", "student (NAME/shape.json)", "distill")]
    is_tuned = {folder: read_json(folder / "shape.json").get("kind") == "finetuned" for folder in folders}
    students = tuple(_student(folder) for folder in folders if not is_tuned[folder])
    scores = _scores(probes, features, of_models)
    probed = {name for name, _ in scores}
    known = {student.name: student for student in students}
    costs = None if profile is None else _profile(profile, of_models)
    described = [_model(name, receipt, models, known, costs) for name, receipt in of_models.items() if name in probed]
    order = {"teacher": 0, "student": 1, "baseline": 2}
    ordered = sorted(described, key=lambda m: (order[m.role], m.untrained, -(m.num_params or 0), m.name))
    tasks = tuple(sorted({task for _, task in scores}, key=lambda task: (*ORDER, task).index(task)))
    means = {pair: score.mean for pair, score in scores.items()}
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
        models=tuple(ordered),
        students=students,
        tasks=tasks,
        scores=scores,
        similarities=() if similarity is None else tuple(_similarities(similarity, of_teachers)),
        profile=costs,
        tuned=tuple(_tuned(folder) for folder in folders if is_tuned[folder]),
        superb=None
        if superb is None
        else superb_of(
            tasks, means, [m.name for m in ordered], {m.name for m in ordered if m.role == "teacher"}, superb
        ),
    )


def _scores(probes: Path, features: Path, of_models: dict[str, ReceiptFile]) -> dict[tuple[str, str], ScoreFile]:
    """Of each model and task, none of them made from other features than are there."""
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
    return scores


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


def _profile(path: Path, receipts: dict[str, ReceiptFile]) -> ProfileFile:
    found = parsed(path, ProfileFile)
    for name, one in found.models.items():
        probed = receipts[name].fingerprint.get("model", {}).get("digest") if name in receipts else one.digest
        if probed != one.digest:
            raise StoreError(
                f"{path} measured another '{name}' than the one whose features were probed; run `decant profile` again "
                "(`dvc repro` does)"
            )
    return found


def _model(
    name: str, receipt: ReceiptFile, models: Path, students: dict[str, Student], costs: ProfileFile | None
) -> Model:
    described = receipt.fingerprint.get("model", {})
    student = students.get(name)
    num_params = student.metrics.parameters["student"] if student is not None else described.get("num_params")
    weights = models / name / "weights.safetensors"
    if costs is not None and name in costs.models:
        weight_bytes: int | None = costs.models[name].weight_bytes
    elif student is not None:
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


def _tuned(folder: Path) -> Tuned:
    return Tuned(folder.name, parsed(folder / "metrics.json", TunedFile))


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
