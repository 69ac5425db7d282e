"""Manifests of lhotse in, their supervisions or cuts as utterances out.

    recordings.jsonl.gz and supervisions.jsonl.gz    an utterance per supervision
    recordings.jsonl.gz alone                        an utterance per recording
    cuts.jsonl.gz                                    an utterance per cut

lhotse would run a source of type `command` in a shell and fetch one of type `url`. The manifests are therefore read here
as plain JSON lines, without lhotse, and only sources that are files inside the root are taken. What a manifest declares
of a file (rate, samples) is held against the file when it is decoded. https://lhotse.readthedocs.io
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, Field, ValidationError

from cache.errors import DataError
from cache.frames import RATE_HZ
from pipeline.audio import Part
from pipeline.corpora.drawn import DrawnTrials
from pipeline.corpora.folder import audio_at, corpus_root, path_in
from pipeline.corpora.item import Declared, Item
from pipeline.corpora.lists import list_file, path_inside
from pipeline.corpora.splits import WithinSpeakers, split_within

MAX_LINE = 16 * 2**20  # characters; a line of gigabytes out of a small archive is no manifest
Row = TypeVar("Row", bound=BaseModel)
Time = Annotated[float, Field(ge=-1e9, le=1e9)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]


class Segments(BaseModel, frozen=True, extra="forbid"):
    """Recordings, and who says what in them."""

    kind: Literal["recordings"]
    recordings: str
    """Relative to the root; .jsonl or .jsonl.gz."""
    supervisions: str | None
    """null: every recording is one utterance without labels."""
    split: Literal["train", "dev", "test"]


class Cuts(BaseModel, frozen=True, extra="forbid"):
    """Cuts, each with its recording and at most one supervision inside."""

    kind: Literal["cuts"]
    cuts: str
    """Relative to the root; .jsonl or .jsonl.gz."""
    split: Literal["train", "dev", "test"]


class LhotseParams(BaseModel, frozen=True, extra="forbid"):
    """Manifests of lhotse."""

    kind: Literal["lhotse"]
    """Recordings and supervisions, or cuts."""
    root: str
    """What the paths of sources are relative to, and inside of; may name a variable of the environment."""
    parts: tuple[Annotated[Segments | Cuts, Field(discriminator="kind")], ...] = Field(min_length=1)
    keyword: str | None
    """Where the keyword stands: `text`, or a key of a supervision's `custom`; null: nowhere."""
    emotion: str | None
    """The same for the emotion."""
    pronunciation: str | None
    """The same for phones apart by spaces."""
    phones: str | None
    """The alignment of a supervision that has phones and their times; null: none."""
    tasks: tuple[str, ...]
    """Probe tasks in which all utterances take part, by the splits of the parts."""
    sid: WithinSpeakers | None
    """Speaker identification; null leaves that task out."""
    sv: DrawnTrials | None
    """Trials to draw where `tasks` has sv, speaker verification; null draws none."""


class Source(BaseModel):
    """Where audio is."""

    type: str
    channels: tuple[int, ...]
    source: str


class Recording(BaseModel):
    """A file; keys that are not here play no part."""

    id: str
    sources: tuple[Source, ...]
    sampling_rate: int = Field(gt=0)
    num_samples: int = Field(gt=0)
    transforms: list[Any] | None = None


class Supervision(BaseModel):
    """Who says what, when."""

    id: str
    recording_id: str
    start: Time
    duration: Seconds
    channel: int | tuple[int, ...] = 0
    text: str | None = None
    speaker: str | None = None
    custom: dict[str, Any] | None = None
    alignment: dict[str, list[tuple[str, Time, Seconds, float | None]]] | None = None


class Cut(BaseModel):
    """A part of a recording."""

    id: str
    type: str
    start: Seconds = 0.0
    duration: Seconds = 0.0
    channel: int | tuple[int, ...] = 0
    supervisions: tuple[Supervision, ...] = ()
    recording: Recording | None = None


class Span(NamedTuple):
    """What of a recording is an utterance, in seconds."""

    start: float
    duration: float
    channel: int | tuple[int, ...]


def lhotse_items(corpus: str, params: LhotseParams) -> Iterator[Item]:
    """The utterances, by part as listed, then in the order of their manifest.

    Raises:
        DataError: a manifest that is missing or cannot be read, a source that is no file inside the root; with its line.
    """
    root = corpus_root(corpus, params.root)
    items = []
    for number, part in enumerate(params.parts):
        setting = f"prepare.sources.{corpus}.parts.{number}"
        match part:
            case Cuts():
                items += list(cut_items(corpus, root, setting, part, params))
            case Segments():
                items += list(segment_items(corpus, root, setting, part, params))
    sid = split_within({i.id: i.speaker for i in items if isinstance(i.audio, Path)}, params.sid)
    for item in items:
        tasks = dict.fromkeys(params.tasks, item.split) | ({"sid": sid[item.id]} if item.id in sid else {})
        yield replace(item, tasks=tasks)


def segment_items(corpus: str, root: Path, setting: str, part: Segments, params: LhotseParams) -> Iterator[Item]:
    """The utterances of recordings and their supervisions."""
    recordings: dict[str, tuple[str, Recording]] = {}
    for where, recording in rows_of(list_file(root, part.recordings, f"{setting}.recordings"), Recording):
        if recording.id in recordings:
            raise DataError(f"{where}: the recording {recording.id} is there twice; remove one")
        recordings[recording.id] = (where, recording)
    if part.supervisions is None:
        for where, recording in recordings.values():
            yield item_of(where, corpus, root, part.split, recording.id, recording, None, None, params)
        return
    for where, said in rows_of(list_file(root, part.supervisions, f"{setting}.supervisions"), Supervision):
        if said.recording_id not in recordings:
            raise DataError(
                f"{where}: {said.id} is of the recording {said.recording_id}, which {part.recordings} has not"
            )
        span = Span(said.start, said.duration, said.channel)
        _, recording = recordings[said.recording_id]
        yield item_of(where, corpus, root, part.split, said.id, recording, span, said, params)


