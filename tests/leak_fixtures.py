"""The items of a corpus in, what `prepare` would make of their splits out; and a second way to see that splits are apart."""

from collections.abc import Iterable
from pathlib import Path

from cache.manifest import Manifest, Utterance
from pipeline.corpora.item import Item
from pipeline.tasks.labels import TASKS, folds_of
from pipeline.tasks.leaks import Leak, check, without_leaks

MD5_OF_SAMPLES = slice(26, 42)  # of a FLAC file: fLaC, the head of the first block, and the end of STREAMINFO


def samples_of(file: Path) -> str:
    """What tells samples apart without decoding them."""
    with open(file, "rb") as flac:
        head = flac.read(42)
    assert head[:4] == b"fLaC"
    return head[MD5_OF_SAMPLES].hex()


def manifest_of(items: Iterable[Item], decoded: bool = False) -> Manifest:
    """The rows of what is not quarantined; without `decoded`, the silent files of a miniature are as if of other samples."""
    rows = []
    for item in items:
        if isinstance(item.audio, Path):
            rows.append(
                Utterance(
                    id=item.id,
                    corpus=item.corpus,
                    path=item.path,
                    samples=16_000,
                    rate_hz=16_000,
                    file_samples=16_000,
                    file_bytes=1,
                    audio=samples_of(item.audio) if decoded else item.id,
                    split=item.split,
                    tasks=item.tasks,
                    speaker=item.speaker,
                    text=item.text,
                    phones=item.phones,
                    keyword=item.keyword,
                    emotion=item.emotion,
                    pronunciation=item.pronunciation,
                )
            )
    return Manifest(tuple(rows))


def assert_apart(manifest: Manifest, tasks: set[str]) -> None:
    """Speakers, sentences and samples of the splits of exactly these tasks, counted here, not by the code under test."""
    assert {name.split("-")[0] for u in manifest for name in u.tasks} == tasks
    for task in tasks:
        for fold in folds_of(manifest, TASKS[task]):
            rows = {s: [u for u in manifest if u.tasks.get(fold.name) == s] for s in ("train", "dev", "test")}
            assert rows["train"], fold.name
            assert rows["test"], fold.name
            for a, b in (("train", "test"), ("dev", "test"), ("train", "dev")):
                assert not {u.audio for u in rows[a]} & {u.audio for u in rows[b]}, (fold.name, a, b)
                said = [{(u.speaker, (u.text or u.id).lower()) for u in rows[s]} for s in (a, b)]
                if task == "sid":
                    assert not said[0] & said[1], (fold.name, a, b)
                elif fold.name == task or b == "test":  # in folds, dev is of the voices of train
                    assert not {u.speaker for u in rows[a]} & {u.speaker for u in rows[b]}, (fold.name, a, b)
                if task in ("pr", "asr"):
                    assert not {text for _, text in said[0]} & {text for _, text in said[1]}, (fold.name, a, b)
            if task != "sid":
                heard = {u.speaker for u in manifest if u.split == "train"}
                assert not heard & {u.speaker for s in ("dev", "test") for u in rows[s]}, fold.name
        check(manifest, TASKS[task])


def apart(items: Iterable[Item], tasks: set[str], decoded: bool = False) -> tuple[Manifest, list[Leak]]:
    """What `prepare` makes of a corpus, in which nothing leaks, and what had to leave for it."""
    manifest, leaks = without_leaks(manifest_of(items, decoded))
    assert_apart(manifest, tasks)
    return manifest, list(leaks)
