"""Tables of recordings: CSV, TSV and Parquet, with the columns, splits and faults that people's tables have."""

import csv
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from cache.errors import DataError, SettingsError
from pipeline.audio import Part, Quarantine
from pipeline.corpora.sources import drawn_trials_of
from pipeline.corpora.splits import Fractions, split_alone
from pipeline.corpora.table import TableParams, table_items
from tests.leak_fixtures import apart, manifest_of

ROWS = [
    {
        "file": "a/1.wav",
        "who": "A",
        "said": "HELLO, THERE",
        "set": "train",
        "mood": "happy",
        "from": "",
        "to": "",
        "age": "7",
    },
    {"file": "a/2.wav", "who": "A", "said": "YES", "set": "valid", "mood": "", "from": "0.5", "to": "1.0", "age": ""},
    {"file": "a/2.wav", "who": "B", "said": "", "set": "test", "mood": "sad", "from": "1.0", "to": "", "age": "9"},
    {
        "file": "a/1.wav",
        "who": "B",
        "said": "NO",
        "set": "spare",
        "mood": "sad",
        "from": "0.1",
        "to": "0.2",
        "age": "9",
    },
]
BY_SET = {
    "kind": "column",
    "column": "set",
    "values": {"train": "train", "valid": "dev", "test": "test", "spare": None},
}


def params(root, table="labels.csv", columns=None, **changes) -> TableParams:
    named = {
        "path": "file",
        "id": None,
        "speaker": "who",
        "text": "said",
        "keyword": None,
        "emotion": "mood",
        "pronunciation": None,
        "start_sec": "from",
        "end_sec": "to",
    }
    values = {"kind": "table", "root": str(root), "table": table, "split": BY_SET, "tasks": {"er": BY_SET}}
    values |= {"sv": None, "people": None}
    return TableParams.model_validate({**values, "columns": {**named, **(columns or {})}, **changes})


def write_csv(path: Path, rows=ROWS, delimiter=",") -> None:
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def root(tmp_path) -> Path:
    (tmp_path / "a").mkdir()
    for name in ("1", "2"):
        soundfile.write(tmp_path / "a" / f"{name}.wav", np.zeros(32_000), 16_000)
    write_csv(tmp_path / "labels.csv")
    return tmp_path


def items(root, **changes):
    return list(table_items("t", params(root, **changes)))


def test_rows_are_utterances_with_the_labels_of_the_columns_that_are_named(root):
    first, second, third = items(root)
    assert (first.id, first.path, first.audio, first.part) == ("t/a/1", "a/1.wav", root / "a/1.wav", None)
    assert (first.speaker, first.text, first.emotion, first.split) == ("A", "HELLO, THERE", "happy", "train")
    assert first.tasks == {"er": "train"}
    assert (second.id, second.part, second.split, second.tasks) == ("t/a/2@0.5-1", Part(0.5, 1.0, None), "dev", {})
    assert (third.id, third.part, third.text, third.tasks) == ("t/a/2@1", Part(1.0, None, None), None, {"er": "test"})


def test_tsv_and_parquet_give_what_csv_gives(root):
    write_csv(root / "labels.tsv", delimiter="\t")
    typed = [
        {**r, "from": float(r["from"] or "nan"), "to": float(r["to"] or "nan"), "mood": r["mood"] or None} for r in ROWS
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(typed), root / "labels.parquet")
    assert items(root, table="labels.tsv") == items(root, table="labels.parquet") == items(root)


def test_splits_by_speaker_keep_speakers_whole_and_by_row_share_them_out(root):
    rows = [{**ROWS[0], "file": f"a/{i}.wav", "who": f"s{i % 20}"} for i in range(400)]
    write_csv(root / "labels.csv", rows)
    held_back = {"dev": 0.2, "test": 0.2}
    found = items(
        root,
        split={"kind": "speakers", "held_back": held_back},
        tasks={"sid": {"kind": "rows", "held_back": held_back}},
    )
    splits = {s: {i.split for i in found if i.speaker == s} for s in {i.speaker for i in found}}
    assert all(len(s) == 1 for s in splits.values())
    assert set.union(*splits.values()) == {"train", "dev", "test"}
    assert {i.speaker for i in found if i.tasks["sid"] == "train"} == set(splits)
    assert [i.tasks["sid"] for i in found] == [split_alone(i.id[2:], Fractions(**held_back)) for i in found]
    assert {i.split for i in items(root, split={"kind": "all", "split": "dev"}, tasks={})} == {"dev"}


