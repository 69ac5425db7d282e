"""A run in; the tables and paragraphs of the page out, as HTML fragments."""

from html import escape
from io import StringIO
from typing import Any

from ruamel.yaml import YAML

from cache.manifest import SPLITS
from cache.names import PROJECTION, layers_of
from pipeline.report import wording
from pipeline.report.gather import TERMS, Model, Run, Student
from pipeline.report.products import ScoreFile
from pipeline.tasks.labels import TASKS

GROUPS = {"teacher": "Teachers", "student": "Students", "baseline": "Baseline"}


def standfirst(run: Run) -> str:
    """One sentence that says what this run is."""
    groups = [
        wording.spelled(len(run.of_role(role)), role)
        for role in ("teacher", "student", "baseline")
        if run.of_role(role)
    ]
    tasks = wording.listed([TASKS[task].title.lower() for task in run.tasks])
    hours = wording.hours(sum(corpus.hours for corpus in run.corpora))
    return (
        f"{wording.listed(groups)}, each frozen and probed on {tasks}; {hours} of speech from "
        f"{wording.listed([escape(corpus.name) for corpus in run.corpora])}."
    )


def _teachers_of(run: Run, student: Model, teachers: list[Model]) -> list[Model]:
    """Those of the teachers that a student learned from; all, where they are not among them (a mean of several)."""
    names = {name for trained in run.students if trained.name == student.name for name in trained.teachers}
    return [teacher for teacher in teachers if teacher.name in names] or teachers


def headline(run: Run) -> str:
    """Two to four figures a reader should leave with."""
    cells = []
    teachers, students = run.of_role("teacher"), [m for m in run.of_role("student") if not m.untrained]
    sized_teachers = [model for model in teachers if model.num_params]
    sized_students = [model for model in students if model.num_params]
    if sized_teachers and sized_students:
        small = min(sized_students, key=lambda model: model.num_params or 0)
        large = max(_teachers_of(run, small, sized_teachers), key=lambda model: model.num_params or 0)
        ratio = (large.num_params or 0) / (small.num_params or 1)
        cells.append(
            (
                f"{ratio:.1f}×" if ratio < 20 else f"{ratio:.0f}×",
                "fewer parameters",
                f"{escape(small.name)} has {wording.params(small.num_params)}, "
                f"{escape(large.name)} {wording.params(large.num_params)}",
            )
        )
    for task in run.tasks:
        ranked = _ranked(run, task, students)
        if not ranked:
            continue
        model, score = ranked[0]
        taught = _teachers_of(run, model, teachers)
        others = [*_ranked(run, task, taught)[:1], *_ranked(run, task, run.of_role("baseline"))[:1]]
        beside = [f"{escape(other.name)} {wording.percent(its.mean)}" for other, its in others]
        row = TASKS[task]
        if row.higher_is_better:
            beside.append(f"chance {wording.percent(score.chance)}")
        what = row.title.lower() if row.higher_is_better else f"{row.title.lower()}: {row.metric}, lower is better"
        cells.append(
            (f"{wording.percent(score.mean)}<small> %</small>", what,
             f"{escape(model.name)}, the best student; {', '.join(beside)}")
        )  # fmt: skip
    held = [store for store in run.stores if "targets" in store.purposes]
    layers = sum(len(store.layers) for store in held)
    cells.append(
        (
            wording.size(sum(store.bytes for store in held)),
            "of teacher layers on disk",
            f"{wording.plural(layers, 'layer')} of {wording.count(sum(store.rows for store in held))} frames, "
            "read instead of a teacher",
        )
    )
    return "".join(f"<div><b>{figure}</b><span>{what}</span><p>{note}</p></div>" for figure, what, note in cells[:4])


def _ranked(run: Run, task: str, models: list[Model]) -> list[tuple[Model, ScoreFile]]:
    """The models that were probed on a task, best first."""
    found = [(model, run.scores[model.name, task]) for model in models if (model.name, task) in run.scores]
    return sorted(found, key=lambda pair: pair[1].mean, reverse=TASKS[task].higher_is_better)


