"""A folder of recordings and a table of their labels in, its rows as utterances out.

The table is CSV, TSV or Parquet; which column holds what is a setting, and so are the splits: a column of the table, or a
hash of speakers or of rows. Other columns are left alone. Parquet needs pyarrow, the extra `parquet`.
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from cache.errors import DataError, SettingsError
from pipeline.audio import Part
from pipeline.corpora.drawn import DrawnTrials
from pipeline.corpora.folder import audio_at, corpus_root, path_in
from pipeline.corpora.item import Item
from pipeline.corpora.lists import check_relative, list_file
from pipeline.corpora.splits import Fractions, split_alone
from pipeline.tasks.labels import whole_task

DELIMITERS = {".csv": ",", ".tsv": "\t"}
Row = dict[str, str]


class Columns(BaseModel, frozen=True, extra="forbid"):
    """Names of columns; null where the table has none."""

    path: str
    """The file, relative to the root."""
    id: str | None
    """Unique; null makes it of the path, and of the times where rows are parts of files: calls/1@0.5-2.25."""
    speaker: str | None
    text: str | None
    keyword: str | None
    emotion: str | None
    pronunciation: str | None
    """Phones apart by spaces."""
    start_sec: str | None
    """Where in its file a recording begins; an empty cell is the beginning."""
    end_sec: str | None
    """Where it ends; an empty cell is the end of the file."""


class ByColumn(BaseModel, frozen=True, extra="forbid"):
    """The split that the table says."""

    kind: Literal["column"]
    column: str
    values: dict[str, Literal["train", "dev", "test"] | None]
    """What stands there -> split: {train: train, valid: dev, test: test}; null leaves those rows out."""


class BySpeaker(BaseModel, frozen=True, extra="forbid"):
    """Speakers held back whole, by a hash of their name."""

    kind: Literal["speakers"]
    held_back: Fractions


class ByRow(BaseModel, frozen=True, extra="forbid"):
    """Recordings held back by a hash of their id; speakers are on every side."""

    kind: Literal["rows"]
    held_back: Fractions


class Everything(BaseModel, frozen=True, extra="forbid"):
    """One split for all."""

    kind: Literal["all"]
    split: Literal["train", "dev", "test"]


Splits = Annotated[ByColumn | BySpeaker | ByRow | Everything, Field(discriminator="kind")]


class Namesakes(BaseModel, frozen=True, extra="forbid"):
    """The people of another source."""

    source: str
    """Its name in `prepare.sources`."""
    without: str
    """What the names of speakers begin with here and not there: SPEAKER of SPEAKER0482; "" is nothing."""


class People(BaseModel, frozen=True, extra="forbid"):
    """Speakers who are those of other sources: one whom a probe there holds back is not learned from here."""

    column: str
    """By what stands in this column."""
    of: dict[str, Namesakes]
    """What stands there -> whose people; a speaker of another row is the table's own."""


class TableParams(BaseModel, frozen=True, extra="forbid"):
    """A table of recordings."""

    kind: Literal["table"]
    """CSV, TSV or Parquet with a row per recording."""
    root: str
    """The folder that paths are relative to; may name a variable of the environment."""
    table: str
    """The file, relative to the root; .csv and .tsv have the names of their columns in the first line."""
    columns: Columns
    split: Splits
    """Of pretraining and distillation; a row that this leaves out is no part of the corpus."""
    tasks: dict[str, Splits]
    """Probe task -> its splits: {sid: {kind: rows, ...}}; a row takes part where it has the label of the task."""
    sv: DrawnTrials | None
    """Trials to draw where `tasks` has sv, speaker verification; null draws none."""
    people: People | None
    """Whose speakers these are, where recordings of another source's people come in a table; null: its own."""


NEEDED = {"kws": "keyword", "er": "emotion", "sid": "speaker", "sv": "speaker", "asr": "text", "pr": "pronunciation"}