def test_an_id_may_be_a_column(root):
    rows = [{**row, "age": f"u{n}"} for n, row in enumerate(ROWS)]
    write_csv(root / "labels.csv", rows)
    assert [i.id for i in items(root, columns={"id": "age"})] == ["t/u0", "t/u1", "t/u2"]


def test_segments_of_one_file_that_differ_have_ids_that_differ(root):
    times = [("3725.118", "3726"), ("3725.124", "3726"), ("3725.124", "3727.5"), ("3725.124", ""), ("", "7"), ("", "")]
    write_csv(root / "labels.csv", [{**ROWS[0], "from": start, "to": end} for start, end in times])
    assert [i.id for i in items(root)] == [
        "t/a/1@3725.118-3726",
        "t/a/1@3725.124-3726",
        "t/a/1@3725.124-3727.5",
        "t/a/1@3725.124",
        "t/a/1@0-7",
        "t/a/1",
    ]


def test_a_segment_is_named_by_its_times_and_not_by_how_they_are_written(root):
    rows = [{**ROWS[0], "from": start, "to": end} for start, end in (("1", "2.50"), ("1.000", "2.5"), ("1e0", "25e-1"))]
    write_csv(root / "labels.csv", rows)
    assert {i.id for i in items(root)} == {"t/a/1@1-2.5"}


