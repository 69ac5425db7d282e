"""Kaldi data directories in, their utterances with transcript and speaker out.

    DIR/wav.scp     RECORDING PATH
    DIR/segments    UTTERANCE RECORDING START END [CHANNEL]     optional; without it a recording is an utterance
    DIR/utt2spk     UTTERANCE SPEAKER
    DIR/text        UTTERANCE WORDS                             optional

A wav.scp may also hold commands, which Kaldi hands to a shell. Nothing that comes with data is run here: a command is
refused by its line, and so are archives and paths out of the corpus. https://kaldi-asr.org/doc/data_prep.html
"""

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

from pydantic import BaseModel

from cache.errors import DataError
from pipeline.audio import Part, Quarantine
from pipeline.corpora.drawn import DrawnTrials
from pipeline.corpora.folder import audio_at, corpus_root, path_in
from pipeline.corpora.item import Item
from pipeline.corpora.lists import Line, keyed_lines, list_file, path_inside
from pipeline.corpora.splits import WithinSpeakers, split_within

ARCHIVE = re.compile(r".+\.ark:\d+")


class DataDirs(BaseModel, frozen=True, extra="forbid"):
    """Which directories are which split."""

    train: tuple[str, ...]
    """Relative to the root: [data/train_clean]."""
    dev: tuple[str, ...]
    test: tuple[str, ...]


class KaldiParams(BaseModel, frozen=True, extra="forbid"):
    """Data directories of Kaldi, ESPnet, icefall and others."""

    kind: Literal["kaldi"]
    """Directories with wav.scp and utt2spk."""
    root: str
    """What paths in wav.scp are relative to, and inside of; may name a variable of the environment."""
    data: DataDirs
    tasks: tuple[str, ...]
    """Probe tasks in which all utterances take part, by the same splits."""
    sid: WithinSpeakers | None
    """Speaker identification; null leaves that task out."""
    sv: DrawnTrials | None
    """Trials to draw where `tasks` has sv, speaker verification; null draws none."""


class Piece(NamedTuple):
    """What an utterance is of its recording."""

    recording: str
    part: Part | None


def kaldi_items(corpus: str, params: KaldiParams) -> Iterator[Item]:
    """The utterances, by split and directory as listed, then in the order of segments or wav.scp.

    Raises:
        DataError: a file that is missing, a line that cannot be used, a command instead of a path; with its line.
    """
    root = corpus_root(corpus, params.root)
    items = [
        item
        for split, directories in params.data
        for directory in directories
        for item in directory_items(corpus, root, directory, split)
    ]
    sid = split_within({i.id: i.speaker for i in items if isinstance(i.audio, Path)}, params.sid)
    for item in items:
        tasks = dict.fromkeys(params.tasks, item.split) | ({"sid": sid[item.id]} if item.id in sid else {})
        yield replace(item, tasks=tasks)


def directory_items(corpus: str, root: Path, directory: str, split: str) -> Iterator[Item]:
    """The utterances of one data directory; those without speaker, words or recording are quarantined.

    Raises:
        DataError: as `kaldi_items`.
    """
    setting = f"prepare.sources.{corpus}"
    files = read_wav_scp(root, list_file(root, f"{directory}/wav.scp", setting))
    speakers = read_words(list_file(root, f"{directory}/utt2spk", setting))
    has_text, has_segments = ((root / directory / name).exists() for name in ("text", "segments"))
    texts = read_words(list_file(root, f"{directory}/text", setting)) if has_text else {}
    pieces = {name: Piece(name, None) for name in files}
    if has_segments:
        pieces = read_segments(list_file(root, f"{directory}/segments", setting))
    origin = "segments" if has_segments else "wav.scp"
    for name in [*pieces, *sorted((set(speakers) | set(texts)) - set(pieces))]:
        piece = pieces.get(name)
        file = files.get(piece.recording) if piece else None
        audio: Path | Quarantine
        if piece is None:
            audio = Quarantine(f"it stands in {'utt2spk' if name in speakers else 'text'}, but not in {origin}")
        elif file is None:
            audio = Quarantine(f"its recording {piece.recording} is not in wav.scp")
        elif name not in speakers:
            audio = Quarantine("no speaker: it has no line in utt2spk")
        elif has_text and not texts.get(name):
            audio = Quarantine("no transcript: it has no words in text")
        else:
            audio = audio_at(root, file)
        yield Item(
            id=f"{corpus}/{name}",
            corpus=corpus,
            path=path_in(root, file or root / directory / "wav.scp"),
            audio=audio,
            split=split,
            speaker=speakers.get(name),
            text=texts.get(name),
            part=piece.part if piece else None,
        )


def read_words(file: Path) -> dict[str, str]:
    """What follows each key of a file, with single spaces."""
    return {key: " ".join(rest.split()) for _, key, rest in keyed_lines(file)}


def read_wav_scp(root: Path, file: Path) -> dict[str, Path]:
    """The file of each recording.

    Raises:
        DataError: a command, an archive, no path, or a path out of the root.
    """
    files = {}
    for line, key, source in keyed_lines(file):
        if source.endswith("|") or source.startswith("|"):
            raise DataError(
                f"{line.where}: the audio of {key} is a command ({source[:60]!r}), and nothing that comes with data is "
                "run; write its output to a file and name that"
            )
        if source == "-" or ARCHIVE.fullmatch(source):
            raise DataError(f"{line.where}: the audio of {key} is {source!r}, not a file; write it out as WAV or FLAC")
        files[key] = root / path_inside(root, source, f"{line.where}, {key}")
    return files


def read_segments(file: Path) -> dict[str, Piece]:
    """Recording, start and end of each utterance; an end of -1 is the end of the file, as in Kaldi.

    Raises:
        DataError: a line that is not a recording and two times in order, and perhaps a channel.
    """
    return {key: piece_of(line, rest) for line, key, rest in keyed_lines(file)}


def piece_of(line: Line, rest: str) -> Piece:
    """One line of segments, after its key."""
    words = rest.split()
    try:
        start, end = (float(word) for word in words[1:3])
        channel = int(words[3]) if len(words) == 4 else None
        fits = len(words) in (3, 4) and math.isfinite(start) and (end == -1 or start < end < math.inf)
    except ValueError:  # not two numbers
        fits = False
    if not fits or start < 0 or (channel is not None and channel < 0):
        raise DataError(
            f"{line.where}: {line.text[:60]!r} is not an utterance, a recording, start and end in seconds (and a channel); "
            "mend or remove the line"
        )
    return Piece(words[0], Part(start, None if end == -1 else end, channel))
