"""The folders and lists of VoxCeleb1 in, its recordings for speaker identification and verification, and trials, out.

    ROOT/FOLDER/idNNNNN/VIDEO/NNNNN.wav    FOLDER as unpacked: wav, or dev/wav and test/wav
    iden_split.txt                         1 | 2 | 3 and a path: train, dev, test of speaker identification
    veri_test.txt, veri_test2.txt          1 | 0 and two paths: trials of speaker verification

The lists say .wav; a recording may as well be there in another format that is read, NNNNN.flac.

Identification knows every speaker (SUPERB SID). Verification (SUPERB SV) is tested on voices it never heard: a speaker
of any trial is in the test and nowhere else, also in pretraining. SUPERB has no dev speakers there and reports the best
test score; here `dev_speakers` of the others choose, on trials drawn from them, which is a little harder and fair.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from cache.errors import DataError
from cache.manifest import Utterance
from pipeline.audio import Quarantine
from pipeline.corpora.drawn import DrawnTrials
from pipeline.corpora.folder import audio_at, corpus_root, folders, path_in, recordings
from pipeline.corpora.item import Item
from pipeline.corpora.lists import check_relative, lines_of, list_file
from pipeline.corpora.splits import Fractions, split_alone
from pipeline.corpora.trials import Trial, TrialLine, read_list

SID_SPLITS = {"1": "train", "2": "dev", "3": "test"}
RECORDING = re.compile(r"(?P<speaker>id\d{5})/(?P<video>[^/]+)/(?P<number>\d+)\.wav")
ListName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")]


class VoxCeleb1Params(BaseModel, frozen=True, extra="forbid"):
    """VoxCeleb1, or a part of it."""

    kind: Literal["voxceleb1"]
    """Folders as its archives unpack."""
    root: str
    """What holds the folders and lists; may name a variable of the environment: $SPEECH/VoxCeleb1."""
    folders: tuple[str, ...] = Field(min_length=1)
    """Folders of the speakers: [wav], or [dev/wav, test/wav]."""
    iden_split: str | None
    """The list of speaker identification; null leaves that task out."""
    trials: dict[ListName, str]
    """Name -> list of trials: {vox1-o: veri_test2.txt}; {} leaves speaker verification out."""
    dev_speakers: float = Field(ge=0, le=0.5)
    """Part of the speakers of no trial that is dev, in verification and in pretraining."""
    sv: DrawnTrials | None
    """Trials between the dev speakers' recordings, of different videos as in the official lists; null draws none."""


def voxceleb1_items(corpus: str, params: VoxCeleb1Params) -> Iterator[Item]:
    """The recordings, by speaker, video and number; those that a list names and no folder has are quarantined.

    Raises:
        DataError: a folder or list that is missing, a line that cannot be read, a recording in two folders or formats.
    """
    root = corpus_root(corpus, params.root)
    sid = read_iden_split(corpus, root, params)
    tried = {path for rows in trial_lines(corpus, root, params).values() for row in rows for path in row[2:]}
    listed: dict[str, set[str]] = {}
    for path in {*sid, *tried}:
        listed.setdefault(path.split("/")[0], set()).add(path)
    held_out = {path.split("/")[0] for path in tried}
    places: dict[str, list[Path]] = {speaker: [] for speaker in listed}
    for folder in speaker_folders(corpus, root, params):
        places.setdefault(folder.name, []).append(folder)
    for speaker in sorted(places):
        dev = Fractions(dev=params.dev_speakers, test=0)
        split = "test" if speaker in held_out else split_alone(f"voxceleb speaker {speaker}", dev)
        files = files_of(places[speaker])
        for name in sorted(listed.get(speaker, set()) | set(files)):
            file = files.get(name, root / params.folders[0] / name)
            tasks = {"sid": sid[name]} if name in sid else {}
            if params.trials and (split != "test" or name in tried):  # of the test speakers, only what is asked about
                tasks["sv"] = split
            yield recording(corpus, root, name, file, speaker, split, tasks, name in files)


