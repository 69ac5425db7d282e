"""The folders of RAVDESS in, its recordings with emotion, actor, words and folds by actor out.

    ROOT/Actor_AA/03-01-EE-II-SS-RR-AA.wav    modality, channel, emotion, intensity, statement, repetition, actor

Livingstone & Russo 2018, file names as on the data set's page. Every actor says the same two sentences in every emotion,
so an actor is on one side of each fold, and the words tell nothing.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from cache.errors import DataError, SettingsError
from pipeline.audio import Quarantine
from pipeline.corpora.folder import audio_at, corpus_root, folders, path_in, recordings
from pipeline.corpora.folds import fold_tasks
from pipeline.corpora.item import Item

EMOTIONS = {
    "01": "neutral",
    "02": "calm",
    "03": "happy",
    "04": "sad",
    "05": "angry",
    "06": "fearful",
    "07": "disgust",
    "08": "surprised",
}
STATEMENTS = {"01": "KIDS ARE TALKING BY THE DOOR", "02": "DOGS ARE SITTING BY THE DOOR"}
FILE_NAME = re.compile(r"(0[1-3])-(0[12])-(0[1-8])-(0[12])-(0[12])-(0[12])-(\d\d)")


class RavdessParams(BaseModel, frozen=True, extra="forbid"):
    """The audio-only speech of RAVDESS."""

    kind: Literal["ravdess"]
    """A folder per actor, as the archive Audio_Speech_Actors_01-24 unpacks."""
    root: str
    """The folder of the actors; may name a variable of the environment: $SPEECH/RAVDESS."""
    classes: dict[str, str]
    """Emotion of the corpus -> class of the task; {happy: happy, calm: neutral}. Emotions not named take no part."""
    folds: tuple[tuple[int, ...], ...] = Field(min_length=2)
    """Actors by fold; in the task er-1 those of the first are the test. Actors not named take no part."""
    dev: float = Field(gt=0, le=0.5)
    """Part of what is not the test that chooses the learning rate, by recordings as in SUPERB."""
    split: Literal["train", "dev", "test"]
    """Where all recordings stand in pretraining and distillation; test keeps the folds' tests unheard."""


def ravdess_items(corpus: str, params: RavdessParams) -> Iterator[Item]:
    """The recordings, by actor and name.

    Raises:
        DataError: a folder that is missing, or no recordings.
        SettingsError: an emotion that RAVDESS does not have, or an actor in two folds.
    """
    check(corpus, params)
    root = corpus_root(corpus, params.root)
    found = False
    for folder in actor_folders(root):
        for file in recordings(folder):
            found = True
            yield recording(corpus, root, file, params)
    if not found:
        raise DataError(f"{root} has no recordings in Actor_NN/ folders; unpack Audio_Speech_Actors_01-24 there")


def actor_folders(root: Path) -> list[Path]:
    """The folders of the actors, by name."""
    return [folder for folder in folders(root) if folder.name.startswith("Actor_")]


def check(corpus: str, params: RavdessParams) -> None:
    """Refuse settings before the first recording."""
    if unknown := sorted(set(params.classes) - set(EMOTIONS.values())):
        raise SettingsError(
            f"prepare.sources.{corpus}.classes: {unknown[0]!r} is no emotion of RAVDESS: {', '.join(EMOTIONS.values())}"
        )
    actors = [actor for fold in params.folds for actor in fold]
    if twice := sorted({actor for actor in actors if actors.count(actor) > 1}):
        raise SettingsError(f"prepare.sources.{corpus}.folds: actor {twice[0]} is there twice; a fold keeps its actors")


def recording(corpus: str, root: Path, file: Path, params: RavdessParams) -> Item:
    """One recording and its labels, all of which are in its name."""
    path = path_in(root, file)
    name = path.rsplit(".", 1)[0]
    audio = audio_at(root, file)
    code = FILE_NAME.fullmatch(file.stem)
    if code is None:
        audio = audio if isinstance(audio, Quarantine) else Quarantine("its name is not seven codes of RAVDESS")
        return Item(f"{corpus}/{name}", corpus, path, audio, params.split)
    _, channel, emotion, _, statement, _, actor = code.groups()
    if isinstance(audio, Path) and channel != "01":
        audio = Quarantine("a song, by the second code of its name; only speech is read")
    if isinstance(audio, Path) and file.parent.name != f"Actor_{actor}":
        audio = Quarantine(f"its name says actor {actor} and its folder {file.parent.name}")
    label = params.classes.get(EMOTIONS[emotion])
    fold = next((i for i, actors in enumerate(params.folds, 1) if int(actor) in actors), None)
    return Item(
        id=f"{corpus}/{name}",
        corpus=corpus,
        path=path,
        audio=audio,
        split=params.split,
        tasks=fold_tasks("er", name, fold, len(params.folds), params.dev) if label is not None else {},
        speaker=f"Actor_{actor}",
        text=STATEMENTS[statement],
        emotion=label,
    )
