"""A run in; the table of fine-tuned models out: frozen against tuned, one task against both, student against teacher.

What a row costs at run time is the cost of its encoder as `decant profile` measured it: the encoder itself where it was
measured, else the model it started from, whose shape it has.
"""

from html import escape

from pipeline.report import wording
from pipeline.report.products import CostFile, TunedTask
from pipeline.report.run import Run, Tuned
from pipeline.tasks.labels import TASKS

COLUMNS = tuple(
    (name, f"{TASKS[name].superb}, {wording.metric(TASKS[name].metric, TASKS[name].higher_is_better)}")
    for name in ("kws", "sv")
    if name in TASKS
)


def ordered(run: Run) -> list[Tuned]:
    """Students before teachers, frozen before tuned, single tasks before both."""
    return sorted(
        run.tuned,
        key=lambda t: (
            t.found.starts_from.kind == "teacher",
            t.found.starts_from.name,
            not t.found.frozen,
            t.is_joint,
            t.name,
        ),
    )


def table(run: Run) -> str:
    """One row a system."""
    rows = []
    best = {task: _best(run, task) for task, _ in COLUMNS}
    for tuned in ordered(run):
        found, cost = tuned.found, cost_of(run, tuned)
        scores = "".join(_cell(found.tasks.get(task), best[task]) for task, _ in COLUMNS)
        macs = wording.NONE if cost is None else wording.params(round(cost.macs_per_second))
        speed = wording.NONE if cost is None else wording.significant(1000 * cost.rtf.median)
        rows.append(
            f'<tr><th scope="row">{escape(tuned.name)}</th>'
            f"<td>{escape(found.starts_from.name)}, a {escape(found.starts_from.kind)}</td>"
            f"<td>{encoder(tuned)}</td><td>{learns(tuned)}</td>"
            f'<td class="num">{wording.params(found.parameters["encoder"])}</td>'
            f'<td class="num">{wording.params(found.parameters["heads"])}</td>'
            f'<td class="num">{macs}</td><td class="num">{speed}</td>{scores}</tr>'
        )
    heads = "".join(f'<th class="num task">{title}</th>' for _, title in COLUMNS)
    return (
        '<table class="results" id="finetuned"><thead><tr><th scope="col">System</th><th>starts from</th><th>encoder</th>'
        '<th>learns</th><th class="num">parameters</th><th class="num">of heads</th><th class="num">MACs</th>'
        f'<th class="num">ms/s</th>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def markdown(run: Run) -> str:
    """The same for a README."""
    heads = ["system", "starts from", "encoder", "learns", "parameters", "M MACs/s", "ms/s", *(t for _, t in COLUMNS)]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|---|---|---:|---:|---:|" + "---:|" * len(COLUMNS)]
    for tuned in ordered(run):
        found, cost = tuned.found, cost_of(run, tuned)
        cells = [tuned.name, found.starts_from.name, encoder(tuned), learns(tuned)]
        cells.append(wording.params(found.parameters["encoder"]))
        cells.append(wording.NONE if cost is None else wording.significant(cost.macs_per_second / 1e6))
        cells.append(wording.NONE if cost is None else wording.significant(1000 * cost.rtf.median))
        for task, _ in COLUMNS:
            score = found.tasks.get(task)
            cells.append(wording.NONE if score is None else _spread(score, score.mean == _best(run, task), "**", "**"))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def cost_of(run: Run, tuned: Tuned) -> CostFile | None:
    """Of its encoder."""
    return run.cost(tuned.name) or run.cost(tuned.found.starts_from.name)


def encoder(tuned: Tuned) -> str:
    """frozen | tuned."""
    return "frozen" if tuned.found.frozen else "tuned"


def learns(tuned: Tuned) -> str:
    """Keyword spotting, verification, or both, as SUPERB calls them."""
    return wording.listed([TASKS[task].superb if task in TASKS else task for task in tuned.found.tasks])


def _best(run: Run, task: str) -> float | None:
    means = [tuned.found.tasks[task].mean for tuned in run.tuned if task in tuned.found.tasks]
    return (max(means) if task == "kws" else min(means)) if means else None


def _cell(score: TunedTask | None, best: float | None) -> str:
    if score is None:
        return f'<td class="num task">{wording.NONE}</td>'
    title = "" if score.min_dcf is None else f' title="minDCF: {score.min_dcf:.3f}"'
    return f'<td class="num task"{title}>{_spread(score, score.mean == best, "<b>", "</b>")}</td>'


def _spread(score: TunedTask, best: bool, opened: str, closed: str) -> str:
    figure = f"{opened}{wording.percent(score.mean)}{closed}" if best else wording.percent(score.mean)
    return figure if score.sd is None else f"{figure} ± {wording.percent(score.sd)}"