def test_links_that_leave_are_quarantined(root, tmp_path_factory):
    (root / "a" / "1.wav").unlink()
    (root / "a" / "1.wav").symlink_to(tmp_path_factory.mktemp("elsewhere"))
    assert isinstance(items(root)[0].audio, Quarantine)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"file": "../x.wav"}, r"labels.csv, line 2: the path '../x.wav' leads outside"),
        ({"file": "/etc/x.wav"}, r"line 2: the path '/etc/x.wav' leads outside"),
        ({"file": ""}, r"line 2: the column 'file' is empty"),
        ({"set": "eval"}, r"line 2: set is 'eval', which `values` does not have: train, valid, test, spare"),
        ({"from": "early"}, r"line 2: 'early' to None are not times in seconds"),
        ({"from": "2", "to": "1"}, r"line 2: a part from 2 to 1 s has no samples"),
        ({"from": "nan", "to": "1"}, r"line 2: a part from nan to 1 s has no samples"),
        ({"from": "-1"}, r"line 2: a part from -1 to None s has no samples"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(root, change, message):
    write_csv(root / "labels.csv", [{**ROWS[0], **change}])
    with pytest.raises(DataError, match=message):
        items(root)


def test_an_empty_speaker_or_id_where_one_is_needed_is_named(root):
    write_csv(root / "labels.csv", [{**ROWS[0], "who": "", "age": ""}])
    with pytest.raises(DataError, match="line 2: it has no speaker, and splits are by speaker"):
        items(root, split={"kind": "speakers", "held_back": {"dev": 0.1, "test": 0.1}})
    with pytest.raises(DataError, match="line 2: the column 'age' is empty; every row needs an id"):
        items(root, columns={"id": "age"})


def test_tables_that_cannot_be_read_are_named(root):
    with pytest.raises(DataError, match=r"has no column 'sex' \(prepare.sources.t.columns.speaker\), but file, who"):
        items(root, columns={"speaker": "sex"})
    with pytest.raises(DataError, match=r"has no column 'fold' \(prepare.sources.t.split.column\)"):
        items(root, split={**BY_SET, "column": "fold"})
    with pytest.raises(DataError, match=r"sources.t.table: there is no file"):
        items(root, table="lost.csv")
    with pytest.raises(DataError, match=r"sources.t.table: the path '../labels.csv' leads outside"):
        items(root, table="../labels.csv")
    (root / "labels.xlsx").touch()
    with pytest.raises(SettingsError, match=r"'labels.xlsx' does not end in .csv, .tsv or .parquet"):
        items(root, table="labels.xlsx")
    (root / "labels.parquet").write_text("file,who")
    with pytest.raises(DataError, match=r"labels.parquet is not a Parquet table"):
        items(root, table="labels.parquet")
    head = "file,who,said,set,mood,from,to\n"
    for text, message in (
        (head + "a/1.wav,A\n", "line 2: 2 cells under 7 columns"),
        (head + '"a/1.wav,A\n', "is not a table of the kind its name says"),
        ("who," + head, "has more than one column 'who'"),
        ("", "has no column 'file'"),
    ):
        (root / "labels.csv").write_text(text)
        with pytest.raises(DataError, match=message):
            items(root)
    (root / "labels.csv").write_bytes(b"file,who\nCAF\xc9,A\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        items(root)


def test_tasks_without_their_label_are_refused(root):
    with pytest.raises(SettingsError, match=r"sources.t.tasks.kws needs columns.keyword, which is null"):
        items(root, tasks={"kws": BY_SET})
    with pytest.raises(SettingsError, match=r"splits by speakers need columns.speaker, which is null"):
        items(root, columns={"speaker": None}, split={"kind": "speakers", "held_back": {"dev": 0.1, "test": 0.1}})


def test_folds_of_a_task_need_its_label_too(root):
    folds = {"er-1": BY_SET, "er-2": BY_SET}
    assert [i.tasks for i in items(root, tasks=folds)] == [
        {"er-1": "train", "er-2": "train"},
        {},  # no mood
        {"er-1": "test", "er-2": "test"},
    ]
    with pytest.raises(SettingsError, match=r"sources.t.tasks.er-1 needs columns.emotion, which is null"):
        items(root, columns={"emotion": None}, tasks=folds)


def test_parquet_without_pyarrow_says_how_to_get_it(root, monkeypatch):
    (root / "labels.parquet").touch()
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        SettingsError, match=r"needs pyarrow to be read; install it with: uv pip install --editable '\.\[parquet\]'"
    ):
        items(root, table="labels.parquet")


COPIES = {
    "column": "set",
    "of": {"train": {"source": "books", "without": ""}, "valid": {"source": "words", "without": "SPEAKER"}},
}


def test_people_of_other_sources_go_by_their_names_there(root):
    rows = [
        {**ROWS[0], "who": "SPEAKER0048", "set": s, "from": str(n)} for n, s in enumerate(("train", "valid", "test"))
    ]
    write_csv(root / "labels.csv", rows)
    assert [i.speaker for i in items(root, people=COPIES)] == ["books/SPEAKER0048", "words/0048", "SPEAKER0048"]
    with pytest.raises(SettingsError, match=r"sources\.t\.people needs columns\.speaker"):
        items(root, columns={"speaker": None}, people=COPIES)
    with pytest.raises(DataError, match=r"no column 'corpus' .*people\.column"):
        items(root, people={**COPIES, "column": "corpus"})


def test_who_is_tested_elsewhere_is_not_learned_from_in_a_copy(root):
    rows = [{**ROWS[0], "who": who, "set": "train", "from": str(n)} for n, who in enumerate(("1089", "19", "1089"))]
    write_csv(root / "labels.csv", rows)
    everyone = {"kind": "all", "split": "train"}
    copies = items(root, people=COPIES, split=everyone, tasks={"sv": everyone})
    tested = [
        replace(i, id=f"books/{n}", corpus="books", speaker="1089", tasks={"sv": "test"}, split="test")
        for n, i in enumerate(copies[:1])
    ]
    manifest, leaks = apart([*copies, *tested], {"sv"})
    assert {(leak.task, leak.leaves.speaker) for leak in leaks} == {("sv", "books/1089"), ("pretraining", "books/1089")}
    assert [(u.split, u.tasks) for u in manifest] == [
        ("test", {}),
        ("train", {"sv": "train"}),
        ("test", {}),
        ("test", {"sv": "test"}),
    ]


def test_trials_are_drawn_where_the_table_has_verification(root):
    rows = [{**ROWS[0], "who": f"s{n % 3}", "said": f"words {n}", "from": str(n)} for n in range(9)]
    write_csv(root / "labels.csv", rows)
    everyone = {"kind": "all", "split": "test"}
    trials = {"dev": None, "test": {"same": 9, "different": 27}}
    settings = params(root, split=everyone, tasks={"sv": everyone}, sv=trials)
    manifest = manifest_of(table_items("t", settings))
    drawn = drawn_trials_of("t", settings, manifest)
    assert len({frozenset((t.first, t.second)) for t in drawn}) == 36
    with pytest.raises(DataError, match=r"t/test: 0 utterances of 0 speakers give 0 trials"):
        drawn_trials_of("t", settings, manifest_of(items(root, split=everyone, tasks={"asr": everyone})))
