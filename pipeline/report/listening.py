"""A run and its waveforms in; its worst errors out, each with a player: clips inside the page, no file beside it.

MP3, because every browser plays it and its encoder gives the same bytes each time (Ogg numbers its streams at random).
"""

import base64
import io
from collections.abc import Callable, Sequence
from html import escape
from typing import Annotated, Literal, NamedTuple

import numpy as np
import soundfile
from jaxtyping import Int16
from pydantic import BaseModel, Field

from cache.errors import SettingsError
from cache.frames import RATE_HZ
from pipeline.report import wording
from pipeline.report.products import MissFile
from pipeline.report.run import Run
from pipeline.tasks.labels import TASKS
from pipeline.tasks.score import MISSES

QUALITY = 0.7
"""Of the encoder, 0 the largest and 1 the smallest files: about 3 kB a second of speech."""


class BestStudent(BaseModel, frozen=True, extra="forbid"):
    """The student with the highest score; without a score, the first of the table."""

    kind: Literal["best"]


class Named(BaseModel, frozen=True, extra="forbid"):
    """A model of this run."""

    kind: Literal["model"]
    model: str


class ListenParams(BaseModel, frozen=True, extra="forbid"):
    """Whose worst errors can be listened to, and how many."""

    model: Annotated[BestStudent | Named, Field(discriminator="kind")]
    """{kind: best}: the best student, or {kind: model, model: NAME}."""
    each: int = Field(ge=1, le=MISSES)
    """Errors of each task."""
    max_sec: float = Field(gt=0, le=20)
    """Longer recordings are played up to here; all together are a megabyte or two."""


class Clip(NamedTuple):
    """One recording, as a page carries it."""

    utterance: str
    data: str
    """A data: URL."""
    seconds: float
    """Of the recording."""
    played: float


class Heard(NamedTuple):
    """The worst errors of one model, with what was said."""

    model: str
    misses: dict[str, list[tuple[MissFile, list[Clip]]]]
    """By task, the worst first."""


def worst_errors(run: Run, read: Callable[[str], Int16[np.ndarray, " S"]], params: ListenParams) -> Heard:
    """Make clips of a model's worst errors; `read` gives the waveform of an utterance.

    Raises:
        SettingsError: the model was not probed.
    """
    name = chosen(run, params)
    made: dict[str, Clip] = {}
    misses = {}
    for task in run.tasks:
        score = run.scores.get((name, task))
        told = [] if score is None else score.misses[: params.each]
        for utterance in {utterance for miss in told for utterance in miss.ids} - made.keys():
            made[utterance] = clip(utterance, read(utterance), params.max_sec)
        misses[task] = [(miss, [made[utterance] for utterance in miss.ids]) for miss in told]
    return Heard(name, misses)


def chosen(run: Run, params: ListenParams) -> str:
    """The model whose errors are told."""
    if isinstance(params.model, Named):
        if params.model.model not in {model.name for model in run.models}:
            raise SettingsError(
                f"report.listen.model.model is '{params.model.model}', which was not probed; choose one of "
                f"{', '.join(model.name for model in run.models)}"
            )
        return params.model.model
    students = [m.name for m in run.of_role("student") if not m.untrained] or [m.name for m in run.models]
    scores = run.superb.scores if run.superb is not None else {}
    return max(students, key=lambda name: scores.get(name, -np.inf))


def clip(utterance: str, wave: Int16[np.ndarray, " S"], max_sec: float) -> Clip:
    """A recording as MP3 in a data: URL."""
    part = wave[: round(max_sec * RATE_HZ)]
    file = io.BytesIO()
    soundfile.write(
        file, part, RATE_HZ, format="MP3", subtype="MPEG_LAYER_III", compression_level=QUALITY, bitrate_mode="VARIABLE"
    )
    data = base64.b64encode(file.getvalue()).decode("ascii")
    return Clip(utterance, f"data:audio/mpeg;base64,{data}", len(wave) / RATE_HZ, len(part) / RATE_HZ)


def section(run: Run, heard: Heard) -> str:
    """A list of errors for each task, with players."""
    parts = []
    for task, misses in heard.misses.items():
        title = f"<h3>{TASKS[task].title}</h3>"
        if misses:
            parts.append(f'{title}<ol class="misses">{"".join(_item(task, *pair) for pair in misses)}</ol>')
        elif (heard.model, task) in run.scores:
            parts.append(f"{title}<p>No error on test.</p>")
    note = (
        f'<p class="note">What the first seed’s head on {escape(heard.model)} answered most wrongly on test: of classes, those '
        "that were surest of another one; of strings, those with most edits for their length; of trials, those farthest on the "
        "wrong side of the threshold where both kinds of error are as frequent.</p>"
    )
    return note + "".join(parts)


def _item(task: str, miss: MissFile, clips: Sequence[Clip]) -> str:
    players = "".join(_player(one) for one in clips)
    words = "".join(
        f"<span><i>{label}</i> {escape(text) or wording.NONE}</span>"
        for label, text in (("said", miss.truth), ("heard", miss.answer))
    )
    if task == "sv":
        words = words.replace("<i>said</i>", "<i>are</i>").replace("<i>heard</i>", "<i>taken for</i>")
    elif task in ("sid", "er"):
        words = words.replace("<i>said</i>", "<i>is</i>").replace("<i>heard</i>", "<i>taken for</i>")
    return f'<li><div class="players">{players}</div><div class="words">{words}</div></li>'


def _player(one: Clip) -> str:
    cut = f", the first {one.played:.1f} s of {one.seconds:.1f}" if one.played < one.seconds else ""
    name = escape(one.utterance)
    return (
        f'<figure class="clip"><audio controls preload="metadata" aria-label="{name}{cut}" src="{one.data}"></audio>'
        f"<figcaption>{name}{cut}</figcaption></figure>"
    )
