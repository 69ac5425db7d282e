"""The folders of LibriSpeech in, its utterances with transcript, speaker and splits out.

    ROOT/SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER-NUMBER.flac
    ROOT/SUBSET/SPEAKER/CHAPTER/SPEAKER-CHAPTER.trans.txt       one "NAME WORDS" per line

Train, dev and test are the official ones, by the name of the subset, and have no speaker in common; they are those of
speech recognition (asr) and of speaker verification (sv), whose trials are drawn, too. Speaker identification needs the
same speakers on both sides, so there each speaker's utterances are shared out. Phones come from a lexicon; an utterance
with a word that is not in it takes no part in phone recognition (pr), and all others do.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from cache.errors import DataError
from pipeline.audio import Quarantine
from pipeline.corpora.drawn import DrawnTrials
from pipeline.corpora.folder import audio_at, corpus_root, folders, leads_inside, path_in, recordings
from pipeline.corpora.item import Item
from pipeline.corpora.lexicon import LexiconParams, pronounced, read_lexicon
from pipeline.corpora.splits import Fractions, WithinSpeakers, split_alone, split_within

NAME = re.compile(r"[\w-]+")
SPLITS = ("train", "dev", "test")


class LibriSpeechParams(BaseModel, frozen=True, extra="forbid"):
    """LibriSpeech, or a part of it in the same folders."""

    kind: Literal["librispeech"]
    """Folders as LibriSpeech unpacks them."""
    root: str
    """The folder that holds the subsets; may name a variable of the environment: $SPEECH/LibriSpeech."""
    subsets: tuple[str, ...] = Field(min_length=1)
    """Such as train-clean-100, dev-clean, test-clean; the first word is the split."""
    dev_speakers: float = Field(ge=0, le=0.5)
    """Part of the training speakers that is dev instead; 0 where a dev subset is at hand."""
    sid: WithinSpeakers | None
    """Speaker identification; null leaves that task out."""
    lexicon: LexiconParams | None
    """Phone recognition, by the words of the transcripts; null leaves that task out."""
    asr: bool
    """Whether all utterances take part in speech recognition."""
    sv: DrawnTrials | None
    """Speaker verification, in the splits of pretraining; null leaves that task out."""


def librispeech_items(corpus: str, params: LibriSpeechParams) -> Iterator[Item]:
    """The utterances of the subsets, by subset as listed, then speaker, chapter and name.

    Raises:
        DataError: a folder that is missing or has another layout, an utterance in two formats, a transcript or a
            lexicon that cannot be read.
    """
    root = corpus_root(corpus, params.root)
    lexicon = read_lexicon(corpus, params.lexicon) if params.lexicon is not None else {}
    for subset in params.subsets:
        check_subset(corpus, root, subset)
    for subset in params.subsets:
        found = 0
        for speaker in folders(root / subset):
            items = [item for chapter in folders(speaker) for item in chapter_items(corpus, root, subset, chapter)]
            found += len(items)
            yield from with_splits(items, subset, speaker.name, params, lexicon)
        if not found:
            raise DataError(f"{root / subset} has no recordings in SPEAKER/CHAPTER/ folders; unpack the subset there")


def check_subset(corpus: str, root: Path, subset: str) -> None:
    """Refuse a subset before the first is read."""
    if subset.split("-")[0] not in SPLITS:
        raise DataError(
            f"prepare.sources.{corpus}.subsets: {subset!r} does not begin with train-, dev- or test-, "
            "so its split is not known; name it as LibriSpeech does"
        )
    if not (root / subset).is_dir():
        there = ", ".join(f.name for f in folders(root)) or "no folder"
        raise DataError(f"{root} has no subset {subset!r}, but {there}; correct prepare.sources.{corpus}.subsets")


def chapter_items(corpus: str, root: Path, subset: str, chapter: Path) -> Iterator[Item]:
    """The utterances of one chapter: those transcribed, and what is there besides, quarantined."""
    speaker = chapter.parent.name
    transcript = chapter / f"{speaker}-{chapter.name}.trans.txt"
    if not leads_inside(root, transcript):
        raise DataError(f"{transcript} is a link that leads out of the corpus; put the file there")
    texts = read_transcript(transcript)
    files = files_of(chapter)
    for name in sorted(set(texts) | set(files)):
        file = files.get(name, chapter / f"{name}.flac")
        path = path_in(root, file)
        audio = audio_at(root, file)
        if name not in files:
            audio = Quarantine(f"it stands in {transcript.name}, but there is no such file")
        elif name not in texts and isinstance(audio, Path):
            absent = f"it has no line in {transcript.name}" if transcript.exists() else f"there is no {transcript.name}"
            audio = Quarantine(f"no transcript: {absent}")
        stem = path.rsplit("/", 1)[1].rsplit(".", 1)[0]
        yield Item(
            id=f"{corpus}/{subset}/{stem}",
            corpus=corpus,
            path=path,
            audio=audio,
            split="train",  # until the speaker is known in full: with_splits
            speaker=speaker,
            text=texts.get(name),
        )


def files_of(chapter: Path) -> dict[str, Path]:
    """The recordings of a chapter, by their name in its transcript.

    Raises:
        DataError: the same utterance in two formats.
    """
    files: dict[str, Path] = {}
    for file in recordings(chapter):
        if file.stem in files:
            raise DataError(f"{file.stem} is there twice: {files[file.stem]} and {file}; remove one")
        files[file.stem] = file
    return files


def read_transcript(file: Path) -> dict[str, str]:
    """Words of each utterance of a chapter; none if the file is missing.

    Raises:
        DataError: a line that is not a name and words, a name twice, or text that is not UTF-8.
    """
    if not file.exists():
        return {}
    texts: dict[str, str] = {}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        name, _, words = line.strip().partition(" ")
        if not NAME.fullmatch(name) or not words.strip():
            raise DataError(f"{file}, line {number}: {line[:40]!r} is not a name and words; mend or remove the line")
        if name in texts:
            raise DataError(f"{file}, line {number}: {name} is there twice; remove one")
        texts[name] = words.strip()
    return texts


def with_splits(
    items: list[Item], subset: str, speaker: str, params: LibriSpeechParams, lexicon: dict[str, str]
) -> Iterator[Item]:
    """The utterances of one speaker, each in its splits; what is quarantined already does not count."""
    split = subset.split("-")[0]
    if split == "train":
        split = split_alone(f"librispeech speaker {speaker}", Fractions(dev=params.dev_speakers, test=0))
    sid = split_within({item.id: speaker for item in items if isinstance(item.audio, Path)}, params.sid)
    for item in items:
        phones = pronounced(item.text, lexicon)
        tasks = {"pr": split} if phones is not None and isinstance(item.audio, Path) else {}
        tasks |= dict.fromkeys(["asr"] * params.asr + ["sv"] * (params.sv is not None), split)
        if item.id in sid:
            tasks["sid"] = sid[item.id]
        yield replace(item, split=split, tasks=tasks, pronunciation=phones)
