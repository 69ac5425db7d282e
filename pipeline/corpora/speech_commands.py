"""The folders of Speech Commands in, its recordings with keyword, speaker and the official splits out.

    ROOT/WORD/SPEAKER_nohash_NUMBER.wav

A recording's split is a hash of its speaker (Warden 2018, `which_set` of the data set's README), so a speaker stays on
one side, whatever is added later.
"""

import re
from collections.abc import Iterator
from hashlib import sha1
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from cache.errors import DataError
from pipeline.audio import Quarantine
from pipeline.corpora.drawn import DrawnTrials
from pipeline.corpora.folder import audio_at, corpus_root, folders, path_in, recordings
from pipeline.corpora.item import Item

MAX_NUM_WAVS_PER_CLASS = 2**27 - 1  # of which_set: about 134 million
FILE_NAME = re.compile(r"(?P<speaker>\w+?)_nohash_(?P<number>\d+)")


class SpeechCommandsParams(BaseModel, frozen=True, extra="forbid"):
    """Google Speech Commands, either version."""

    kind: Literal["speech_commands"]
    """A folder per word, as the archive unpacks."""
    root: str
    """The folder of the words; may name a variable of the environment: $SPEECH/speech_commands_v0.01."""
    words: tuple[str, ...] | None
    """The keywords to take; null takes every folder but _background_noise_."""
    validation_percentage: float = Field(ge=0, le=50)
    """Part of the speakers that is dev; officially 10."""
    testing_percentage: float = Field(ge=0, le=50)
    """Part of the speakers that is test; officially 10."""
    sv: DrawnTrials | None
    """Speaker verification, in the same splits, between recordings of different words; null leaves that task out."""


def which_set(speaker: str, validation_percentage: float, testing_percentage: float) -> str:
    """The official split of a speaker."""
    place = int(sha1(speaker.encode()).hexdigest(), 16) % (MAX_NUM_WAVS_PER_CLASS + 1)
    percentage = place * (100.0 / MAX_NUM_WAVS_PER_CLASS)
    if percentage < validation_percentage:
        return "dev"
    return "test" if percentage < validation_percentage + testing_percentage else "train"


def speech_commands_items(corpus: str, params: SpeechCommandsParams) -> Iterator[Item]:
    """The recordings, by word and name.

    Raises:
        DataError: a folder that is missing, or no recordings.
    """
    root = corpus_root(corpus, params.root)
    found = False
    for folder in word_folders(corpus, params):
        for file in recordings(folder):
            found = True
            yield recording(corpus, root, folder.name, file, params)
    if not found:
        raise DataError(f"{root} has no recordings in folders named by their word; unpack Speech Commands there")


def word_folders(corpus: str, params: SpeechCommandsParams) -> list[Path]:
    """The folders of the words to take, by name.

    Raises:
        DataError: there is no such folder; the message lists those there are.
    """
    root = corpus_root(corpus, params.root)
    there = [folder for folder in folders(root) if not folder.name.startswith(("_", "."))]
    names = [folder.name for folder in there]
    if missing := [word for word in params.words or () if word not in names]:
        raise DataError(
            f"{root} has no word {missing[0]!r}, but {', '.join(names) or 'no folder'}; "
            f"correct prepare.sources.{corpus}.words"
        )
    return [folder for folder in there if params.words is None or folder.name in params.words]


def recording(corpus: str, root: Path, word: str, file: Path, params: SpeechCommandsParams) -> Item:
    """One recording and its labels, all of which are in its name."""
    path = path_in(root, file)
    name = FILE_NAME.fullmatch(file.stem)
    audio: Path | Quarantine = audio_at(root, file)
    if name is None and isinstance(audio, Path):
        audio = Quarantine("its name is not SPEAKER_nohash_NUMBER, so its speaker and split are not known")
    speaker = name["speaker"] if name else None
    split = which_set(speaker, params.validation_percentage, params.testing_percentage) if speaker else "train"
    return Item(
        id=f"{corpus}/{path.rsplit('.', 1)[0]}",
        corpus=corpus,
        path=path,
        audio=audio,
        split=split,
        tasks=dict.fromkeys(["kws"] + ["sv"] * (params.sv is not None), split),
        speaker=speaker,
        text=word,
        keyword=word,
    )
