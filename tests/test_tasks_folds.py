"""A task in folds: planted emotions are found in every fold, the score is the mean, and half-made folds are refused."""

import json
from dataclasses import asdict, replace
from statistics import fmean, stdev

import numpy as np
import pytest
import torch

from cache.errors import DataError
from cache.manifest import Manifest, write_manifest
from cache.publish import read_json, write_json
from cache.receipts import make_receipt
from pipeline.corpora.folds import fold_tasks
from pipeline.tasks.features import pool
from pipeline.tasks.folded import probe_folds
from pipeline.tasks.labels import TASKS, folds_of, labelled_splits
from pipeline.tasks.probe import ProbeParams, probe
from pipeline.tasks.score import FoldedScore
from tests.probe_fixtures import utterance, write_store

L, D, CPU = 2, 8, torch.device("cpu")
EMOTIONS = ("angry", "happy", "sad")
FOLDS = 4
PARAMS = ProbeParams(
    head_width=8,
    normalise_layers=False,
    lrs=(1e-2, 1e-1),
    seeds=(0, 1),
    steps=60,
    batch=16,
    class_balanced=False,
    clip_norm=1.0,
    validate_every=20,
    patience=None,
)


def toy(planted_in: tuple[int, ...] = (1, 2, 3, 4)) -> tuple[Manifest, list[np.ndarray]]:
    """240 recordings in four folds by actor, as RAVDESS writes them; the emotion is in the features of some folds."""
    rng = np.random.default_rng(0)
    codes = rng.normal(size=(len(EMOTIONS), D)) * 2
    utterances, frames = [], []
    for number in range(240):
        fold, emotion = number % FOLDS + 1, int(rng.integers(len(EMOTIONS)))
        tasks = fold_tasks("er", f"{number}", fold, FOLDS, 0.2)
        utterances.append(utterance(f"{number:03d}", 4 + number % 3, tasks, emotion=EMOTIONS[emotion]))
        states = rng.normal(size=(L, 4 + number % 3, D))
        states[1] += codes[emotion] if fold in planted_in else 0
        frames.append(states.astype(np.float16))
    return Manifest(tuple(utterances)), frames


def run(directory, manifest: Manifest, frames: list[np.ndarray]) -> FoldedScore:
    store, layers = write_store(directory / "store", manifest, frames)
    pooled = pool(store, layers, manifest, [u.id for u in manifest], False)
    folds = [labelled_splits(manifest, fold) for fold in folds_of(manifest, TASKS["er"])]
    return probe_folds(pooled, TASKS["er"], folds, PARAMS, CPU)


def test_planted_emotions_are_found_in_every_fold(tmp_path):
    manifest, frames = toy()
    score = run(tmp_path, manifest, frames)
    assert [fold.name for fold in score.folds] == ["er-1", "er-2", "er-3", "er-4"]
    assert min(fold.mean for fold in score.folds) >= 0.95
    assert score.layer_weights[1] > score.layer_weights[0]
    assert score.counts["test"] == len(manifest), "every recording is the test once"
    assert sum(cell.times for cell in score.confusion) == len(manifest) * len(PARAMS.seeds)


def test_emotions_that_are_not_there_are_guessed(tmp_path):
    score = run(tmp_path, *toy(planted_in=()))
    low, high = score.interval
    assert low < score.chance < high


def test_the_score_is_the_mean_over_folds_of_probes_made_alone(tmp_path):
    manifest, frames = toy(planted_in=(1, 2))  # folds that differ
    score = run(tmp_path, manifest, frames)
    store, layers = write_store(tmp_path / "again", manifest, frames)
    alone = []
    for name in ("er-1", "er-2", "er-3", "er-4"):
        splits = labelled_splits(manifest, replace(TASKS["er"], name=name))
        alone.append(probe(pool(store, layers, manifest, splits.ids, False), splits, PARAMS, CPU))
    assert [fold.mean for fold in score.folds] == [probed.mean for probed in alone]
    assert [fold.lr for fold in score.folds] == [probed.lr for probed in alone]
    assert score.mean == pytest.approx(fmean(probed.mean for probed in alone))
    by_seed = [fmean(probed.seeds[number].test for probed in alone) for number in range(2)]
    assert [seed.test for seed in score.seeds] == pytest.approx(by_seed)
    assert score.sd == pytest.approx(stdev(by_seed))
    right = sum(cell.times for cell in score.confusion if cell.truth == cell.answer)
    weighted = sum(probed.mean * probed.counts["test"] for probed in alone) / len(manifest)
    assert right / (2 * len(manifest)) == pytest.approx(weighted)
    assert max(fold.mean for fold in score.folds) - min(fold.mean for fold in score.folds) > 0.1


def test_a_class_that_one_fold_lacks_keeps_its_name_in_the_confusion(tmp_path):
    manifest, frames = toy()
    # only the first fold has anger, so it is never in the training split of the task whose test is that fold
    kept = [(u, f) for u, f in zip(manifest, frames, strict=True) if u.emotion != "angry" or u.tasks["er-1"] == "test"]
    calm = [
        replace(u, tasks={k: v for k, v in u.tasks.items() if u.emotion != "angry" or k != "er-1"}) for u, _ in kept
    ]
    score = run(tmp_path, Manifest(tuple(calm)), [f for _, f in kept])
    assert score.classes == EMOTIONS
    truths = {score.classes[cell.truth] for cell in score.confusion}
    assert truths == {"happy", "sad"}, "anger is in no test, and its index is not taken by another class"


def folds(*names: str) -> Manifest:
    return Manifest(tuple(utterance(f"{n}", 5, {name: "train"}, emotion="sad") for n, name in enumerate(names)))


def test_a_task_without_folds_is_itself():
    assert folds_of(folds("er", "kws"), TASKS["er"]) == (TASKS["er"],)
    assert [t.name for t in folds_of(folds("er-2", "er-1", "er-x"), TASKS["er"])] == ["er-1", "er-2"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("er", "er-1", "er-2"), "some utterances take part in 'er' and others in its folds"),
        (("er-1", "er-3"), "the folds of task 'er' are 1, 3; they are numbered from 1 without a gap"),
        (("er-1",), "at least two"),
    ],
)
def test_half_made_folds_are_refused(names, message):
    with pytest.raises(DataError, match=message):
        folds_of(folds(*names), TASKS["er"])


def test_the_command_runs_every_fold(tmp_path, monkeypatch, capsys):
    from stages.probe import main

    manifest, frames = toy()
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    store, layers = write_store(tmp_path / "features", manifest, frames)
    home = tmp_path / "store" / "features" / store.key
    home.parent.mkdir(parents=True)
    home.symlink_to(store.directory)
    write_json(tmp_path / "hubert.json", make_receipt(home, layers))
    write_manifest(tmp_path / "manifest.jsonl", manifest)
    (tmp_path / "params.yaml").write_text(json.dumps({"probes": {"er": PARAMS.model_dump(mode="json")}}))
    main(
        model="hubert",
        task="er",
        features=tmp_path / "hubert.json",
        manifest=tmp_path / "manifest.jsonl",
        out=tmp_path / "out.json",
        params=tmp_path / "params.yaml",
        device="cpu",
    )
    found = read_json(tmp_path / "out.json")
    want = json.loads(json.dumps(asdict(run(tmp_path / "again", manifest, frames))))
    assert {key: found[key] for key in want} == want
    assert (found["task"], len(found["folds"])) == ("er", FOLDS)
    assert "hubert on er: accuracy" in capsys.readouterr().out
