"""What each task learns from and is judged by, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from cache.errors import DataError, SettingsError
from cache.manifest import Manifest, Utterance
from pipeline.corpora.trials import Trial
from pipeline.finetune.examples import examples_of
from pipeline.finetune.judge import error_rates
from pipeline.tasks.eer import DetectionCost
from tests.finetune_fixtures import TUNED, params

SPEAKERS = {"train": "abc", "dev": "de", "test": "fg"}


def utterance(split, speaker, number, **tasks):
    name = f"{speaker}{number}"
    audio = (f"{name:0>32}", split)
    facts = (name, "toy", name, 8_000, 16_000, 8_000, 16_000)
    return Utterance(*facts, *audio, tasks, speaker=speaker, keyword=("yes", "no")[number % 2])


MANIFEST = Manifest(
    tuple(
        utterance(split, speaker, number, kws=split, sv=split)
        for split, speakers in SPEAKERS.items()
        for speaker in speakers
        for number in range(4)
    )
)
TRIALS = (
    Trial("toy/dev", True, "d0", "d1"),
    Trial("toy/dev", False, "d0", "e1"),
    Trial("toy/test", True, "f0", "f1"),
    Trial("toy/test", False, "f0", "g1"),
    Trial("toy/hard", True, "g0", "g1"),
    Trial("toy/hard", False, "f3", "g3"),
)
TASKS = params(tasks={"sv": {**TUNED["tasks"]["sv"], "list": "toy/test"}}).tasks


def changed(names, **changes):
    return Manifest(tuple(replace(u, **changes) if u.id in names else u for u in MANIFEST))


def test_tasks_are_sorted_into_what_is_learned_and_what_is_judged():
    examples = examples_of(TASKS, MANIFEST, TRIALS)
    assert examples.classes == {"kws": ("no", "yes"), "sv": ("toy/a", "toy/b", "toy/c")}
    assert examples.train["sv"].ids == tuple(f"{s}{n}" for s in "abc" for n in range(4))
    assert examples.train["sv"].classes == (0,) * 4 + (1,) * 4 + (2,) * 4
    assert examples.judged("dev")["sv"] == ["d0", "d1", "e1"]
    assert examples.judged("test")["sv"] == ["f0", "f1", "g1", "f3", "g0", "g3"]
    assert examples.judged("test")["kws"] == [f"{s}{n}" for s in "fg" for n in range(4)]
    assert [asked.name for asked in examples.trials("test")] == ["toy/test", "toy/hard"]
    assert examples.ids(MANIFEST) == [u.id for u in MANIFEST]


def test_lists_of_dev_are_judged_one_by_one():
    """Each list is told apart without an error, though the thresholds of one would fail the other."""
    others = (Trial("toy/easy", True, "d2", "d3"), Trial("toy/easy", False, "d2", "e3"))
    (dev,) = examples_of(TASKS, MANIFEST, (*TRIALS, *others)).trials("dev")
    cost = DetectionCost(p_target=0.5, miss=1.0, false_alarm=1.0)
    of_list = np.where(dev.lists == dev.lists[0], 0.0, 10.0)
    assert error_rates(of_list + dev.same, dev, cost) == {"sv_eer": 0, "sv_min_dcf": 0}
    assert error_rates(of_list - dev.same, dev, cost) == {"sv_eer": 1, "sv_min_dcf": 1}
    half_wrong = np.where(of_list == 0, dev.same, ~dev.same)
    assert error_rates(of_list + half_wrong, dev, cost) == {"sv_eer": 0.5, "sv_min_dcf": 0.5}


@pytest.mark.parametrize(("learns", "asks"), [("kws", "sv"), ("sv", "kws")])
def test_what_one_task_asks_the_other_does_not_train_on(learns, asks):
    """Each task alone is clean: its own splits have no voice in common."""
    moved = [replace(u, tasks={**u.tasks, learns: "train" if u.speaker == "f" else u.tasks[learns]}) for u in MANIFEST]
    told = rf"f0 is in train of '{learns}' and has the same \w+ as f0, which is in test of '{asks}'.*both"
    with pytest.raises(DataError, match=told):
        examples_of(TASKS, Manifest(tuple(moved)), TRIALS)
    alone = TASKS.model_copy(update={"sv": None})
    assert examples_of(alone, Manifest(tuple(moved)), None).sv is None


def test_one_task_reads_only_its_own():
    kws = TASKS.model_copy(update={"sv": None})
    examples = examples_of(kws, MANIFEST, None)
    assert list(examples.train) == list(examples.classes) == list(examples.judged("dev")) == ["kws"]


def test_what_is_learned_from_has_a_digest_that_labels_trials_and_audio_change():
    first = examples_of(TASKS, MANIFEST, TRIALS).digest(MANIFEST)
    assert examples_of(TASKS, MANIFEST, TRIALS).digest(MANIFEST) == first
    others = [
        (changed({"a0"}, keyword="no"), TRIALS),
        (changed({"a0"}, audio="f" * 32), TRIALS),
        (MANIFEST, TRIALS[:4]),
    ]
    digests = {examples_of(TASKS, manifest, trials).digest(manifest) for manifest, trials in others}
    assert len(digests | {first}) == 4
    relisted = changed({"a0"}, phones=(("a", 0, 8_000),))  # of no concern here
    assert examples_of(TASKS, relisted, TRIALS).digest(relisted) == first


@pytest.mark.parametrize(
    ("manifest", "trials", "told"),
    [
        (MANIFEST, (*TRIALS, Trial("toy/dev", False, "d0", "f1")), r"d0 \(in task 'sv': dev\) and f1 \(test\)"),
        (changed({"d0"}, speaker="a"), TRIALS, "has the same speaker as"),
        (changed({"a0"}, audio=MANIFEST.by_id["f0"].audio), TRIALS, "has the same samples as f0"),
        (MANIFEST, TRIALS[2:], "no dev trials"),
        (MANIFEST, TRIALS[:3], "all 1 trials of toy/test are of one speaker"),
        (changed({"a0"}, speaker=None), TRIALS, "a0 takes part in task 'sv' but has no speaker"),
        (changed({"a0"}, keyword=None), TRIALS, "a0 takes part in task 'kws' but has no keyword"),
    ],
)
def test_data_that_cannot_be_judged_by_are_refused(manifest, trials, told):
    with pytest.raises(DataError, match=told):
        examples_of(TASKS, manifest, trials)


@pytest.mark.parametrize(
    ("name", "trials", "told"),
    [
        (None, TRIALS, "`list` of task 'sv' is null, and there are several: choose one of toy/hard, toy/test"),
        ("toy/easy", TRIALS, "`list` of task 'sv' is 'toy/easy', and that is none: choose one of toy/hard, toy/test"),
        ("toy/test", None, "pass --trials"),
    ],
)
def test_the_headline_list_has_to_be_there(name, trials, told):
    tasks = params(tasks={"sv": {**TUNED["tasks"]["sv"], "list": name}}).tasks
    with pytest.raises(SettingsError, match=told):
        examples_of(tasks, MANIFEST, trials)
