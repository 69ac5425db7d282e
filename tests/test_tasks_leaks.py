"""Splits that cannot leak: what is planted is found in every task, and what `prepare` leaves has none."""

from dataclasses import replace

import pytest

from cache.errors import DataError
from cache.manifest import Manifest, Utterance
from pipeline.tasks.labels import TASKS
from pipeline.tasks.leaks import APART, check, heard_of, leaks_of, task_names, told, without_leaks

SPLITS = ("train", "dev", "test")


def utterance(number: int, split: str, tasks: dict[str, str], **changes) -> Utterance:
    values = {
        "id": f"c/{number:02d}",
        "corpus": "c",
        "path": f"{number}.wav",
        "samples": 16_000,
        "rate_hz": 16_000,
        "file_samples": 16_000,
        "file_bytes": 1,
        "audio": f"{number:032x}",
        "split": split,
        "tasks": tasks,
        "speaker": f"{split} {number % 2}",
        "text": f"sentence {number}",
        "keyword": "yes",
        "emotion": "happy",
        "pronunciation": f"P {number}",
    }
    return Utterance(**{**values, **changes})


def apart(task: str) -> list[Utterance]:
    """Twelve utterances in which nothing is shared; in identification the speakers are, as they have to be."""
    rows = []
    for number in range(12):
        split = SPLITS[number // 2 % 3]
        speaker = f"one of two {number % 2}" if task == "sid" else f"{split} {number % 2}"
        rows.append(utterance(number, split, {task: split}, speaker=speaker))
    return rows


def planted(rows: list[Utterance], **changes) -> Manifest:
    """The first utterance, of train, with something of the last, of test."""
    return Manifest((replace(rows[0], **changes), *rows[1:]))


def refused(manifest: Manifest, task: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        check(manifest, TASKS[task])
    clean, leaks = without_leaks(manifest)
    assert leaks
    check(clean, TASKS[task])
    tests = [{(u.id, name) for u in m for name, split in u.tasks.items() if split == "test"} for m in (manifest, clean)]
    assert tests[0] == tests[1], "the test stays whole"


@pytest.mark.parametrize("task", sorted(APART))
def test_splits_that_share_nothing_are_let_through(task):
    manifest = Manifest(tuple(apart(task)))
    check(manifest, TASKS[task])
    assert without_leaks(manifest) == (manifest, ())


@pytest.mark.parametrize("task", sorted(APART))
@pytest.mark.parametrize("split", ["train", "dev"])
def test_the_same_samples_in_two_splits_are_refused_in_every_task(task, split):
    rows = apart(task)
    at = SPLITS.index(split) * 2
    rows[at] = replace(rows[at], audio=rows[-1].audio)
    refused(
        Manifest(tuple(rows)), task, rf"c/0{at} is in {split} of '{task}' .* same samples as c/11, which is in test"
    )


@pytest.mark.parametrize("task", sorted(set(APART) - {"sid"}))
def test_a_voice_in_two_splits_is_refused_where_voices_are_asked_about(task):
    rows = apart(task)
    refused(planted(rows, speaker=rows[-1].speaker), task, "same speaker as c/05, which is in test")
    check(planted(rows, speaker=None), TASKS[task])


@pytest.mark.parametrize("task", ["pr", "asr"])
def test_a_sentence_in_two_splits_is_refused_where_it_could_be_learned_by_heart(task):
    rows = apart(task)
    same = " ".join(rows[-1].text.upper().split(" ")) + "  "
    refused(planted(rows, text=same), task, "same sentence as c/11, which is in test")
    phones = [replace(u, text=None) for u in rows]
    refused(planted(phones, pronunciation=rows[-1].pronunciation), task, "same sentence as c/11")
    check(planted(rows, text=None, pronunciation=None), TASKS[task])


def test_dev_hears_nothing_of_train_either():
    rows = apart("asr")
    refused(planted(rows, text=rows[2].text), "asr", "in train of 'asr' .* same sentence as c/02, which is in dev")


@pytest.mark.parametrize("task", sorted(set(APART) - {"asr", "pr"}))
def test_sentences_may_repeat_where_nobody_is_asked_for_them(task):
    rows = apart(task)
    check(planted(rows, text=rows[-1].text), TASKS[task])


def test_identification_never_has_a_recording_twice_also_in_another_format():
    rows = apart("sid")
    copy = {"speaker": rows[-1].speaker, "text": rows[-1].text}
    refused(planted(rows, **copy), "sid", "same speaker and sentence as c/11")
    there = {"corpus": "copies", "id": "copies/00", **copy, "speaker": f"c/{rows[-1].speaker}"}
    refused(planted(rows, **there), "sid", "copies/00 .* same speaker and sentence as c/11")


def test_people_are_compared_over_corpora_by_corpus_and_name():
    rows = apart("kws")
    namesake = planted(rows, corpus="d", speaker=rows[-1].speaker)
    check(namesake, TASKS["kws"])
    known = planted(rows, corpus="d", speaker=f"c/{rows[-1].speaker}")
    refused(known, "kws", "same speaker")


FOLDS = [
    utterance(n, "test", {f"er-{fold}": ("test" if n % 3 == fold - 1 else SPLITS[n // 6]) for fold in (1, 2, 3)})
    for n in range(12)
]
FOLDS = [replace(u, speaker=f"Ses0{n % 3}{'FM'[n % 2]}") for n, u in enumerate(FOLDS)]


def test_folds_share_voices_between_train_and_dev_but_not_with_the_test():
    manifest = Manifest(tuple(FOLDS))
    speakers = {s: {u.speaker for u in FOLDS if u.tasks["er-1"] == s} for s in SPLITS}
    assert speakers["train"] & speakers["dev"]
    assert not speakers["test"] & (speakers["train"] | speakers["dev"])
    check(manifest, TASKS["er"])
    refused(Manifest((*FOLDS[:-1], replace(FOLDS[-1], speaker="Ses00F"))), "er", "of 'er-1' .* same speaker")
    copy = Manifest((*FOLDS[:-1], replace(FOLDS[-1], audio=FOLDS[0].audio)))
    refused(copy, "er", "same samples")


@pytest.mark.parametrize("task", sorted(set(APART) - {"sid"}))
def test_pretraining_hears_nobody_whom_a_probe_holds_back(task):
    rows = apart(task)
    also = utterance(50, "train", {}, speaker=rows[-1].speaker)
    refused(
        Manifest((*rows, also)), task, "c/50 is in the training split of pretraining and has the same speaker as c/05"
    )
    samples = replace(also, speaker="nobody", audio=rows[-1].audio)
    refused(
        Manifest((*rows, samples)),
        task,
        "c/50 is in the training split of pretraining and has the same samples as c/11",
    )
    itself = Manifest((*rows[:-1], replace(rows[-1], split="train")))
    refused(itself, task, "c/11 is in the training split of pretraining")
    clean, _ = without_leaks(itself)
    assert clean.by_id["c/11"].split == "test"


def test_of_identification_pretraining_may_hear_the_voices_and_prepare_says_how_often():
    rows = [replace(u, split="train") for u in apart("sid")]
    manifest = Manifest(tuple(rows))
    check(manifest, TASKS["sid"])
    assert list(heard_of(manifest, ["sid"])) == []
    assert told(manifest, ()) == [
        "sid: 8 of its dev and test utterances are heard in pretraining, without their speaker"
    ]


def test_what_leaves_one_task_stays_in_the_others():
    rows = [replace(u, tasks={"asr": u.split, "kws": u.split}) for u in apart("asr")]
    manifest = planted(rows, text=rows[-1].text)
    clean, leaks = without_leaks(manifest)
    assert clean.by_id["c/00"].tasks == {"kws": "train"}
    assert clean.by_id["c/00"].split == "train"
    assert clean.audio_digest == manifest.audio_digest
    assert told(clean, leaks) == [
        "asr leaves out 1 of c, same sentence as what is held back; the first is c/00, for c/11"
    ]


def test_what_is_left_never_leaks_whatever_was_mixed():
    import numpy as np

    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = []
        for number in range(60):
            split = SPLITS[rng.integers(3)]
            tasks = {
                t: SPLITS[rng.integers(3)]
                for t in ("kws", "pr", "asr", "sv", "sid", "er-1", "er-2")
                if rng.random() < 0.5
            }
            few = {"speaker": f"s{rng.integers(12)}", "text": f"t{rng.integers(40)}", "audio": f"a{rng.integers(50)}"}
            rows.append(utterance(number, split, tasks, **few))
        clean, leaks = without_leaks(Manifest(tuple(rows)))
        assert leaks
        for name in task_names(clean):
            assert not list(leaks_of(clean, name))
        assert not list(heard_of(clean, task_names(clean)))
        assert without_leaks(clean) == (clean, ())
