"""The root of a corpus as a person wrote it in, a folder and its safe, sorted contents out.

Recordings are named by people and unpacked from archives: a name may not be text, and a link may lead anywhere. Such a
file is quarantined by name; it is neither followed nor dropped in silence.
"""

import os
import re
from pathlib import Path

from cache.errors import DataError, SettingsError
from pipeline.audio import Quarantine

SUFFIXES = (".flac", ".wav", ".ogg", ".opus", ".mp3")
VARIABLE = re.compile(r"\$(\w+)")


def corpus_root(corpus: str, root: str) -> Path:
    """The folder that the setting `root` of a source means, which is there.

    Raises:
        DataError: as `expand_root`, or there is no such folder.
    """
    folder = expand_root(corpus, root)
    if not folder.is_dir():
        raise DataError(f"prepare.sources.{corpus}.root: there is no folder {folder}; correct it or get the corpus")
    return folder


def expand_root(corpus: str, root: str, setting: str = "root") -> Path:
    """The place that a setting of a source means; `$NAME` in it is a variable of the environment.

    Raises:
        DataError: the variable is not set.
        SettingsError: a variable in braces, which `dvc exp run -S` takes for one of its own and fails on.
    """
    if "${" in root:
        raise SettingsError(
            f"prepare.sources.{corpus}.{setting} is {root!r}: write the variable without braces, $NAME/folder"
        )
    for name in VARIABLE.findall(root):
        if name not in os.environ:
            raise DataError(
                f"prepare.sources.{corpus}.{setting} is {root!r} and the variable {name} is not set; "
                f"set it to the folder of your corpora (export {name}=...)"
            )
    return Path(VARIABLE.sub(lambda match: os.environ[match[1]], root)).expanduser()


def folders(folder: Path) -> list[Path]:
    """The folders in a folder, by name."""
    return sorted(entry for entry in folder.iterdir() if entry.is_dir())


def recordings(folder: Path) -> list[Path]:
    """The files in a folder that are named like audio, by name."""
    return sorted(entry for entry in folder.iterdir() if entry.suffix.lower() in SUFFIXES and not entry.is_dir())


def audio_at(root: Path, file: Path) -> Path | Quarantine:
    """The file, or why it is not touched."""
    if path_in(root, file) != file.relative_to(root).as_posix():
        return Quarantine("its path is not UTF-8; rename it")
    if not leads_inside(root, file):
        return Quarantine("a link that leads out of the corpus; copy the file, or take the folder it is in as root")
    return file


def leads_inside(root: Path, file: Path) -> bool:
    """Whether a file, its links followed, lies in its corpus; true of a circle of links, which cannot be opened."""
    return Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root))


def text_of(name: str) -> str:
    """A file name that can be written to a text file: bytes that are not UTF-8 as `\\xff`."""
    return os.fsencode(name).decode("utf-8", errors="backslashreplace")


def path_in(root: Path, file: Path) -> str:
    """The path of a file relative to its corpus, with forward slashes, as text."""
    return text_of(file.relative_to(root).as_posix())


def count_recordings(folder: Path) -> int:
    """How many files under a folder are named like audio; links to folders are not followed, so it ends."""
    return sum(Path(name).suffix.lower() in SUFFIXES for _, _, names in os.walk(folder) for name in names)
