"""The manifest: a round trip, and a message for everything that can be wrong with one."""

import json
from dataclasses import replace

import pytest

from cache.errors import DataError
from cache.manifest import Manifest, Utterance, read_manifest, write_manifest


def utterance(name="a/1", **changes):
    base = Utterance(
        id=name,
        corpus="a",
        path="x/1.flac",
        samples=16_000,
        rate_hz=16_000,
        file_samples=16_000,
        file_bytes=100,
        audio="0" * 32,
        split="train",
        tasks={"kws": "train"},
        speaker="s1",
        phones=(("ə", 0, 800),),
        keyword="yes",
    )
    return replace(base, **changes)


def write_lines(path, *changes):
    """A manifest file whose rows are broken on purpose."""
    rows = []
    for number, change in enumerate(changes):
        write_manifest(path, Manifest((utterance(f"a/{number}"),)))
        rows.append({**json.loads(path.read_text(encoding="utf-8")), **change})
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if v != "DROP"}) + "\n" for row in rows))
    return path


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    manifest = Manifest((utterance("a/1"), utterance("a/2", text="naïve — 日本", phones=None, keyword=None)))
    write_manifest(tmp_path / "m.jsonl", manifest)
    again = read_manifest(tmp_path / "m.jsonl")
    assert again == manifest
    assert again.digest == manifest.digest
    assert again.by_id["a/2"].text == "naïve — 日本"


def test_a_corrected_label_changes_the_manifest_but_not_the_audio():
    before, after = Manifest((utterance(),)), Manifest((utterance(keyword="no"),))
    assert before.digest != after.digest
    assert before.audio_digest == after.audio_digest
    assert Manifest((utterance(audio="1" * 32),)).audio_digest != before.audio_digest


def test_selections_keep_the_order():
    manifest = Manifest(tuple(utterance(f"a/{i}", split="dev" if i % 2 else "train", tasks={}) for i in range(6)))
    assert [u.id for u in manifest.select(split="dev")] == ["a/1", "a/3", "a/5"]
    assert len(manifest.select(task="kws")) == len(manifest.labelled()) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([{}, {"id": "a/0"}], r"line 2: the id 'a/0' is already on line 1; ids must be unique"),
        ([{"path": "../secret.wav"}], r"'../secret.wav' of a/0 leads outside its corpus"),
        ([{"path": "/etc/passwd"}], r"'/etc/passwd' of a/0 leads outside"),
        ([{"samples": 399}], r"a/0 has 399 samples, fewer than the 400 of one frame"),
        ([{"split": "training"}], r"split of a/0 is 'training'; choose one of train, dev, test"),
        ([{"tasks": {"kws": "valid"}}], r"kws of a/0 is 'valid'; choose one of"),
        ([{"speeker": "x"}], r"unknown key 'speeker'; known are"),
        ([{"audio": "DROP"}], r"the key 'audio' is missing; rebuild the manifest"),
        ([{"samples": "many"}], r"samples is 'many', which is not int"),
        ([{"samples": True}], r"samples is True, which is not int"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read_manifest(write_lines(tmp_path / "m.jsonl", *changes))


def test_missing_empty_and_broken_files_are_named(tmp_path):
    path = tmp_path / "m.jsonl"
    with pytest.raises(DataError, match=r"does not exist; write it with `decant prepare`"):
        read_manifest(path)
    path.write_text("\n")
    with pytest.raises(DataError, match=r"holds no utterance; check prepare.sources"):
        read_manifest(path)
    path.write_text("[1, 2]\n")
    with pytest.raises(DataError, match=r"line 1: '\[1, 2\]' is not a JSON object"):
        read_manifest(path)
    path.write_text('{"id": \n')
    with pytest.raises(DataError, match=r"line 1: not a JSON object"):
        read_manifest(path)
    path.write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(DataError, match=r"is not UTF-8 text"):
        read_manifest(path)


def test_windows_line_ends_are_read(tmp_path):
    path = tmp_path / "m.jsonl"
    write_manifest(path, Manifest((utterance(),)))
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(read_manifest(path)) == 1
