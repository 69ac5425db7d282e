"""The scores of a run in; the same scores as CSV, as metrics for DVC and as the Markdown table of a README out."""

import csv
import io
from pathlib import Path
from typing import Any

from cache.errors import DataError
from cache.publish import publish_file
from pipeline.report import wording
from pipeline.report.gather import Run
from pipeline.tasks.labels import TASKS

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COLUMNS = (
    "model", "role", "kind", "num_params", "weight_bytes", "task", "metric", "mean", "sd", "low_95", "high_95",
    "chance", "majority", "lr", "lr_at_edge", "seeds", "classes", "train", "dev", "test",
)  # fmt: skip


def scores_csv(run: Run) -> str:
    """One line a score, every number unrounded but for the twelfth digit."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for model in run.models:
        for task in run.tasks:
            score = run.scores.get((model.name, task))
            if score is None:
                continue
            table.writerow(
                _cell(value)
                for value in (
                    model.name, model.role, model.kind, model.num_params, model.weight_bytes, task, TASKS[task].metric,
                    score.mean, score.sd, *score.interval, score.chance, score.majority, score.lr, score.lr_at_edge,
                    len(score.params["seeds"]), len(score.classes), *(score.counts[s] for s in ("train", "dev", "test")),
                )
            )  # fmt: skip
    return text.getvalue()


def metrics(run: Run) -> dict[str, Any]:
    """What `dvc metrics show` and `dvc metrics diff` print: scores by task and model, losses by student."""
    return {
        "hours": round(sum(corpus.hours for corpus in run.corpora), 4),
        "quarantined": sum(corpus.quarantined for corpus in run.corpora),
        "store_bytes": sum(store.bytes for store in run.stores),
        "scores": {
            task: {name: round(score.mean, 6) for (name, of), score in sorted(run.scores.items()) if of == task}
            for task in run.tasks
        },
        "students": {
            student.name: {"parameters": student.metrics.parameters["student"], **(student.metrics.dev or {})}
            for student in run.students
        },
    }


def markdown(run: Run) -> str:
    """The results table of a README: models by tasks, the best of each task in bold."""
    kinds = [TASKS[task] for task in run.tasks]
    names = [kind.title if kind.higher_is_better else f"{kind.title}, {kind.metric}" for kind in kinds]
    heads = [wording.metric(name, kind.higher_is_better) for name, kind in zip(names, kinds, strict=True)]
    lines = [
        "| model | parameters | weights | " + " | ".join(heads) + " |",
        "|---|---:|---:|" + "---:|" * len(heads),
    ]
    for model in run.models:
        cells = []
        for task in run.tasks:
            score = run.scores.get((model.name, task))
            cells.append(wording.NONE if score is None else spread(score.mean, score.sd, score.mean == run.best(task)))
        name = f"{model.name} ({role_of(model.role, model.untrained)})"
        row = [name, wording.params(model.num_params), wording.size(model.weight_bytes), *cells]
        lines.append("| " + " | ".join(row) + " |")
    notes = []
    if accuracies := [kind for kind in kinds if kind.higher_is_better]:
        chances = [f"{wording.percent(run.any_score(k.name).chance)} ({k.title.lower()})" for k in accuracies]
        notes.append(
            "Test accuracy of a frozen model under a small head, mean ± sd over seeds; "
            f"chance is {wording.listed(chances)}."
        )
    for kind in kinds:
        if not kind.higher_is_better:
            floor = wording.percent(run.any_score(kind.name).majority)
            notes.append(f"{kind.metric} is an error rate, lower is better; one answer for all gives {floor}.")
    lines += ["", " ".join(notes)]
    return "\n".join(lines) + "\n"


def role_of(role: str, untrained: bool) -> str:
    """teacher | student | untrained student | baseline."""
    return "untrained student" if untrained else role


def spread(mean: float, sd: float | None, best: bool) -> str:
    """**93.1** ± 0.4."""
    figure = f"**{wording.percent(mean)}**" if best else wording.percent(mean)
    return figure if sd is None else f"{figure} ± {wording.percent(sd)}"


def splice(readme: Path, table: str) -> None:
    """Replace what stands between the two marks of a README; the rest keeps its bytes.

    Raises:
        DataError: no README, or not exactly one pair of marks in their order.
    """
    if not readme.exists():
        raise DataError(f"{readme} does not exist; give an existing file to --readme, or leave it out")
    text = readme.read_bytes().decode("utf-8")
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise DataError(
            f"{readme} must have one line '{BEGIN}' and after it one line '{END}'; add them where the table goes"
        )
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    with publish_file(readme) as partial:
        partial.write_bytes(f"{before}{BEGIN}\n{table}{END}{after}".encode())


def _cell(value: Any) -> Any:
    return "" if value is None else f"{value:.12g}" if isinstance(value, float) else value
