"""What a corpus gives and `prepare` takes: one recording, where it is or what it sounds like, and its labels."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from pipeline.audio import Decoded, Part, Quarantine


class Declared(NamedTuple):
    """What a list says of a file; a file that is otherwise is quarantined."""

    rate_hz: int
    file_samples: int


@dataclass(frozen=True, slots=True)
class Item:
    """One recording of a corpus, before it is decoded."""

    id: str
    """Begins with the name of the corpus and a slash; unique over all corpora."""
    corpus: str
    path: str
    """Relative to the root of the corpus, with forward slashes."""
    audio: Path | Decoded | Quarantine
    """A file, a waveform that was made here, or the reason why there is neither."""
    split: str
    """train | dev | test, for pretraining and distillation."""
    tasks: dict[str, str] = field(default_factory=dict)
    """Probe task -> split of that task."""
    speaker: str | None = None
    text: str | None = None
    phones: tuple[tuple[str, int, int], ...] | None = None
    """(symbol, first sample, sample after the last) at 16 kHz, without gaps."""
    keyword: str | None = None
    emotion: str | None = None
    pronunciation: str | None = None
    """Phones in order, apart by spaces, where their times are not known."""
    part: Part | None = None
    """What of the file is the recording; None is all of it."""
    declared: Declared | None = None
