"""A run in; one self-contained HTML page out.

No script, no request: the style is inline, figures are SVG, clips are inside, and the page's own policy forbids anything
else. It says nothing about when it was made, so the same products give the same bytes.
"""

from html import escape

from pipeline.report import drawing, figures, finetuned, layers, listening, pareto, results, sections, training, wording
from pipeline.report.listening import Heard
from pipeline.report.run import Run
from pipeline.report.style import CSS
from pipeline.tasks.labels import TASKS


def html(run: Run, heard: Heard | None = None) -> str:
    """The page; with players, where the worst errors are handed over."""
    weights = figures.svg(figures.layer_weights(run), "weights", "Learned layer weights of every model and task")
    tasks = wording.listed([TASKS[task].title.lower() for task in run.tasks])
    body = [
        f'<header><h1>Decant</h1><p class="standfirst">{sections.standfirst(run)}</p></header>',
        f'<div class="headline">{sections.headline(run)}</div>',
        _section(
            "How the numbers came about",
            f'<figure class="scroll">{drawing.pipeline_svg(run)}</figure>',
        ),
        _section("Models", f'<div class="scroll">{results.table(run)}</div>', results.note(run)),
        _section("Quality against cost", *_pareto(run)),
        *_finetuned(run),
        _section(
            "How sure that is",
            f'<div class="scroll">{results.certainty(run)}</div>',
            '<p class="note" style="margin-top:18px">Dot and bar: mean and 95 % interval in per cent; tick: what needs no '
            "listening. lr: the learning rate chosen on dev. Layers are counted with layer 0, the input of the first block.</p>",
        ),
        _section("SUPERB-like, not SUPERB", sections.protocol(run)),
        _section(
            "What the probes listen to",
            f'<figure class="scroll">{weights}<figcaption>Softmax weights of the layers, mean over seeds at the chosen learning rate, '
            f"for {tasks}. A row sums to one.</figcaption></figure>",
        ),
        *([] if heard is None else [_section("Worst errors", listening.section(run, heard))]),
        *_distilled(run),
        *_similarities(run),
        _section("Corpora", f'<div class="scroll">{sections.corpora(run)}</div>'),
        _section("Stores", f'<div class="scroll">{sections.stores(run)}</div>'),
        _section("Settings", sections.settings(run)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; media-src data:\">\n"
        f"<title>Decant: report</title>\n<style>\n{CSS}</style>\n</head>\n"
        f"<body>\n<main>\n{chr(10).join(body)}\n</main>\n</body>\n</html>\n"
    )


def _distilled(run: Run) -> list[str]:
    """How students learned; nothing where every model came from elsewhere."""
    if not run.students:
        return []
    curves = figures.svg(figures.curves(run.students), "curves", "Training and dev loss of every student")
    pruned = ""
    if any(student.pruned_at is not None for student in run.students):
        pruned = (
            " Dashes: where a student was pruned and its second phase begins; dots, from 0 at the foot to 100 % at the head: "
            "the share of its parameters that its gates were expected to remove. Losses on both sides are of other models."
        )
    return [
        _section(
            "Distillation",
            f'<figure class="scroll">{curves}<figcaption>Total loss, L1 and cosine. Grey: train; wine: dev. '
            f"The vertical range leaves out the first steps; the heads are dropped after distillation.{pruned}"
            "</figcaption></figure>",
            f'<div class="scroll" style="margin-top:28px">{training.losses(run)}</div>',
            *_targets(run),
        )
    ]


def _pareto(run: Run) -> list[str]:
    """A figure for each kind of cost."""
    what = {"size": "Quality against parameters", "macs": "Quality against MACs", "speed": "Quality against time"}
    parts = []
    for axis in pareto.axes_of(run):
        drawn = figures.svg(pareto.plot(run, axis), f"pareto-{axis.name}", what[axis.name])
        parts.append(f'<figure class="scroll pareto">{drawn}</figure>')
    note = (
        '<p class="note" style="margin-top:18px">Better is up, cheaper is left. Squares: teachers; circles: students; wine: '
        "those than which none is both cheaper and better, joined by a line; dashes: the best baseline, which has no weights. "
        "With a triangle: beyond the panel.</p>"
    )
    return [*parts, note]


def _finetuned(run: Run) -> list[str]:
    """The table of fine-tuned models; no section where there are none."""
    if not run.tuned:
        return []
    note = (
        '<p class="note" style="margin-top:18px">One encoder for both tasks, trained end to end, or heads alone on an encoder '
        "that stays as it is; test scores, mean ± standard deviation over seeds. MACs and ms/s as above, of the encoder.</p>"
    )
    return [_section("Fine-tuned", f'<div class="scroll">{finetuned.table(run)}</div>', note)]


def _targets(run: Run) -> list[str]:
    """The loss of each target; nothing where students have one."""
    table = training.target_losses(run)
    if not table:
        return []
    note = "Loss on dev, target by target, at the last validation: which layers of its teachers a student finds hard."
    return [
        f'<div class="scroll" style="margin-top:28px">{table}</div><p class="note" style="margin-top:18px">{note}</p>'
    ]


def _similarities(run: Run) -> list[str]:
    """Heat maps of the layers of each teacher; no section where none were compared."""
    if not run.similarities:
        return []
    maps = []
    for n, found in enumerate(run.similarities):
        drawn = figures.svg(layers.heat_map_of(found), f"layers-{n}", f"Layers of {escape(found.teacher)}")
        maps.append(f'<figure class="scroll">{drawn}</figure>')
    note = (
        '<p class="note">How alike the layers of each teacher are, over a sample of frames, and in which order they join when '
        "similar ones are put together: what groups of layers (SKILL) are made of.</p>"
    )
    return [_section("Layers of the teachers", *maps, note)]


def _section(title: str, *parts: str) -> str:
    return f"<section>\n<h2>{title}</h2>\n{chr(10).join(parts)}\n</section>"
