"""A list file of a corpus in, its lines with their numbers out.

Lists are written by people and by scripts of other projects, and a wrong line is wrong in a way that repeats. So a line
that cannot be used ends the run with its number, while a single bad recording is quarantined.
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from cache.errors import DataError
from pipeline.corpora.folder import leads_inside


class Line(NamedTuple):
    """One line that is not empty."""

    where: str
    """File and number, for messages."""
    text: str


def list_file(root: Path, name: str, setting: str) -> Path:
    """A file that a setting names relative to the root of its corpus.

    Raises:
        DataError: it is missing, or leads out of the corpus.
    """
    check_relative(name, setting)
    path = root / name
    if not leads_inside(root, path):
        raise DataError(f"{path} is a link that leads out of the corpus; put the file there")
    if not path.is_file():
        raise DataError(f"{setting}: there is no file {path}; correct the name or get the file")
    return path


def lines_of(file: Path) -> Iterator[Line]:
    """The lines of a text file without the empty ones.

    Raises:
        DataError: text that is not UTF-8.
    """
    try:
        text = file.read_text(encoding="utf-8-sig")  # spreadsheets put a mark at the front
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: it also breaks at U+2028
        if line.strip():
            yield Line(f"{file}, line {number}", line.strip())


def keyed_lines(file: Path) -> Iterator[tuple[Line, str, str]]:
    """The lines of a file whose first word is a key: the line, the key, and what follows (perhaps nothing).

    Raises:
        DataError: a key that is there twice, or text that is not UTF-8.
    """
    seen: set[str] = set()
    for line in lines_of(file):
        key, *rest = line.text.split(maxsplit=1)
        if key in seen:
            raise DataError(f"{line.where}: {key} is there twice; remove one")
        seen.add(key)
        yield line, key, rest[0] if rest else ""


def check_relative(path: str, where: str) -> str:
    """A path that stays in its corpus, as it is.

    Raises:
        DataError: it is absolute, or goes up.
    """
    pure = PurePosixPath(path)
    if not path or pure.is_absolute() or ".." in pure.parts:
        raise DataError(f"{where}: the path {path!r} leads outside its corpus; make it relative to the root")
    return path


def path_inside(root: Path, path: str, where: str) -> str:
    """A path of a list, relative to the root; one that is absolute may lead into it.

    Raises:
        DataError: it leads outside.
    """
    pure = PurePosixPath(path)
    if pure.is_absolute() and pure.is_relative_to(root.absolute()):
        path = str(pure.relative_to(root.absolute()))
    return check_relative(path, where)