def cut_items(corpus: str, root: Path, setting: str, part: Cuts, params: LhotseParams) -> Iterator[Item]:
    """The utterances of cuts."""
    for where, cut in rows_of(list_file(root, part.cuts, f"{setting}.cuts"), Cut):
        if cut.type != "MonoCut" or cut.recording is None:
            kind = cut.type if cut.type != "MonoCut" else "cut without a recording"
            raise DataError(f"{where}: {cut.id} is a {kind}; only a MonoCut with a recording is read: save such cuts")
        if len(cut.supervisions) > 1:
            raise DataError(
                f"{where}: {cut.id} has {len(cut.supervisions)} supervisions, and an utterance has one; "
                "cut them apart with CutSet.trim_to_supervisions()"
            )
        said = cut.supervisions[0] if cut.supervisions else None
        span = Span(cut.start, cut.duration, cut.channel)
        yield item_of(where, corpus, root, part.split, cut.id, cut.recording, span, said, params)


def item_of(
    where: str,
    corpus: str,
    root: Path,
    split: str,
    name: str,
    recording: Recording,
    span: Span | None,
    said: Supervision | None,
    params: LhotseParams,
) -> Item:
    """One utterance."""
    source = source_of(where, recording)
    file = root / path_inside(root, source.source, f"{where}, {recording.id}")
    part = None
    if span is not None:
        channels = span.channel if isinstance(span.channel, tuple) else (span.channel,)
        if len(channels) != 1 or channels[0] not in source.channels:
            there = ", ".join(map(str, source.channels))
            raise DataError(f"{where}: {name} is of the channels {channels}; choose one of those of its file: {there}")
        part = Part(span.start, span.start + span.duration, source.channels.index(channels[0]))
    labels = said.custom or {} if said else {}

    def label(key: str | None) -> str | None:
        value = said.text if said and key == "text" else labels.get(key) if key else None
        return str(value) if value is not None else None

    return Item(
        id=f"{corpus}/{name}",
        corpus=corpus,
        path=path_in(root, file),
        audio=audio_at(root, file),
        split=split,
        speaker=said.speaker if said else None,
        text=said.text if said else None,
        phones=phones_of(where, said, span, params.phones),
        keyword=label(params.keyword),
        emotion=label(params.emotion),
        pronunciation=label(params.pronunciation),
        part=part,
        declared=Declared(recording.sampling_rate, recording.num_samples),
    )


def source_of(where: str, recording: Recording) -> Source:
    """The one file of a recording.

    Raises:
        DataError: a command, an address, bytes in the manifest, several files, or a recording that is yet to be changed.
    """
    for source in recording.sources:
        if source.type != "file" or "://" in source.source:
            raise DataError(
                f"{where}: the audio of {recording.id} is of type {source.type!r} ({source.source[:60]!r}); nothing that "
                "comes with data is run or fetched: save the audio to files (CutSet.save_audios) and name those"
            )
    if len(recording.sources) != 1:
        raise DataError(f"{where}: {recording.id} has {len(recording.sources)} sources; an utterance is of one file")
    if recording.transforms:
        raise DataError(
            f"{where}: {recording.id} is to be changed while it is read (transforms); save the result (CutSet.save_audios)"
        )
    return recording.sources[0]


def phones_of(
    where: str, said: Supervision | None, span: Span | None, key: str | None
) -> tuple[tuple[str, int, int], ...] | None:
    """The phones of an alignment in samples of the utterance; lhotse counts their times from the recording, in cuts too.

    Raises:
        DataError: times out of order or outside the utterance.
    """
    aligned = (said.alignment or {}).get(key) if said and key else None
    if not aligned or span is None:
        return None
    phones, last, end = [], 0, round(span.duration * RATE_HZ)
    for symbol, start, duration, _ in aligned:
        first, after = (round((t - span.start) * RATE_HZ) for t in (start, start + duration))
        if not last <= first <= after <= end:
            raise DataError(
                f"{where}: the phone {symbol!r} at {start:g} s lies outside its utterance or before another"
            )
        phones.append((symbol, first, after))
        last = after
    return tuple(phones)


def rows_of(file: Path, model: type[Row]) -> Iterator[tuple[str, Row]]:
    """Where each line of a manifest stands, and the line, checked.

    Raises:
        DataError: another format, a damaged archive, a line that is no JSON object or lacks what is needed.
    """
    if not file.name.endswith((".jsonl", ".jsonl.gz")):
        raise DataError(f"{file} is neither .jsonl nor .jsonl.gz; convert it: lhotse copy {file.name} NAME.jsonl.gz")
    try:
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else open(file, encoding="utf-8") as text:
            number = 0
            while line := text.readline(MAX_LINE):
                number += 1
                where = f"{file}, line {number}"
                if len(line) == MAX_LINE:
                    raise DataError(f"{where}: longer than {MAX_LINE} characters; is it a manifest?")
                if line.strip():
                    yield where, model.model_validate(json.loads(line))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); write it again") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{file} is damaged ({error}); get or write it again") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not a JSON object ({error.msg})") from error
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the line"
        raise DataError(f"{where}: no {model.__name__.lower()} of lhotse: {key}: {first['msg'].lower()}") from error
