"""The worst errors of a probe: found where they were planted, ordered by how wrong they are, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from cache.manifest import Manifest
from cache.publish import canonical_json
from pipeline.tasks import misses
from pipeline.tasks.features import pool
from pipeline.tasks.folded import probe_folds
from pipeline.tasks.labels import TASKS, folds_of, labelled_splits
from pipeline.tasks.probe import ProbeParams, probe
from pipeline.tasks.score import MISSES, Miss
from tests.probe_fixtures import utterance, write_store

CPU = torch.device("cpu")
PARAMS = ProbeParams(
    head_width=8,
    normalise_layers=False,
    lrs=(1e-2,),
    seeds=(0, 1),
    steps=60,
    batch=16,
    class_balanced=False,
    clip_norm=1.0,
    validate_every=20,
    patience=None,
)


def test_a_class_is_missed_by_the_probability_of_the_answer_less_that_of_the_truth():
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, 0.0], [0.0, 0.0]])
    found = misses.of_classes("abcd", ("yes", "no"), logits, torch.tensor([0, 0, 1, 1]))
    gap = {e: (math.exp(e) - 1) / (math.exp(e) + 1) for e in (1, 3)}  # p1 - p0 of two classes e apart
    assert [miss._replace(badness=0.0) for miss in found] == [
        Miss(("c",), "no", "yes", 0.0),
        Miss(("b",), "yes", "no", 0.0),
        Miss(("d",), "no", "yes", 0.0),  # argmax of a tie is the first class, and that is no reason to hide it
    ]
    assert [miss.badness for miss in found] == pytest.approx([gap[3], gap[1], 0.0], abs=1e-6)


def test_a_string_is_missed_by_its_edits_over_its_phones():
    names = ("a", "b", "t")
    truths = [(1, 2, 3), (1, 2), (2, 2, 4)]  # 4: a phone that no training utterance has
    answers = [(1, 2, 3), (), (2, 1, 2)]
    found = misses.of_strings(("right", "silent", "wrong"), names, truths, answers)
    assert found == (Miss(("silent",), "a b", "", 1.0), Miss(("wrong",), "b b ?", "b a b", 0.666667))


def test_only_the_worst_are_told_and_equals_by_name():
    many = [Miss((f"{number:03d}",), "a", "b", badness=number // 2) for number in range(40)]
    told = misses.worst(reversed(many))
    assert len(told) == MISSES
    assert [miss.ids[0] for miss in told[:4]] == ["038", "039", "036", "037"]


def test_a_head_that_diverged_leaves_clean_json():
    logits = torch.full((3, 2), torch.nan)
    found = misses.of_classes("abc", ("yes", "no"), logits, torch.tensor([0, 1, 1]))
    assert canonical_json([list(miss) for miss in found])
    assert {miss.badness for miss in found} == {1.0}


@pytest.fixture(scope="module")
def mislabelled(tmp_path_factory):
    """Two classes that are easily told apart, and two test utterances that bear the label of the other."""
    rng = np.random.default_rng(0)
    utterances, frames = [], []
    for number in range(120):
        split = ("train", "train", "dev", "test")[number % 4]
        spoken = number // 4 % 2
        label = 1 - spoken if number in (7, 43) else spoken
        other = "dev" if number % 4 > 1 else "train"
        fold = {f"er-{which}": "test" if number % 2 == which % 2 else other for which in (1, 2)}
        utterances.append(
            utterance(f"{number:03d}", 4, {"kws": split, **fold}, keyword="ab"[label], emotion="ab"[label])
        )
        states = rng.normal(size=(2, 4, 6)) * 0.1
        states[1, :, 0] += 2 * spoken - 1 + 0.3 * (number == 43)
        frames.append(states.astype(np.float16))
    manifest = Manifest(tuple(utterances))
    store, layers = write_store(tmp_path_factory.mktemp("mislabelled") / "store", manifest, frames)
    pooled = pool(store, layers, manifest, [u.id for u in manifest], normalise_layers=False)
    return manifest, pooled


def test_a_probe_tells_the_test_utterances_whose_labels_are_wrong_and_no_others(mislabelled):
    manifest, pooled = mislabelled
    score = probe(pooled, labelled_splits(manifest, TASKS["kws"]), PARAMS, CPU)
    assert {miss.ids for miss in score.misses} == {("toy/007",), ("toy/043",)}
    wrong = {miss.ids[0]: (miss.truth, miss.answer) for miss in score.misses}
    assert wrong == {"toy/007": ("a", "b"), "toy/043": ("b", "a")}
    assert all(0 < miss.badness <= 1 for miss in score.misses)
    assert score.mean == pytest.approx(1 - 2 / 30)


def test_a_task_in_folds_tells_the_worst_of_all_folds(mislabelled):
    manifest, pooled = mislabelled
    folds = [labelled_splits(manifest, fold) for fold in folds_of(manifest, TASKS["er"])]
    score = probe_folds(pooled, TASKS["er"], folds, PARAMS, CPU)
    single = [probe(pooled, fold, PARAMS, CPU).misses for fold in folds]
    assert {miss.ids[0] for miss in score.misses} >= {"toy/007", "toy/043"}
    assert (
        list(score.misses) == sorted({m for part in single for m in part}, key=lambda m: (-m.badness, m.ids))[:MISSES]
    )


def test_a_probe_without_an_error_tells_none(mislabelled):
    manifest, pooled = mislabelled
    honest = Manifest(tuple(replace(u, keyword="ab"[int(u.id[-3:]) // 4 % 2]) for u in manifest))
    score = probe(pooled, labelled_splits(honest, TASKS["kws"]), PARAMS, CPU)
    assert (score.mean, score.misses) == (1.0, ())