def table_items(corpus: str, params: TableParams) -> Iterator[Item]:
    """The rows, in the order of the table.

    Raises:
        DataError: a table, column or cell that is missing, a path that leads outside, times that are none.
        SettingsError: a task that needs a label for which no column is named, or speakers without a column.
    """
    check(corpus, params)
    root = corpus_root(corpus, params.root)
    for where, row in rows_of(root, corpus, params):
        item = item_of(corpus, root, where, row, params)
        if item is not None:
            yield item


def check(corpus: str, params: TableParams) -> None:
    """Refuse settings before the first row."""
    setting = f"prepare.sources.{corpus}"
    for task, splits in {"": params.split, **params.tasks}.items():
        if isinstance(splits, BySpeaker) and params.columns.speaker is None:
            raise SettingsError(f"{setting}: splits by speakers need columns.speaker, which is null")
        label = NEEDED.get(whole_task(task))
        if label is not None and getattr(params.columns, label) is None:
            raise SettingsError(f"{setting}.tasks.{task} needs columns.{label}, which is null")
    if params.people is not None and params.columns.speaker is None:
        raise SettingsError(f"{setting}.people needs columns.speaker, which is null")


def named_columns(params: TableParams) -> dict[str, str]:
    """Setting -> name, of every column that the settings name."""
    named = {f"columns.{key}": name for key, name in params.columns if name is not None}
    for key, splits in {"split": params.split, **{f"tasks.{t}": s for t, s in params.tasks.items()}}.items():
        if isinstance(splits, ByColumn):
            named[f"{key}.column"] = splits.column
    if params.people is not None:
        named["people.column"] = params.people.column
    return named


def item_of(corpus: str, root: Path, where: str, row: Row, params: TableParams) -> Item | None:
    """One row as an utterance; None where its split is null."""

    def cell(name: str | None) -> str | None:
        return (row[name] or None) if name is not None else None

    columns = params.columns
    source = cell(columns.path)
    if source is None:
        raise DataError(f"{where}: the column {columns.path!r} is empty; it names the file")
    file = root / check_relative(source, where)
    path = path_in(root, file)
    part = part_of(where, cell(columns.start_sec), cell(columns.end_sec))
    name = cell(columns.id) if columns.id is not None else path.rsplit(".", 1)[0] + times_of(part)
    if name is None:
        raise DataError(f"{where}: the column {columns.id!r} is empty; every row needs an id")
    speaker = cell(columns.speaker)
    split = split_of(where, params.split, row, name, speaker)
    if split is None:
        return None
    tasks = {}
    for task, splits in params.tasks.items():
        label = NEEDED.get(whole_task(task))
        if label is None or cell(getattr(columns, label)) is not None:
            there = split_of(where, splits, row, name, speaker)
            if there is not None:
                tasks[task] = there
    return Item(
        id=f"{corpus}/{name}",
        corpus=corpus,
        path=path,
        audio=audio_at(root, file),
        split=split,
        tasks=tasks,
        speaker=known_as(speaker, row, params.people),
        text=cell(columns.text),
        keyword=cell(columns.keyword),
        emotion=cell(columns.emotion),
        pronunciation=cell(columns.pronunciation),
        part=part,
    )


def known_as(speaker: str | None, row: Row, people: People | None) -> str | None:
    """A speaker by the name that other sources have for them: `librispeech/1089`."""
    namesakes = people.of.get(row[people.column]) if people is not None else None
    if speaker is None or namesakes is None:
        return speaker
    return f"{namesakes.source}/{speaker.removeprefix(namesakes.without)}"


def split_of(where: str, splits: Splits, row: Row, name: str, speaker: str | None) -> str | None:
    """The split of one row; None leaves it out.

    Raises:
        DataError: a value for which the settings have no split, or no speaker.
    """
    match splits:
        case Everything():
            return splits.split
        case ByRow():
            return split_alone(name, splits.held_back)
        case BySpeaker():
            if speaker is None:
                raise DataError(f"{where}: it has no speaker, and splits are by speaker; name one, or remove the row")
            return split_alone(f"speaker {speaker}", splits.held_back)
        case ByColumn():
            value = row[splits.column]
            if value not in splits.values:
                known = ", ".join(splits.values)
                raise DataError(f"{where}: {splits.column} is {value!r}, which `values` does not have: {known}")
            return splits.values[value]


