"""A run in; the pipeline as a drawing with its real counts out, inline SVG.

Seven stations on one line, from corpus to report. A dashed rule stands where the halves meet: left of it a teacher runs
once, right of it students learn from the disk and no teacher is there any more.
"""

from html import escape
from typing import NamedTuple

from pipeline.report import wording
from pipeline.report.run import Run

STEP, LEFT, LINE = 141, 8, 104
"""Distance of stations, x of the first, y of the line they stand on."""
WIDTH, HEIGHT = LEFT + 7 * STEP, LINE + 124
WIDEST = 23
"""Characters of a detail that fit between two stations."""


class Station(NamedTuple):
    """A stage and what it made."""

    name: str
    figure: str
    details: list[str]


def stations(run: Run) -> list[Station]:
    """The seven stages with the counts of this run."""
    targets = [store for store in run.stores if "targets" in store.purposes]
    teachers = [store.name for store in targets]
    layers = sum(len(store.layers) for store in targets)
    codecs = sorted({store.codec for store in targets})
    rates = {len(score.params["lrs"]) for score in run.scores.values()}
    seeds = {len(score.params["seeds"]) for score in run.scores.values()}
    speakers = sum(corpus.speakers for corpus in run.corpora)
    probed = [model for model in run.models if model.role == "teacher" and model.num_params]
    return [
        Station(
            "corpus",
            wording.hours(sum(corpus.hours for corpus in run.corpora)),
            [
                wording.plural(sum(corpus.utterances for corpus in run.corpora), "utterance"),
                wording.plural(speakers, "speaker"),
                *_some([corpus.name for corpus in run.corpora]),
            ],
        ),
        Station(
            "teacher",
            wording.plural(len(teachers), "teacher"),
            [
                *_some(teachers),
                *([f"{wording.params(max(m.num_params or 0 for m in probed))} parameters"] if probed else []),
                "run once",
            ],
        ),
        Station(
            "store",
            wording.size(sum(store.bytes for store in targets)),
            [
                f"{wording.plural(layers, 'layer')}, {' and '.join(codecs)}",
                f"{wording.count(sum(store.rows for store in targets))} frames",
                wording.plural(sum(store.shards for store in targets), "shard"),
            ],
        ),
        Station(
            "targets",
            wording.plural(len(run.students), "set"),
            _some([f"{s.name}, {wording.plural(s.num_targets, 'layer')}" for s in run.students]),
        ),
        Station(
            "student",
            wording.plural(len(run.students), "student"),
            _some([f"{s.name}, {wording.params(s.metrics.parameters['student'])}" for s in run.students]),
        ),
        Station(
            "probe",
            wording.plural(len(run.scores), "score"),
            [
                f"{wording.plural(len(run.models), 'model')} × {wording.plural(len(run.tasks), 'task')}",
                f"{_one(seeds)} seeds × {_one(rates)} rates",
            ],
        ),
        Station("report", "1 page", ["and its CSV, JSON", "and PNG beside it"]),
    ]


def pipeline_svg(run: Run) -> str:
    """The drawing."""
    parts = [
        f'<svg class="pipeline" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="The pipeline: corpus, teacher, '
        'store, targets, student, probe, report, with the counts of this run">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0.8 L7 4 L0 7.2" fill="none" stroke="context-stroke"/></marker></defs>',
        _branch(0, 4, 58, "waveforms"),
        _branch(0, 5, 24, "labels"),
        _meeting_point(),
    ]
    for number, station in enumerate(stations(run)):
        x = LEFT + number * STEP
        if number < 6:
            parts.append(f'<path class="flow" d="M{x + 9} {LINE} H{x + STEP - 9}" marker-end="url(#tip)"/>')
        parts.append(f'<circle class="station{" ours" if number == 4 else ""}" cx="{x}" cy="{LINE}" r="4.5"/>')
        parts.append(f'<text class="stage" x="{x - 4}" y="{LINE + 32}">{station.name}</text>')
        parts.append(f'<text class="figure" x="{x - 4}" y="{LINE + 60}">{escape(station.figure)}</text>')
        for line, detail in enumerate(station.details[:3]):
            parts.append(f'<text class="detail" x="{x - 4}" y="{LINE + 82 + 17 * line}">{escape(_fit(detail))}</text>')
    return "\n".join([*parts, "</svg>"])


def _branch(start: int, end: int, height: int, label: str) -> str:
    """What a later stage reads besides the stage before it: up, along, down."""
    x, to, r = LEFT + start * STEP, LEFT + end * STEP, 8
    path = f"M{x} {LINE - 9} V{height + r} q0 {-r} {r} {-r} H{to - r} q{r} 0 {r} {r} V{LINE - 9}"
    text = f'<text class="branch" x="{x + 2 * r}" y="{height - 6}">{label}</text>'
    return f'<path class="side" d="{path}" marker-end="url(#tip)"/>{text}'


def _meeting_point() -> str:
    x = LEFT + 2.5 * STEP
    return (
        f'<path class="meeting" d="M{x} {LINE - 30} V{LINE + 14}"/>'
        f'<text class="half" x="{x - 9}" y="{LINE - 18}" text-anchor="end">once, with a teacher</text>'
        f'<text class="half" x="{x + 9}" y="{LINE - 18}">many times, without</text>'
    )


def _some(names: list[str]) -> list[str]:
    """At most three lines."""
    return names if len(names) <= 3 else [*names[:2], f"and {len(names) - 2} more"]


def _fit(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


def _one(numbers: set[int]) -> str:
    """The number all probes share, or their range."""
    return str(min(numbers)) if len(numbers) == 1 else f"{min(numbers)}–{max(numbers)}"
