"""The scores of a run in; the same scores as CSV, as metrics for DVC and as the Markdown table of a README out."""

import csv
import io
from pathlib import Path
from typing import Any

from cache.errors import DataError
from cache.publish import publish_file
from pipeline.report import finetuned, results, wording
from pipeline.report.products import ProfiledFile
from pipeline.report.run import Run
from pipeline.tasks.labels import TASKS

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COLUMNS = (
    "model", "role", "kind", "num_params", "weight_bytes", "seconds", "macs_per_second", "rtf", "rtf_low", "rtf_high",
    "superb_like", "task", "metric", "mean", "sd", "low_95", "high_95",
    "chance", "majority", "lr", "lr_at_edge", "seeds", "classes", "train", "dev", "test",
    "cer", "min_dcf",
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
            cost = run.cost(model.name)
            costs = (
                [None] * 5
                if cost is None
                else [cost.seconds, cost.macs_per_second, cost.rtf.median, cost.rtf.low, cost.rtf.high]
            )
            superb = None if run.superb is None else run.superb.scores.get(model.name)
            table.writerow(
                _cell(value)
                for value in (
                    model.name, model.role, model.kind, model.num_params, model.weight_bytes, *costs, superb, task, TASKS[task].metric,
                    score.mean, score.sd, *score.interval, score.chance, score.majority, score.lr, score.lr_at_edge,
                    len(score.params["seeds"]), len(score.classes), *(score.counts[s] for s in ("train", "dev", "test")),
                    score.cer, score.min_dcf[0].mean if score.min_dcf else None,
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
        "superb_like": {} if run.superb is None else {n: round(s, 3) for n, s in sorted(run.superb.scores.items())},
        "costs": {} if run.profile is None else {name: _costs(found) for name, found in run.profile.models.items()},
        "finetuned": {
            tuned.name: {task: round(score.mean, 6) for task, score in tuned.found.tasks.items()} for tuned in run.tuned
        },
        "students": {
            student.name: {"parameters": student.metrics.parameters["student"], **(student.metrics.dev or {})}
            for student in run.students
        },
    }


def _costs(found: ProfiledFile) -> dict[str, int | float]:
    cost = found.costs[-1]
    return {"parameters": found.num_params, "macs_per_second": cost.macs_per_second, "rtf": cost.rtf.median}


def markdown(run: Run) -> str:
    """The results table of a README: models by what they cost and by tasks, the best of each task in bold."""
    kinds = [TASKS[task] for task in run.tasks]
    heads = ["parameters", "weights"]
    heads += [] if run.profile is None else ["M MACs/s", "ms/s"]
    heads += [kind.superb if kind.higher_is_better else f"{kind.superb}, {kind.metric} ↓" for kind in kinds]
    heads += [] if run.superb is None else ["score"]
    lines = ["| model | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for model in run.models:
        cells = [wording.params(model.num_params), wording.size(model.weight_bytes)]
        if run.profile is not None:
            cost = run.cost(model.name)
            cells.append(wording.NONE if cost is None else wording.significant(cost.macs_per_second / 1e6))
            cells.append(wording.NONE if cost is None else wording.significant(1000 * cost.rtf.median))
        for task in run.tasks:
            score = run.scores.get((model.name, task))
            cells.append(wording.NONE if score is None else spread(score.mean, score.sd, score.mean == run.best(task)))
        if run.superb is not None:
            found = run.superb.scores.get(model.name)
            cells.append(wording.NONE if found is None else wording.points(found))
        name = f"{model.name} ({role_of(model.role, model.untrained)})"
        lines.append("| " + " | ".join([name, *cells]) + " |")
    lines += ["", " ".join(_notes(run))]
    if run.tuned:
        lines += ["", finetuned.markdown(run).rstrip("\n")]
    return "\n".join(lines) + "\n"


def _notes(run: Run) -> list[str]:
    """What the table does not say of itself, a sentence each."""
    kinds = [TASKS[task] for task in run.tasks]
    said = ["Test scores in per cent of a frozen model under a small head, mean ± sd over seeds."]
    said.append(wording.listed([f"{kind.superb} is {kind.title.lower()}" for kind in kinds]) + ".")
    if accuracies := [kind for kind in kinds if kind.higher_is_better]:
        chances = [f"{wording.percent(run.any_score(k.name).chance)} ({k.superb})" for k in accuracies]
        said.append(f"Accuracy by chance is {wording.listed(chances)}.")
    if errors := [kind for kind in kinds if not kind.higher_is_better]:
        floors = [f"{wording.percent(run.any_score(k.name).majority)} ({k.superb})" for k in errors]
        said.append(f"↓ is an error rate, lower is better; without listening it is {wording.listed(floors)}.")
    if run.profile is not None:
        cpu, seconds = run.profile.machine["cpu"], next(iter(run.profile.models.values())).costs[-1].seconds
        threads = wording.spelled(int(run.profile.params["threads"]), "thread")
        said.append(f"ms/s: milliseconds per second of audio, {threads} of {cpu}, {seconds:g} s at a time.")
    if run.superb is not None:
        said.append(results.superb_sentence(run))
    return said


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