def part_of(where: str, start: str | None, end: str | None) -> Part | None:
    """The part of a file that a row is; None for all of it.

    Raises:
        DataError: a cell that is not seconds, or an end before the start.
    """
    if start is None and end is None:
        return None
    try:
        part = Part(float(start or 0), None if end is None else float(end), None)
    except ValueError:
        raise DataError(f"{where}: {start!r} to {end!r} are not times in seconds; mend the row") from None
    if not 0 <= part.start_sec < (math.inf if part.end_sec is None else part.end_sec) or part.end_sec == math.inf:
        raise DataError(f"{where}: a part from {start} to {end} s has no samples; mend the row")
    return part


def times_of(part: Part | None) -> str:
    """What tells the parts of a file apart in their ids: each time in as many digits as it needs, the end where it is known."""
    if part is None:
        return ""
    times = (part.start_sec,) if part.end_sec is None else (part.start_sec, part.end_sec)
    return "@" + "-".join(repr(time).removesuffix(".0") for time in times)


def rows_of(root: Path, corpus: str, params: TableParams) -> Iterator[tuple[str, Row]]:
    """Where each row stands, and its cells as text.

    Raises:
        DataError: a file that is missing or no table, a row with more or fewer cells, or a column that is not there.
        SettingsError: another suffix, or no pyarrow.
    """
    file = list_file(root, params.table, f"prepare.sources.{corpus}.table")
    suffix = file.suffix.lower()
    if suffix not in (*DELIMITERS, ".parquet"):
        raise SettingsError(f"prepare.sources.{corpus}.table: {params.table!r} does not end in .csv, .tsv or .parquet")
    wanted = {f"prepare.sources.{corpus}.{key}": name for key, name in named_columns(params).items()}
    return parquet_rows(file, wanted) if suffix == ".parquet" else csv_rows(file, wanted, DELIMITERS[suffix])


def check_columns(file: Path, there: list[str], wanted: dict[str, str]) -> None:
    """Refuse a table without a column that the settings name."""
    for setting, name in wanted.items():
        if there.count(name) != 1:
            problem = "no column" if name not in there else "more than one column"
            raise DataError(f"{file} has {problem} {name!r} ({setting}), but {', '.join(there)}")


def csv_rows(file: Path, wanted: dict[str, str], delimiter: str) -> Iterator[tuple[str, Row]]:
    """The rows of a text table."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as text:  # spreadsheets put a mark at the front
            reader = csv.reader(text, delimiter=delimiter, strict=True)
            names = next(reader, [])
            check_columns(file, names, wanted)
            for cells in reader:
                where = f"{file}, line {reader.line_num}"
                if cells and len(cells) != len(names):
                    raise DataError(f"{where}: {len(cells)} cells under {len(names)} columns; mend or quote the row")
                if cells:
                    yield where, dict(zip(names, map(str.strip, cells), strict=True))
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except csv.Error as error:
        raise DataError(f"{file} is not a table of the kind its name says ({error}); save it again") from error


def parquet_rows(file: Path, wanted: dict[str, str]) -> Iterator[tuple[str, Row]]:
    """The rows of a Parquet table, a batch at a time."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise SettingsError(
            f"{file} needs pyarrow to be read; install it with: uv pip install --editable '.[parquet]'"
        ) from None
    try:
        with parquet.ParquetFile(file) as table:
            check_columns(file, table.schema_arrow.names, wanted)
            number = 0
            for batch in table.iter_batches(columns=sorted(set(wanted.values()))):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", {name: cell_text(value) for name, value in row.items()}
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file} is not a Parquet table ({str(error).splitlines()[0]}); save it again") from error


def cell_text(value: Any) -> str:
    """A cell as a text table has it; a missing one is empty."""
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="backslashreplace")
    return "" if value is None or value != value else str(value).strip()  # NaN is pandas' missing
