"""Lists of verification trials in, one JSON line per trial in the words of the manifest out, and back.

A trial is a question to speaker verification: are these two recordings the same voice? Lists name recordings by their
path in the corpus, a probe knows utterances by their id, so `prepare` translates: a probe needs no corpus folder.
"""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cache.errors import DataError
from cache.publish import publish_file
from pipeline.corpora.lists import check_relative, lines_of


class Trial(NamedTuple):
    """Two utterances, and whether one person said both."""

    list: str
    """Corpus and name of the list: `voxceleb1/vox1-o`."""
    same: bool
    first: str
    second: str


class TrialLine(NamedTuple):
    """A line of a list, before its paths are utterances."""

    where: str
    same: bool
    first: str
    second: str


class Kept(NamedTuple):
    """The trials that can be scored, and how many cannot."""

    trials: tuple[Trial, ...]
    left_out: int


def read_list(file: Path) -> list[TrialLine]:
    """A list in VoxCeleb's format: `1 PATH PATH` for the same speaker, `0 PATH PATH` for two.

    Raises:
        DataError: another line, a path that leads outside, a recording against itself, a list of one kind only.
    """
    found = []
    for line in lines_of(file):
        match line.text.split():
            case ["0" | "1" as same, first, second]:
                check_relative(first, line.where)
                check_relative(second, line.where)
                if first == second:
                    raise DataError(f"{line.where}: {first} is compared with itself; remove the line")
                found.append(TrialLine(line.where, same == "1", first, second))
            case _:
                raise DataError(f"{line.where}: {line.text[:60]!r} is not `0` or `1` and two paths; mend or remove it")
    if len({trial.same for trial in found}) < 2:
        raise DataError(f"{file} needs trials of both kinds, 1 for the same speaker and 0 for two; get the whole list")
    return found


def keep_known(trials: Iterable[Trial], ids: Collection[str]) -> Kept:
    """The trials whose two utterances are in the manifest; the others were quarantined, and are counted.

    Raises:
        DataError: a list of which nothing, or only one kind, is left.
    """
    everything = list(trials)
    kept = tuple(t for t in everything if t.first in ids and t.second in ids)
    for name in dict.fromkeys(t.list for t in everything):
        if len({t.same for t in kept if t.list == name}) < 2:
            raise DataError(
                f"the trials of {name} cannot be scored: their recordings are quarantined; see why, and mend"
            )
    return Kept(kept, len(everything) - len(kept))


def split_of(trial: Trial, splits: Mapping[str, str]) -> str:
    """ "dev" or "test": the split in speaker verification of both utterances, given that of each that takes part.

    Raises:
        DataError: one utterance is in dev and the other in test, or one of them trains or takes no part.
    """
    first, second = (splits.get(name, "none") for name in (trial.first, trial.second))
    if first != second or first not in ("dev", "test"):
        raise DataError(
            f"a trial of {trial.list} asks about {trial.first} (in task 'sv': {first}) and {trial.second} ({second}); "
            "both must be dev or both test: correct the list or the splits of the corpus, and run `decant prepare` again"
        )
    return first


def write_trials(path: Path, trials: Sequence[Trial]) -> None:
    """Publish trials, one JSON object per line; none is an empty file."""
    with publish_file(path) as partial:
        partial.write_text("".join(json.dumps(t._asdict(), ensure_ascii=False) + "\n" for t in trials), "utf-8")


def read_trials(path: Path, ids: Collection[str]) -> tuple[Trial, ...]:
    """Read trials back, and hold them against the utterances of a manifest.

    Raises:
        DataError: no such file, a line that is no trial, or an utterance that is not in the manifest.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist; write it with `decant prepare --trials {path}`")
    trials = []
    for line in lines_of(path):
        try:
            row: Any = json.loads(line.text)
        except json.JSONDecodeError as error:
            raise DataError(f"{line.where}: not a JSON object ({error.msg}); each line is one trial") from error
        if not isinstance(row, dict) or set(row) != set(Trial._fields) or not isinstance(row["same"], bool):
            raise DataError(f"{line.where}: a trial has the keys {', '.join(Trial._fields)}, and no others")
        trial = Trial(**row)
        if absent := [u for u in (trial.first, trial.second) if u not in ids]:
            raise DataError(f"{line.where}: {absent[0]} is not in the manifest; run `decant prepare` for both again")
        trials.append(trial)
    return tuple(trials)
