"""The folders of IEMOCAP in, its turns with emotion, speaker, words and five folds by session out.

    ROOT/SessionN/dialog/EmoEvaluation/DIALOGUE.txt    [start - end] TAB TURN TAB emotion TAB [valence, ...]
    ROOT/SessionN/dialog/transcriptions/DIALOGUE.txt   TURN [start-end]: words
    ROOT/SessionN/sentences/wav/DIALOGUE/TURN.wav

SUPERB's emotion recognition: the label most judges gave, four classes with excitement counted as happiness, each of the
five sessions the test once. The two speakers of a session are in no other, so no fold tests on a voice it learned from.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

from cache.errors import DataError, SettingsError
from pipeline.audio import Quarantine
from pipeline.corpora.folder import audio_at, corpus_root, folders, leads_inside, path_in, recordings
from pipeline.corpora.folds import fold_tasks
from pipeline.corpora.item import Item
from pipeline.corpora.lists import lines_of

SESSIONS = tuple(f"Session{i}" for i in range(1, 6))
CODES = ("neu", "hap", "exc", "ang", "sad", "fru", "sur", "fea", "dis", "oth", "xxx")
JUDGED = re.compile(r"\[[\d.]+ - [\d.]+\]\t(?P<turn>\S+)\t(?P<code>\S+)\t\[.*\]")
TRANSCRIBED = re.compile(r"(?P<turn>Ses\S+) \[[\d.]+-[\d.]+\]:(?P<words>.*)")
TURN = re.compile(r"(?P<session>Ses\d\d)[FM]_\w+_(?P<sex>[FM])\d+")


class IemocapParams(BaseModel, frozen=True, extra="forbid"):
    """IEMOCAP, in turns."""

    kind: Literal["iemocap"]
    """Five sessions, as IEMOCAP_full_release unpacks."""
    root: str
    """The folder of the sessions; may name a variable of the environment: $SPEECH/IEMOCAP."""
    classes: dict[str, str]
    """Code of the corpus -> class of the task; SUPERB: {neu: neutral, hap: happy, exc: happy, ang: angry, sad: sad}.
    Turns of other codes take no part."""
    dev: float = Field(gt=0, le=0.5)
    """Part of what is not the test that chooses the learning rate; SUPERB: 0.2, by turns."""
    split: Literal["train", "dev", "test"]
    """Where all turns stand in pretraining and distillation; test keeps the folds' tests unheard."""


def iemocap_items(corpus: str, params: IemocapParams) -> Iterator[Item]:
    """The judged turns, by session, dialogue and name; recordings that nobody judged are quarantined.

    Raises:
        DataError: a session or a file of labels that is missing, a line or a label that cannot be read, or a turn twice.
        SettingsError: a class made of a code that IEMOCAP does not have.
    """
    if unknown := sorted(set(params.classes) - set(CODES)):
        raise SettingsError(
            f"prepare.sources.{corpus}.classes: {unknown[0]!r} is no code of IEMOCAP: {', '.join(CODES)}"
        )
    root = corpus_root(corpus, params.root)
    for session in SESSIONS:
        if not (root / session).is_dir():
            there = ", ".join(f.name for f in folders(root)) or "no folder"
            raise DataError(f"{root} has no {session}, but {there}; the five folds need the five sessions")
    for fold, session in enumerate(SESSIONS, 1):
        wavs = root / session / "sentences" / "wav"
        dialogues = folders(wavs) if wavs.is_dir() else []
        if not dialogues:
            raise DataError(f"{wavs} has no dialogue; unpack the sentences of {session} there")
        for dialogue in dialogues:
            yield from turns_of(corpus, root, dialogue, fold, params)


def turns_of(corpus: str, root: Path, dialogue: Path, fold: int, params: IemocapParams) -> Iterator[Item]:
    """The turns of one dialogue."""
    texts = root / SESSIONS[fold - 1] / "dialog"
    codes = read_labels(root, texts / "EmoEvaluation" / f"{dialogue.name}.txt")
    words = read_words(root, texts / "transcriptions" / f"{dialogue.name}.txt")
    files = {file.stem: file for file in recordings(dialogue)}
    for name in sorted(set(codes) | set(files)):
        file = files.get(name, dialogue / f"{name}.wav")
        path = path_in(root, file)
        turn = TURN.fullmatch(name)
        audio = audio_at(root, file)
        if name not in files:
            audio = Quarantine(f"it stands in EmoEvaluation/{dialogue.name}.txt, but there is no such file")
        elif turn is None and isinstance(audio, Path):
            audio = Quarantine("its name is not that of a turn, so its speaker is not known")
        elif name not in codes and isinstance(audio, Path):
            audio = Quarantine(f"no label: it has no line in EmoEvaluation/{dialogue.name}.txt")
        stem = path.rsplit("/", 1)[1].rsplit(".", 1)[0]
        label = params.classes.get(codes.get(name, ""))
        yield Item(
            id=f"{corpus}/{stem}",
            corpus=corpus,
            path=path,
            audio=audio,
            split=params.split,
            tasks=fold_tasks("er", stem, fold, len(SESSIONS), params.dev) if label is not None else {},
            speaker=f"{turn['session']}{turn['sex']}" if turn else None,
            text=words.get(name),
            emotion=label,
        )


def read_labels(root: Path, file: Path) -> dict[str, str]:
    """The code of each turn of a dialogue; the lines of single judges between them are passed over.

    Raises:
        DataError: no such file, a summary that cannot be read, an unknown code, or a turn that is there twice.
    """
    if not leads_inside(root, file):
        raise DataError(f"{file} is a link that leads out of the corpus; put the file there")
    if not file.is_file():
        raise DataError(
            f"there is no {file}, so the emotions of its dialogue are not known; unpack EmoEvaluation there"
        )
    codes: dict[str, str] = {}
    for line in lines_of(file):
        if not line.text.startswith("["):  # "C-E1: Neutral; ()" and the like, "% [START_TIME ..." at the top
            continue
        judged = JUDGED.fullmatch(line.text)
        if judged is None:
            raise DataError(f"{line.where}: {line.text[:60]!r} is not a time, a turn, an emotion and numbers; mend it")
        turn, code = judged["turn"], judged["code"]
        if code not in CODES:
            raise DataError(f"{line.where}: the emotion of {turn} is {code!r}; IEMOCAP has {', '.join(CODES)}")
        if turn in codes:
            raise DataError(f"{line.where}: {turn} is there twice; remove one")
        codes[turn] = code
    return codes


def read_words(root: Path, file: Path) -> dict[str, str]:
    """The words of each turn of a dialogue; none where the transcriptions were not unpacked."""
    if not leads_inside(root, file):
        raise DataError(f"{file} is a link that leads out of the corpus; put the file there")
    if not file.is_file():
        return {}
    matches = (TRANSCRIBED.fullmatch(line.text) for line in lines_of(file))  # some lines are notes of the transcriber
    return {match["turn"]: match["words"].strip() for match in matches if match and match["words"].strip()}
