"""A run in; how its students were trained and where that ended out, as HTML fragments."""

from html import escape

from cache.names import layers_of
from pipeline.report import wording
from pipeline.report.run import TERMS, Run, Student


def losses(run: Run) -> str:
    """Per student: what it learned from, how long it trained, what pruning left of it, where it ended on dev."""
    terms = [term for term in TERMS if term != "l2" or any("l2" in (s.metrics.dev or {}) for s in run.students)]
    names = {"l1": "L1", "l2": "L2", "cosine": "cosine", "total": "total"}
    rows = []
    for student in run.students:
        dev = student.metrics.dev or {}
        figures = "".join(
            f'<td class="num">{wording.NONE if dev.get(name) is None else wording.loss(dev[name], 4)}</td>'
            for name in terms
        )
        size = wording.params(student.metrics.parameters["student"])
        if student.unpruned is not None:
            size = f"{wording.params(student.unpruned)} → {size}"
        rows.append(
            f'<tr><th scope="row">{escape(student.name)}</th><td>{escape(_learned_from(student))}</td>'
            f'<td class="num">{_steps(student)}</td><td class="num">{size}</td>'
            f'<td class="num">{wording.params(student.metrics.parameters.get("heads"))}</td>{figures}</tr>'
        )
    heads = "".join(f'<th class="num">dev {names[term]}</th>' for term in terms)
    return (
        '<table id="students"><thead><tr><th scope="col">Student</th><th>learned from</th><th class="num">steps</th>'
        f'<th class="num">parameters</th><th class="num">of its heads</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _learned_from(student: Student) -> str:
    """hubert, robust and wavlm (average)."""
    kind = str(student.facts.get("settings", {}).get("ensemble", {}).get("kind", "single"))
    names = wording.listed(list(student.teachers)) if student.teachers else wording.NONE
    return names if kind == "single" else f"{names} ({kind})"


def _steps(student: Student) -> str:
    """250, or the steps of both phases: 200 + 80."""
    steps, first = student.metrics.steps, student.pruned_at
    return wording.count(steps) if first is None else f"{wording.count(first)} + {wording.count(steps - first)}"


def target_losses(run: Run) -> str:
    """Per student and teacher: the loss of every target on dev. Nothing where no student has more than one."""
    rows_of: dict[tuple[str, str], dict[str, float]] = {}
    for student in run.students:
        for target, loss in student.target_losses.items() if student.metrics.steps else ():
            teacher, _, arrays = target.rpartition(".")
            rows_of.setdefault((student.name, teacher), {})[_target_name(arrays)] = loss
    if all(len(row) < 2 for row in rows_of.values()):
        return ""
    columns = sorted({name for row in rows_of.values() for name in row}, key=_in_order)
    rows = []
    for (name, teacher), row in rows_of.items():
        cells = "".join(f'<td class="num">{wording.loss(row[c]) if c in row else ""}</td>' for c in columns)
        what = escape(teacher.replace("+", " + "))
        rows.append(f'<tr><th scope="row">{escape(name)}</th><td>{what}</td>{cells}</tr>')
    heads = "".join(f'<th class="num">{column}</th>' for column in columns)
    return (
        f'<table id="targets"><thead><tr><th scope="col">Student</th><th>target of</th>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _target_name(arrays: str) -> str:
    """projection; 4; of a mean of layers 1–3."""
    layers = sorted({layer for array in arrays.split("+") for layer in layers_of(array)})
    return wording.ranges(layers) if layers else escape(arrays)


def _in_order(column: str) -> tuple[int, int, str]:
    """projection before layers, layers by number, before the means that begin with them."""
    first = column.replace("–", ",").split(",")[0]
    return (int(first), len(column), column) if first.isdigit() else (-1, 0, column)
