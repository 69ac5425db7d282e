"""A run in; the tables and paragraphs of the page out, as HTML fragments."""

from html import escape
from io import StringIO
from typing import Any

from ruamel.yaml import YAML

from cache.manifest import SPLITS
from cache.names import PROJECTION, layers_of
from pipeline.report import wording
from pipeline.report.products import ScoreFile
from pipeline.report.run import Model, Run
from pipeline.tasks.labels import TASKS

HEADLINES = ("kws", "sv", "pr", "asr", "sid", "er")
"""Tasks that a reader should hear of first."""


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
    for task in sorted(run.tasks, key=(*HEADLINES, *run.tasks).index):
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


HEADS = {
    "pr": "a linear layer and a linear classifier of every frame under CTC, greedy answers.",
    "asr": "a linear layer, bidirectional LSTMs and characters under CTC, greedy answers without a language model.",
    "kws": "a linear layer, the mean over frames, a linear classifier.",
    "sid": "the same as KS.",
    "er": "the same as KS, in folds where a corpus has them.",
    "sv": "a linear layer, an x-vector, additive-margin softmax over training speakers, cosine of two utterances; AdamW.",
}


def protocol(run: Run) -> str:
    """SUPERB-like, not SUPERB: what is the same and what is not."""
    settings = {task: run.any_score(task).params for task in run.tasks}
    steps = sorted({values["steps"] for values in settings.values()})
    rates = sorted({wording.rate(lr) for values in settings.values() for lr in values["lrs"]}, key=float)
    seeds = max(len(values["seeds"]) for values in settings.values())
    heads = " ".join(f"{TASKS[task].superb}: {HEADS[task]}" for task in run.tasks if task in HEADS)
    same = (
        "Heads and training follow SUPERB: a softmax-weighted sum of all layers of the frozen model, then "
        f"a head of the task. {heads} Adam without a schedule, the best dev checkpoint, the test split looked at once."
    )
    if any(TASKS[task].higher_is_better for task in run.tasks):
        same += " The mean over frames is taken before the head, which is the same function because every part of it is linear."
    few = {"asr", "sv"} & set(run.tasks)
    differences = [
        "<b>Data.</b> The corpora of this run and their splits, not the data sets of SUPERB unless the table below names them; "
        "whole utterances without gain or crop, no silence or unknown class beyond what the corpus labels.",
        f"<b>Learning rate.</b> Chosen per model and task on dev out of {', '.join(rates)}"
        + (
            f"; for {' and '.join(TASKS[t].superb for t in run.tasks if t in few)} with the first seed. "
            if few
            else ". "
        )
        + "SUPERB’s numbers are tuned too; one fixed rate can cost ten points. A * marks a choice at the edge of the sweep.",
        f"<b>Budget.</b> {wording.listed([wording.count(step) for step in steps])} updates a head instead of "
        f"30{wording.NARROW}000 to 200{wording.NARROW}000.",
        f"<b>Seeds.</b> {wording.plural(seeds, 'seed')}, mean ± sample standard deviation; SUPERB reports one run.",
        f"<b>Uncertainty.</b> {_intervals(run)}",
        "<b>Frames.</b> Exactly what the convolutions give, stored as in the table of stores; s3prl repeats or cuts frames to match "
        "the duration.",
    ]
    if "asr" in run.tasks:
        differences.append(
            "<b>Recognition.</b> SpecAugment on the weighted sum, where it is on, without time warp; batches are drawn from all "
            "utterances, not from buckets of like lengths."
        )
    if "sv" in run.tasks:
        differences.append(
            "<b>Verification.</b> Checkpoint and learning rate are chosen on trials of dev speakers; SUPERB has none and "
            "reports the best error on test."
        )
    return f"<p>{same}</p><ul>{''.join(f'<li>{item}</li>' for item in differences)}</ul>"


def _intervals(run: Run) -> str:
    """How the intervals of each kind of score came about."""
    tests = {task: wording.count(run.any_score(task).counts["test"]) for task in run.tasks}
    shares = [task for task in run.tasks if TASKS[task].higher_is_better]
    edits = [task for task in run.tasks if task in ("pr", "asr")]
    said = []
    if shares:
        of = wording.listed([f"{tests[task]} ({TASKS[task].title.lower()})" for task in shares])
        said.append(f"Wilson’s at 95 % for {of} test utterances taken as independent")
    if edits:
        of = wording.listed([f"{TASKS[task].metric} over {tests[task]} test utterances" for task in edits])
        said.append(f"the bootstrap’s for {of}")
    if "sv" in run.tasks:
        said.append(f"the bootstrap’s for {TASKS['sv'].metric} over test speakers")
    but = f"Except for {TASKS['sv'].metric}, utterances" if "sv" in run.tasks else "Utterances"
    return f"Intervals are {'; '.join(said)}. {but} of one speaker are not independent, so the truth is wider."


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
        means = [f"mean of {wording.ranges(list(layers))}" for layers in numbers if len(layers) > 1]
        first = [PROJECTION] * (PROJECTION in store.layers)
        layers = ", ".join(first + [wording.ranges(single)] * bool(single) + means) or wording.NONE
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