def results(run: Run) -> str:
    """Models by tasks: the score with its spread over seeds, its 95 % interval as a picture, the learning rate."""
    rows_of = [TASKS[task] for task in run.tasks]
    heads = "".join(f'<th colspan="3" class="task" scope="colgroup">{row.title}</th>' for row in rows_of)
    under = "".join(
        f'<th class="num task">{wording.metric(row.metric, row.higher_is_better)}</th>'
        '<th class="plot">0<i>100</i></th><th class="num lr">lr</th>'
        for row in rows_of
    )
    rows = []
    for role, title in GROUPS.items():
        members = run.of_role(role)
        if members:
            width = 4 + 3 * len(run.tasks)
            plural = title if len(members) == 1 or title.endswith("s") else title + "s"
            singular = plural.removesuffix("s") if len(members) == 1 else plural
            rows.append(f'<tr class="group"><th colspan="{width}" scope="rowgroup">{singular}</th></tr>')
        for model in members:
            note = ' <span class="tag">untrained</span>' if model.untrained else ""
            cells = "".join(_score_cells(run, model, task) for task in run.tasks)
            rows.append(
                f'<tr><th scope="row">{escape(model.name)}{note}</th>'
                f'<td class="num">{model.num_layers}{wording.NARROW}×{wording.NARROW}{model.width}</td>'
                f'<td class="num">{wording.params(model.num_params)}</td>'
                f'<td class="num">{wording.size(model.weight_bytes)}</td>{cells}</tr>'
            )
    rows += [_floor(run, "Chance", "chance"), _floor(run, "One answer for all", "majority")]
    return (
        f'<table class="results{" dense" if len(run.tasks) > 2 else ""}" id="probes"><thead>'
        f"<tr><th></th><th></th><th></th><th></th>{heads}</tr>"
        '<tr><th scope="col">Model</th><th class="num">layers × width</th><th class="num">parameters</th>'
        f'<th class="num">weights</th>{under}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    )


def _score_cells(run: Run, model: Model, task: str) -> str:
    score = run.scores.get((model.name, task))
    if score is None:
        return f'<td class="num task">{wording.NONE}</td><td></td><td></td>'
    best = score.mean == run.best(task)
    figure = f"<b>{wording.percent(score.mean)}</b>" if best else wording.percent(score.mean)
    spread = "" if score.sd is None else f'<span class="sd">±{wording.NARROW}{wording.percent(score.sd)}</span>'
    edge = '<abbr title="the smallest or largest rate tried">*</abbr>' if score.lr_at_edge else ""
    return (
        f'<td class="num task">{figure}{spread}</td><td class="plot">{_interval(score)}</td>'
        f'<td class="num lr">{wording.rate(score.lr)}{edge}</td>'
    )


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


def _floor(run: Run, title: str, field: str) -> str:
    """A row of what can be had without listening."""
    cells = ""
    for task in run.tasks:
        score, row = run.any_score(task), TASKS[task]
        asides = {"chance": f"{len(score.classes)} classes", "majority": ""}
        if not row.higher_is_better:
            asides = {"chance": "saying nothing", "majority": f"{len(score.classes)} {row.field}"}
        aside = asides[field]
        figure = wording.percent(getattr(score, field))
        cells += f'<td class="num task">{figure}<span class="sd"></span></td><td colspan="2" class="aside">{aside}</td>'
    return f'<tr class="floor {field}"><th scope="row">{title}</th><td></td><td></td><td></td>{cells}</tr>'


def protocol(run: Run) -> str:
    """SUPERB-like, not SUPERB: what is the same and what is not."""
    settings = {task: run.any_score(task).params for task in run.tasks}
    steps = sorted({values["steps"] for values in settings.values()})
    rates = sorted({wording.rate(lr) for values in settings.values() for lr in values["lrs"]}, key=float)
    seeds = max(len(values["seeds"]) for values in settings.values())
    pooled = [task for task in run.tasks if TASKS[task].higher_is_better]
    phones = [task for task in run.tasks if not TASKS[task].higher_is_better]
    tests = [f"{wording.count(run.any_score(task).counts['test'])} ({TASKS[task].title.lower()})" for task in pooled]
    intervals = []
    if pooled:
        intervals.append(f"Wilson’s at 95 % for {' and '.join(tests)} test utterances taken as independent")
    if phones:
        count = wording.count(run.any_score(phones[0]).counts["test"])
        intervals.append(f"for {TASKS[phones[0]].metric}, the bootstrap’s over {count} test utterances")
    named = wording.listed([f"{TASKS[task].superb} for {TASKS[task].title.lower()}" for task in run.tasks])
    same = f"Heads and training follow SUPERB ({named}): a softmax-weighted sum of all layers of the frozen model, "
    same += "a linear projection, "
    if pooled:
        same += "the mean over frames, a linear classifier; "
    if phones:
        same += f"{'for phones ' if pooled else ''}a linear classifier of every frame under CTC, greedy answers; "
    same += "Adam without a schedule, the best dev checkpoint, the test split looked at once."
    if pooled:
        same += " The mean over frames is taken before the head, which is the same function because every part of it is linear."
    differences = [
        "<b>Data.</b> The corpora of this run and their splits, not the data sets of SUPERB unless the table below names them; "
        "whole utterances without gain or crop, no silence or unknown class beyond what the corpus labels.",
        f"<b>Learning rate.</b> Chosen per model and task on dev out of {', '.join(rates)}. SUPERB’s numbers are tuned too; "
        "one fixed rate can cost ten points. A * marks a choice at the edge of the sweep.",
        f"<b>Budget.</b> {' and '.join(wording.count(step) for step in steps)} updates a head instead of 30{wording.NARROW}000 to "
        f"200{wording.NARROW}000.",
        f"<b>Seeds.</b> {wording.plural(seeds, 'seed')}, mean ± sample standard deviation; SUPERB reports one run.",
        f"<b>Uncertainty.</b> Intervals are {'; '.join(intervals)}; utterances of one speaker are not independent, so the truth "
        "is wider.",
        "<b>Frames.</b> Exactly what the convolutions give, stored as in the table of stores; s3prl repeats or cuts frames to match "
        "the duration.",
    ]
    return f"<p>{same}</p><ul>{''.join(f'<li>{item}</li>' for item in differences)}</ul>"


def corpora(run: Run) -> str:
    """Per corpus: how much, by whom, for what, and what could not be used."""
    rows = []
    for corpus in run.corpora:
        splits = "".join(f'<td class="num">{wording.count(corpus.splits[split])}</td>' for split in SPLITS)
        tasks = "".join(
            f'<td class="num">{wording.count(corpus.tasks[task]) if task in corpus.tasks else wording.NONE}</td>'
            for task in run.tasks
        )
        rows.append(
            f'<tr><th scope="row">{escape(corpus.name)}</th><td class="num">{wording.count(corpus.utterances)}</td>'
            f'<td class="num">{wording.hours(corpus.hours)}</td><td class="num">{wording.count(corpus.speakers)}</td>'
            f'{splits}{tasks}<td class="num">{wording.count(corpus.quarantined)}</td></tr>'
        )
    heads = "".join(f'<th class="num">{head}</th>' for head in ("utterances", "speech", "speakers", *SPLITS))
    labelled = "".join(f'<th class="num">in {task}</th>' for task in run.tasks)
    return (
        f'<table id="corpora"><thead><tr><th scope="col">Corpus</th>{heads}{labelled}<th class="num">quarantined</th></tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def stores(run: Run) -> str:
    """Per store: what it holds and what it weighs."""
    rows = []
    for store in run.stores:
        numbers = [layers_of(name) for name in store.layers]
        single = [layers[0] for layers in numbers if len(layers) == 1]
        means = [f"mean of {_ranges(list(layers))}" for layers in numbers if len(layers) > 1]
        first = [PROJECTION] * (PROJECTION in store.layers)
        layers = ", ".join(first + [_ranges(single)] * bool(single) + means) or wording.NONE
        unit = "samples" if "waveforms" in store.purposes else "frames"
        rows.append(
            f'<tr><th scope="row">{escape(store.name)}</th><td>{" and ".join(store.purposes)}</td><td class="num">{layers}</td>'
            f'<td class="num">{store.width or wording.NONE}</td><td>{escape(store.codec)}</td>'
            f'<td class="num">{wording.count(store.utterances)}</td><td class="num">{wording.count(store.rows)} {unit}</td>'
            f'<td class="num">{wording.size(store.bytes)}</td><td class="num">{wording.count(store.shards)}</td>'
            f"<td><code>{escape(store.key[:12])}</code></td></tr>"
        )
    return (
        '<table id="stores"><thead><tr><th scope="col">Store</th><th>holds</th><th class="num">layers</th><th class="num">width</th>'
        '<th>codec</th><th class="num">utterances</th><th class="num">rows</th><th class="num">on disk</th><th class="num">shards</th>'
        f"<th>key</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )


def _ranges(numbers: list[int]) -> str:
    """0–4, 8."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


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
    return _ranges(layers) if layers else escape(arrays)


def _in_order(column: str) -> tuple[int, int, str]:
    """projection before layers, layers by number, before the means that begin with them."""
    first = column.replace("–", ",").split(",")[0]
    return (int(first), len(column), column) if first.isdigit() else (-1, 0, column)


def settings(run: Run) -> str:
    """Everything that was typed, as the products carry it."""
    blocks = []
    for student in run.students:
        kept = {key: value for key, value in student.facts.items() if key not in ("format", "kind")}
        blocks.append((f"student {student.name}", kept))
    for task in run.tasks:
        blocks.append((f"probe {task}", run.any_score(task).params))
    return "".join(
        f"<details><summary>{escape(title)}</summary><pre>{escape(_yaml(values))}</pre></details>"
        for title, values in blocks
    )


def _yaml(values: dict[str, object]) -> str:
    """Settings as a person would type them."""
    writer: Any = YAML(typ="safe", pure=True)
    writer.default_flow_style, writer.width, writer.sort_base_mapping_type_on_output = None, 100, False
    text = StringIO()
    writer.dump(values, text)
    return text.getvalue()
