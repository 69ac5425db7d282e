"""A run in; the one table of models, what they cost and how well they do out, and beside it how sure that is.

The best score of a task is bold and in the colour of the page, the best of a group bold.
"""

from html import escape

from pipeline.report import wording
from pipeline.report.products import ScoreFile
from pipeline.report.run import Model, Run
from pipeline.tasks.labels import TASKS

GROUPS = {"teacher": "Teachers", "student": "Students", "baseline": "Baseline"}


def table(run: Run) -> str:
    """Models by what they cost and by tasks: mean and standard deviation over seeds."""
    costs = [("parameters", ""), ("on disk", "bytes of its weights")]
    if run.profile is not None:
        costs += [("MACs", "multiply-accumulates per second of audio"), ("ms/s", "real-time factor × 1000")]
    over = "".join(
        f'<th class="num task"><abbr title="{TASKS[task].title}">{TASKS[task].superb}</abbr></th>' for task in run.tasks
    )
    under = "".join(
        f'<th class="num task">{wording.metric(TASKS[task].metric, TASKS[task].higher_is_better)}</th>'
        for task in run.tasks
    )
    score = "" if run.superb is None else '<th class="num task">score</th>'
    width = 1 + len(costs) + len(run.tasks) + (run.superb is not None)
    rows = []
    for role, title in GROUPS.items():
        members = run.of_role(role)
        rows += [_group(title, len(members), width)] if members else []
        rows += [_row(run, model) for model in members]
    rows += [_floor(run, "Chance", "chance", len(costs)), _floor(run, "One answer for all", "majority", len(costs))]
    heads = "".join(f'<th class="num"><abbr title="{what}">{name}</abbr></th>' for name, what in costs)
    return (
        f'<table class="results{" dense" if len(run.tasks) > 3 else ""}" id="probes"><thead>'
        f"<tr><th></th>{'<th></th>' * len(costs)}{over}{'<th></th>' if score else ''}</tr>"
        f'<tr><th scope="col">Model</th>{heads}{under}{score}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def note(run: Run) -> str:
    """What stands in the table, in a paragraph under it."""
    said = ["Test scores in per cent, mean ± standard deviation over seeds; bold: the best of a group, wine: of all."]
    said.append(wording.listed([f"{TASKS[task].superb} is {TASKS[task].title.lower()}" for task in run.tasks]) + ".")
    if any(not TASKS[task].higher_is_better for task in run.tasks):
        said.append("↓: an error rate, lower is better.")
    if run.profile is not None:
        seconds = max(cost.seconds for one in run.profile.models.values() for cost in one.costs)
        threads = wording.spelled(int(run.profile.params["threads"]), "thread")
        machine = run.profile.machine
        said.append(
            f"MACs: multiply-accumulates per second of audio; ms/s: milliseconds of computing per second of audio, one "
            f"utterance of {seconds:g}{wording.NARROW}s at a time on {threads} of {escape(str(machine['cpu']))} "
            f"(torch {escape(str(machine['torch']))}), median of {run.profile.params['rounds']} rounds in which all models "
            "took turns."
        )
    if run.superb is not None:
        said.append(superb_sentence(run))
    return f'<p class="note" style="margin-top:18px">{" ".join(said)}</p>'


def superb_sentence(run: Run) -> str:
    """What the score is a score of: the tasks, the zero and the thousand."""
    assert run.superb is not None
    found = run.superb
    counted = [TASKS[task].superb for task in found.points]
    if not counted:
        text = "Score: none,"
    else:
        text = (
            f"Score: SUPERB’s formula over {wording.listed(counted)}, where {escape(found.zero)} has 0 and "
            f"{found.thousand} 1000; SUPERB-like, and not comparable with the leaderboard"
        )
    for why in dict.fromkeys(found.left_out.values()):
        names = [TASKS[task].superb for task, reason in found.left_out.items() if reason == why]
        text += f"; without {wording.listed(names)}, where {escape(why)}"
    return f"{text}."


def certainty(run: Run) -> str:
    """Models by tasks: the 95 % interval of each score as a picture, and the learning rate chosen on dev."""
    heads = "".join(f'<th colspan="2" class="task" scope="colgroup">{TASKS[task].superb}</th>' for task in run.tasks)
    under = '<th class="plot">0<i>100</i></th><th class="num lr">lr</th>' * len(run.tasks)
    rows = []
    for role, title in GROUPS.items():
        members = run.of_role(role)
        rows += [_group(title, len(members), 2 + 2 * len(run.tasks))] if members else []
        for model in members:
            cells = "".join(_certainty_cells(run, model, task) for task in run.tasks)
            layers = f"{model.num_layers}{wording.NARROW}×{wording.NARROW}{model.width}"
            rows.append(f'<tr>{_name(model)}<td class="num">{layers}</td>{cells}</tr>')
    return (
        f'<table class="results{" dense" if len(run.tasks) > 3 else ""}" id="certainty"><thead>'
        f'<tr><th></th><th></th>{heads}</tr><tr><th scope="col">Model</th><th class="num">layers × width</th>{under}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _row(run: Run, model: Model) -> str:
    cells = [wording.params(model.num_params), wording.size(model.weight_bytes)]
    titles = ["", ""]
    if run.profile is not None:
        cost = run.cost(model.name)
        cells += [wording.NONE if cost is None else wording.params(round(cost.macs_per_second))]
        cells += [wording.NONE if cost is None else wording.significant(1000 * cost.rtf.median)]
        quartiles = "" if cost is None else f"quartiles {1000 * cost.rtf.low:.3g} and {1000 * cost.rtf.high:.3g} ms"
        titles += ["", quartiles]
    costs = "".join(
        f'<td class="num"{f" title={chr(34)}{title}{chr(34)}" if title else ""}>{cell}</td>'
        for cell, title in zip(cells, titles, strict=True)
    )
    scores = "".join(_score_cell(run, model, task) for task in run.tasks)
    if run.superb is not None:
        found = run.superb.scores.get(model.name)
        scores += f'<td class="num task">{wording.NONE if found is None else wording.points(found)}</td>'
    return f"<tr>{_name(model)}{costs}{scores}</tr>"


def _score_cell(run: Run, model: Model, task: str) -> str:
    score = run.scores.get((model.name, task))
    if score is None:
        return f'<td class="num task">{wording.NONE}</td>'
    figure = wording.percent(score.mean)
    if score.mean == run.best(task):
        figure = f"<b>{figure}</b>"
    elif score.mean == run.best_of(task, model.role):
        figure = f"<strong>{figure}</strong>"
    spread = "" if score.sd is None else f'<span class="sd">±{wording.NARROW}{wording.percent(score.sd)}</span>'
    title = "".join(f' title="{name} {value}"' for name, value in beside(score))
    return f'<td class="num task"{title}>{figure}{spread}</td>'


def beside(score: ScoreFile) -> list[tuple[str, str]]:
    """The second figure of a task, which a page shows under the pointer: name and value."""
    if score.cer is not None:
        return [("CER, %:", wording.percent(score.cer))]
    return [(f"minDCF at {cost.p_target:g}:", f"{cost.mean:.3f}") for cost in score.min_dcf[:1]]


def _name(model: Model) -> str:
    note = ' <span class="tag">untrained</span>' if model.untrained else ""
    return f'<th scope="row">{escape(model.name)}{note}</th>'


def _group(title: str, members: int, width: int) -> str:
    plural = title if members == 1 or title.endswith("s") else title + "s"
    singular = plural.removesuffix("s") if members == 1 else plural
    return f'<tr class="group"><th colspan="{width}" scope="rowgroup">{singular}</th></tr>'


def _certainty_cells(run: Run, model: Model, task: str) -> str:
    score = run.scores.get((model.name, task))
    if score is None:
        return "<td></td><td></td>"
    edge = '<abbr title="the smallest or largest rate tried">*</abbr>' if score.lr_at_edge else ""
    return f'<td class="plot">{_interval(score)}</td><td class="num lr">{wording.rate(score.lr)}{edge}</td>'


def _interval(score: ScoreFile) -> str:
    """A dot for the mean, a bar for the 95 % interval, a tick for what needs no listening, on an axis from 0 to 100 %.

    An error rate can be more than 100 %: its picture ends there, its words do not.
    """
    low, high = (100 * bound for bound in score.interval)
    floor, name = (score.chance, "chance") if TASKS[score.task].higher_is_better else (score.majority, "not listening")
    words = f"95 % interval {low:.1f} to {high:.1f}, {name} {wording.percent(floor)}"
    left, right, dot, tick = (min(place, 100.0) for place in (low, high, 100 * score.mean, 100 * floor))
    return (
        f'<svg viewBox="-3 0 106 14" role="img" aria-label="{words}"><title>{words}</title>'
        f'<path class="axis" d="M0 7 H100"/><path class="tick" d="M{tick:.2f} 3.5 V10.5"/>'
        f'<path class="bar" d="M{left:.2f} 7 H{right:.2f}"/><circle cx="{dot:.2f}" cy="7" r="2"/></svg>'
    )


def _floor(run: Run, title: str, field: str, costs: int) -> str:
    """A row of what can be had without listening."""
    cells = ""
    for task in run.tasks:
        score = run.any_score(task)
        what = f"{len(score.classes)} classes" if TASKS[task].higher_is_better else ""
        hint = f' title="{what}"' if what and field == "chance" else ""
        cells += f'<td class="num task"{hint}>{wording.percent(getattr(score, field))}<span class="sd"></span></td>'
    last = "" if run.superb is None else "<td></td>"
    return f'<tr class="floor {field}"><th scope="row">{title}</th>{"<td></td>" * costs}{cells}{last}</tr>'
