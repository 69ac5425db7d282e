"""The manifest: one JSON line per utterance in, a checked, ordered list of utterances out, and back.

The manifest is the table of contents of every store: which utterances there are, in which order, and how many samples
each has. Where an utterance lies in a store is a pure function of it.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from jaxtyping import Int64

from cache.errors import DataError
from cache.frames import FIELD, RATE_HZ, num_frames
from cache.publish import digest_bytes, digest_json, publish_file

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording: where it came from, how long it is, and what is known about it."""

    id: str
    corpus: str
    path: str
    """Relative to the root of its corpus, with forward slashes."""
    samples: int
    """Samples at 16 kHz, as they are in the wave store."""
    rate_hz: int
    """Rate of the source file."""
    file_samples: int
    file_bytes: int
    audio: str
    """xxh3-128 of the int16 samples in the wave store, as hex."""
    split: str
    """train | dev | test: who may learn from it in pretraining and distillation."""
    tasks: dict[str, str]
    """Probe task -> split of that task, for the tasks this utterance takes part in."""
    speaker: str | None = None
    text: str | None = None
    phones: tuple[tuple[str, int, int], ...] | None = None
    """(symbol, first sample, sample after the last) at 16 kHz."""
    keyword: str | None = None
    emotion: str | None = None
    pronunciation: str | None = None
    """Phones in order, apart by spaces, where their times are not known."""

    @property
    def num_frames(self) -> int:
        """Frames that any 50 Hz model gives for this utterance."""
        return num_frames(self.samples)

    @property
    def person(self) -> str | None:
        """The speaker over all corpora, `CORPUS/SPEAKER`: two corpora call different people 1334.

        A speaker with a slash is named so already: one of another corpus, whose recordings come in this one, too.
        """
        if self.speaker is None or "/" in self.speaker:
            return self.speaker
        return f"{self.corpus}/{self.speaker}"


REQUIRED = [f.name for f in fields(Utterance)][:10]
KNOWN = {f.name for f in fields(Utterance)}


@dataclass(frozen=True)
class Manifest:
    """Utterances in their order; ids are unique."""

    utterances: tuple[Utterance, ...]

    def __len__(self) -> int:
        return len(self.utterances)

    def __iter__(self) -> Iterator[Utterance]:
        return iter(self.utterances)

    def __getitem__(self, index: int) -> Utterance:
        return self.utterances[index]

    @cached_property
    def by_id(self) -> dict[str, Utterance]:
        """Utterance of each id."""
        return {u.id: u for u in self.utterances}

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the manifest's text: labels, splits, and through their hashes all samples."""
        return digest_bytes(manifest_text(self).encode())

    @cached_property
    def audio_digest(self) -> str:
        """SHA-256 of ids and audio alone: what stores depend on. A corrected label changes no store."""
        return digest_json([[u.id, u.samples, u.audio] for u in self.utterances])

    @cached_property
    def samples(self) -> Int64[np.ndarray, " U"]:
        """Samples of each utterance, in order."""
        return np.array([u.samples for u in self.utterances], dtype=np.int64)

    def select(self, split: str | None = None, task: str | None = None) -> "Manifest":
        """The utterances of a pretraining split and/or those that take part in a probe task, order kept."""
        chosen = (u for u in self.utterances if split is None or u.split == split)
        return Manifest(tuple(u for u in chosen if task is None or task in u.tasks))

    def up_to(self, max_sec: float) -> "Manifest":
        """The utterances that are not longer than `max_sec`, order kept."""
        return Manifest(tuple(u for u in self.utterances if u.samples <= int(max_sec * RATE_HZ)))

    def labelled(self) -> "Manifest":
        """The utterances that take part in any probe task, order kept."""
        return Manifest(tuple(u for u in self.utterances if u.tasks))


def manifest_text(manifest: Manifest) -> str:
    """The canonical text: one line an utterance, absent labels left out."""
    rows = ({k: v for k, v in asdict(u).items() if v is not None} for u in manifest)
    return "".join(json.dumps(row, ensure_ascii=False, separators=(", ", ": ")) + "\n" for row in rows)


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Publish a manifest, after the same checks that reading makes."""
    check_manifest(manifest.utterances, str(path))
    with publish_file(path) as partial:
        partial.write_text(manifest_text(manifest), encoding="utf-8")


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        DataError: missing, empty, not JSON, unknown or absent keys, duplicate ids, a path outside its corpus,
            an utterance under 400 samples, an unknown split; the message names file, line, value and remedy.
    """
    utterances = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    utterances.append(_parse(line, f"{path}, line {number}"))
    except FileNotFoundError:
        raise DataError(f"{path} does not exist; write it with `decant prepare` (or `dvc repro prepare`)") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    check_manifest(utterances, str(path))
    return Manifest(tuple(utterances))


def _parse(line: str, where: str) -> Utterance:
    try:
        row: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not a JSON object ({error.msg}); each line is one utterance") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: {line.strip()[:40]!r} is not a JSON object; each line is one utterance")
    if unknown := sorted(set(row) - KNOWN):
        raise DataError(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(sorted(KNOWN))}")
    if missing := [key for key in REQUIRED if key not in row]:
        raise DataError(f"{where}: the key {missing[0]!r} is missing; rebuild the manifest with `decant prepare`")
    for key, kind in (("id", str), ("path", str), ("samples", int), ("rate_hz", int), ("tasks", dict), ("split", str)):
        if not isinstance(row[key], kind) or isinstance(row[key], bool):
            raise DataError(f"{where}: {key} is {row[key]!r}, which is not {kind.__name__}")
    if row.get("phones") is not None:
        row["phones"] = tuple((str(s), int(a), int(b)) for s, a, b in row["phones"])
    return Utterance(**row)


def check_manifest(utterances: Sequence[Utterance], where: str) -> None:
    """Refuse what no stage could use.

    Raises:
        DataError: see `read_manifest`.
    """
    if not utterances:
        raise DataError(f"{where} holds no utterance; check prepare.sources in params.yaml")
    seen: dict[str, int] = {}
    for number, u in enumerate(utterances, 1):
        line = f"{where}, line {number}"
        if u.id in seen:
            raise DataError(f"{line}: the id {u.id!r} is already on line {seen[u.id]}; ids must be unique")
        seen[u.id] = number
        pure = PurePosixPath(u.path)
        if pure.is_absolute() or ".." in pure.parts:
            raise DataError(
                f"{line}: the path {u.path!r} of {u.id} leads outside its corpus; make it relative to the root"
            )
        if u.samples < FIELD:
            raise DataError(
                f"{line}: {u.id} has {u.samples} samples, fewer than the {FIELD} of one frame; leave it out"
            )
        for name, split in [("split", u.split), *u.tasks.items()]:
            if split not in SPLITS:
                raise DataError(f"{line}: {name} of {u.id} is {split!r}; choose one of {', '.join(SPLITS)}")