def recording(
    corpus: str, root: Path, name: str, file: Path, speaker: str, split: str, tasks: dict[str, str], there: bool
) -> Item:
    """One recording, named `SPEAKER/VIDEO/NUMBER.wav` in every list."""
    path = path_in(root, file)
    audio = audio_at(root, file)
    if isinstance(audio, Path) and not there:
        audio = Quarantine("a list names it, but there is no such file in the folders")
    elif isinstance(audio, Path) and not RECORDING.fullmatch(name):
        audio = Quarantine("its path is not idNNNNN/VIDEO/NUMBER, so its speaker is not known")
    return Item(
        f"{corpus}/{'/'.join(path.split('/')[-3:]).rsplit('.', 1)[0]}", corpus, path, audio, split, tasks, speaker
    )


def speaker_folders(corpus: str, root: Path, params: VoxCeleb1Params) -> Iterator[Path]:
    """The folders of the speakers, by folder as listed, then name.

    Raises:
        DataError: there is no such folder; the message lists those there are.
    """
    for name in params.folders:
        check_relative(name, f"prepare.sources.{corpus}.folders")
        if not (root / name).is_dir():
            there = ", ".join(f.name for f in folders(root)) or "no folder"
            raise DataError(f"{root} has no folder {name!r}, but {there}; correct prepare.sources.{corpus}.folders")
        yield from folders(root / name)


def files_of(places: list[Path]) -> dict[str, Path]:
    """The recordings of one speaker, by their name in the lists: with .wav, whatever the files have.

    Raises:
        DataError: the same recording in two folders or formats.
    """
    files: dict[str, Path] = {}
    for place in places:
        for video in folders(place):
            for file in recordings(video):
                stem = f"{place.name}/{video.name}/{file.stem}"
                name = f"{stem}.wav"
                if name in files:
                    raise DataError(f"{stem} is there twice: {files[name]} and {file}; remove one")
                files[name] = file
    return files


def read_iden_split(corpus: str, root: Path, params: VoxCeleb1Params) -> dict[str, str]:
    """The split in speaker identification of each recording that takes part.

    Raises:
        DataError: the list is missing, a line is not 1, 2 or 3 and a path, or a path is there twice.
    """
    if params.iden_split is None:
        return {}
    splits: dict[str, str] = {}
    for line in lines_of(list_file(root, params.iden_split, f"prepare.sources.{corpus}.iden_split")):
        code, _, path = line.text.partition(" ")
        if code not in SID_SPLITS or not RECORDING.fullmatch(path):
            raise DataError(
                f"{line.where}: {line.text[:60]!r} is not 1, 2 or 3 and idNNNNN/VIDEO/NUMBER.wav; mend or remove the line"
            )
        if path in splits:
            raise DataError(f"{line.where}: {path} is there twice; remove one")
        splits[path] = SID_SPLITS[code]
    return splits


def trial_lines(corpus: str, root: Path, params: VoxCeleb1Params) -> dict[str, list[TrialLine]]:
    """The lines of every list of trials, by the list's name.

    Raises:
        DataError: as `read_list`; a path of another form, or an answer that the speakers' ids contradict.
    """
    lists = {}
    for name, file in sorted(params.trials.items()):
        lists[name] = read_list(list_file(root, file, f"prepare.sources.{corpus}.trials.{name}"))
        for line in lists[name]:
            first, second = RECORDING.fullmatch(line.first), RECORDING.fullmatch(line.second)
            if first is None or second is None:
                odd = line.second if first else line.first
                raise DataError(f"{line.where}: {odd!r} is not idNNNNN/VIDEO/NUMBER.wav; mend or remove the line")
            if (first["speaker"] == second["speaker"]) != line.same:
                raise DataError(
                    f"{line.where}: its answer {int(line.same)} contradicts the speakers in its paths; mend it"
                )
    return lists


def video_of(utterance: Utterance) -> str:
    """Where a recording comes from: two of one video share more than the voice."""
    return utterance.path.rsplit("/", 1)[0]


def voxceleb1_trials(corpus: str, params: VoxCeleb1Params) -> Iterator[Trial]:
    """The trials of every list, by name, in the words of the manifest."""
    for name, lines in trial_lines(corpus, corpus_root(corpus, params.root), params).items():
        for line in lines:
            first, second = (f"{corpus}/{path.removesuffix('.wav')}" for path in (line.first, line.second))
            yield Trial(f"{corpus}/{name}", line.same, first, second)
