"""Probes over a real little feature store: planted signals are found, absent ones are not, and misfits are refused."""

import json
import math
from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cache.errors import DataError, SettingsError, StoreError
from cache.manifest import Manifest, Utterance, write_manifest
from cache.publish import canonical_json, read_json, write_json
from cache.ragged import Store
from cache.receipts import make_receipt
from pipeline.tasks import features as features_module
from pipeline.tasks import metrics
from pipeline.tasks.features import pool
from pipeline.tasks.heads import ProbeHead
from pipeline.tasks.labels import TASKS, LabelledSplits, labelled_splits, task_named
from pipeline.tasks.probe import ProbeParams, batches, probe
from pipeline.tasks.score import ProbeScore
from tests.probe_fixtures import write_store

L, D, CPU = 3, 10, torch.device("cpu")
WORDS = ("go", "no", "stop", "yes")
PARAMS = ProbeParams(
    head_width=16,
    normalise_layers=False,
    lrs=(1e-4, 1e-2, 1e-1),
    seeds=(0, 1, 2),
    steps=120,
    batch=16,
    class_balanced=False,
    clip_norm=1.0,
    validate_every=20,
    patience=None,
)


class Probed(NamedTuple):
    manifest: Manifest
    store: Store
    layers: list[str]
    frames: list[np.ndarray]  # (L, T, D) of each utterance, as stored


def utterance(number: int, split: str, word: str | None) -> Utterance:
    return Utterance(
        id=f"toy/{number:03d}",
        corpus="toy",
        path=f"{number}.wav",
        samples=400 + 320 * (3 + number % 11),
        rate_hz=16_000,
        file_samples=1,
        file_bytes=1,
        audio=f"{number:032x}",
        split=split,
        tasks={"kws": split},
        speaker=f"{split}{number % 5}",
        keyword=word,
    )


def toy(directory, planted: bool) -> Probed:
    """400 utterances of four words; with a planted signal, layer 1 carries the word in its mean and the others noise."""
    rng = np.random.default_rng(0)
    words = rng.integers(len(WORDS), size=400)
    splits = ["train"] * 160 + ["dev"] * 40 + ["test"] * 200
    manifest = Manifest(tuple(utterance(n, splits[n], WORDS[w]) for n, w in enumerate(words)))
    signal = rng.normal(size=(len(WORDS), D)) * 2
    frames = []
    for u, word in zip(manifest, words, strict=True):
        states = rng.normal(size=(L, u.num_frames, D))
        states[1] += signal[word] if planted else 0
        frames.append(states.astype(np.float16))
    return Probed(manifest, *write_store(directory / "store", manifest, frames), frames)


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Probed:
    return toy(tmp_path_factory.mktemp("planted"), planted=True)


@pytest.fixture(scope="module")
def noise(tmp_path_factory) -> Probed:
    return toy(tmp_path_factory.mktemp("noise"), planted=False)


def run(probed: Probed, params: ProbeParams = PARAMS) -> tuple[ProbeScore, LabelledSplits]:
    splits = labelled_splits(probed.manifest, TASKS["kws"])
    pooled = pool(probed.store, probed.layers, probed.manifest, splits.ids, params.normalise_layers)
    return probe(pooled, splits, params, CPU), splits


def test_a_planted_signal_is_found_and_so_is_its_layer(planted):
    score, _ = run(planted)
    assert score.mean >= 0.98
    assert score.layers[int(np.argmax(score.layer_weights))] == "layer-01"
    assert sum(score.layer_weights) == pytest.approx(1, abs=1e-5)
    assert score.counts == {"train": 160, "dev": 40, "test": 200}


def test_without_a_signal_the_score_is_chance(noise):
    score, _ = run(noise)
    assert score.interval.low < score.chance < score.interval.high


def test_the_learning_rate_is_the_best_on_dev_and_a_rate_at_the_edge_is_told(planted):
    score, _ = run(planted)
    assert dict(score.dev_by_lr)[score.lr] == max(dev for _, dev in score.dev_by_lr)
    assert dict(score.dev_by_lr)[1e-4] < 0.9, "too small a rate must show in the sweep"
    edge, _ = run(planted, PARAMS.model_copy(update={"lrs": (1e-5, 1e-4)}))
    assert (edge.lr, edge.lr_at_edge) == (1e-4, True)
    only, _ = run(planted, PARAMS.model_copy(update={"lrs": (1e-2,)}))
    assert not only.lr_at_edge, "one rate is no sweep and has no edge"


def test_the_same_seeds_give_the_same_bytes_and_other_seeds_do_not(noise):
    first, second = (canonical_json(asdict(run(noise)[0])) for _ in range(2))
    assert first == second
    assert canonical_json(asdict(run(noise, PARAMS.model_copy(update={"seeds": (7, 8, 9)}))[0])) != first


def test_a_seed_scores_the_same_in_any_company(noise):
    alone, _ = run(noise, PARAMS.model_copy(update={"seeds": (1,)}))
    assert alone.sd is None
    assert (
        alone.seeds[0].test == next(s for s in run(noise)[0].seeds if s.seed == 1).test or alone.lr != run(noise)[0].lr
    )


@pytest.mark.parametrize("normalise_layers", [False, True])
def test_a_head_over_pooled_features_is_the_head_over_frames_of_the_store(planted, normalise_layers, monkeypatch):
    monkeypatch.setattr(features_module, "BLOCK_VALUES", 4 * 10 * L * D)  # several blocks of unequal length
    ids = [u.id for u in planted.manifest][::-1]
    pooled = pool(planted.store, planted.layers, planted.manifest, ids, normalise_layers)
    head = ProbeHead(L, D, 8, 4, torch.Generator().manual_seed(0))
    scores = head.pooled(pooled.of([u.id for u in planted.manifest]))
    for states, got in zip(planted.frames, scores, strict=True):
        frames = torch.from_numpy(states.astype(np.float32))[None]
        if normalise_layers:
            frames = (frames - frames.mean(-1, keepdim=True)) / (
                frames.var(-1, correction=0, keepdim=True) + 1e-5
            ).sqrt()
        reference = head(frames, torch.ones(1, frames.shape[2], dtype=torch.bool))[0]
        torch.testing.assert_close(got, reference, rtol=0, atol=1e-5)


def test_pooling_tells_how_far_it_is(planted):
    ids, heard = [u.id for u in planted.manifest], []
    pool(planted.store, planted.layers, planted.manifest, ids, False, on_pooled=heard.append)
    assert sum(heard) == len(ids)


def test_balanced_batches_show_every_class_equally_often(planted):
    splits = labelled_splits(planted.manifest, TASKS["kws"])
    rare = replace(splits.train, classes=tuple([0] * 154 + [1, 2, 2, 3, 3, 3]))
    stream = batches(rare, PARAMS.model_copy(update={"class_balanced": True}), [torch.Generator().manual_seed(0)])
    classes = torch.tensor(rare.classes)
    seen = torch.cat([classes[next(stream)[0]] for _ in range(400)]).bincount() / (400 * PARAMS.batch)
    assert seen.tolist() == pytest.approx([0.25] * 4, abs=0.02)


def test_plain_batches_go_through_the_split_before_they_repeat(planted):
    train = labelled_splits(planted.manifest, TASKS["kws"]).train
    stream = batches(train, PARAMS, [torch.Generator().manual_seed(seed) for seed in (0, 1)])
    epoch = torch.cat([next(stream) for _ in range(len(train) // PARAMS.batch)], dim=1)
    assert all(sorted(rows) == list(range(len(train))) for rows in epoch.tolist())
    assert epoch[0].tolist() != epoch[1].tolist()


def test_the_confusion_counts_every_answer_of_every_seed(planted):
    score, splits = run(planted)
    assert sum(cell.times for cell in score.confusion) == len(splits.test) * len(PARAMS.seeds)
    right = sum(cell.times for cell in score.confusion if cell.truth == cell.answer)
    assert right / (len(splits.test) * len(PARAMS.seeds)) == pytest.approx(score.mean)


def test_wilson_intervals_are_those_of_the_textbook():
    assert metrics.wilson_interval(0.8, 10) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    low, high = metrics.wilson_interval(1.0, 10)
    assert (low, high) == (pytest.approx(10 / (10 + metrics.NORMAL_95**2)), pytest.approx(1.0))
    # the defining property: at either bound, the share lies 1.96 standard errors away
    low, high = metrics.wilson_interval(0.3, 50)
    for bound in (low, high):
        assert abs(0.3 - bound) / math.sqrt(bound * (1 - bound) / 50) == pytest.approx(metrics.NORMAL_95)


def test_accuracy_and_confusion_by_hand():
    truth, answers = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 0])
    assert metrics.accuracy(answers, truth) == 0.5
    assert metrics.confusion(answers, truth) == [(0, 0, 1), (0, 1, 1), (1, 1, 1), (2, 0, 1)]
    assert metrics.mean_and_sd([0.5, 0.7]) == (pytest.approx(0.6), pytest.approx(math.sqrt(0.02)))
    assert metrics.mean_and_sd([0.5]) == (0.5, None)


def test_majority_is_the_most_frequent_training_class_scored_on_test():
    rows = [
        ("train", "go"),
        ("train", "no"),
        ("train", "no"),
        ("dev", "go"),
        ("test", "no"),
        ("test", "go"),
        ("test", "go"),
    ]
    splits = labelled_splits(Manifest(tuple(utterance(n, *row) for n, row in enumerate(rows))), TASKS["kws"])
    assert (splits.majority, splits.chance) == (pytest.approx(1 / 3), 0.5)
    assert splits.names == ("go", "no")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no utterance of the manifest takes part in task 'kws'"),
        (
            [("train", "go"), ("train", "no"), ("dev", "go"), ("test", "yes")],
            "'yes' is in the test split .* no training",
        ),
        ([("train", "go"), ("train", "no"), ("test", "go")], "task 'kws' has no dev utterances"),
        ([("train", "go"), ("train", None), ("dev", "go"), ("test", "go")], "toy/001 takes part .* has no keyword"),
        ([("train", "go"), ("dev", "go"), ("test", "go")], "one class only"),
    ],
)
def test_a_task_that_cannot_be_scored_is_refused_with_a_reason(rows, message):
    manifest = Manifest(tuple(utterance(n, *row) for n, row in enumerate(rows)))
    with pytest.raises(DataError, match=message):
        labelled_splits(manifest, TASKS["kws"])


def test_an_unknown_task_is_refused_with_the_choices():
    with pytest.raises(SettingsError, match="no probe task 'vad'; choose one of asr, er, kws, pr, sid, sv"):
        task_named("vad")


def test_features_that_lack_an_utterance_are_refused_by_name(planted):
    more = Manifest((*planted.manifest.utterances, utterance(999, "train", "go")))
    with pytest.raises(DataError, match=r"toy/999 is not in the feature store \(1 of 401 utterances are missing\)"):
        pool(planted.store, planted.layers, more, [u.id for u in more], False)


def test_features_of_other_audio_are_refused_with_both_counts(planted):
    first, *rest = planted.manifest.utterances
    longer = Manifest((replace(first, samples=first.samples + 640), *rest))
    with pytest.raises(DataError, match=r"toy/000: the feature store has 4 frames but the manifest says 6"):
        pool(planted.store, planted.layers, longer, [first.id], False)


def test_features_that_are_not_finite_are_refused_by_name(planted, tmp_path):
    frames = [states.copy() for states in planted.frames]
    frames[7][2, 0, 0] = np.inf
    store, layers = write_store(tmp_path / "broken", planted.manifest, frames)
    with pytest.raises(DataError, match="toy/007: its features are not finite"):
        pool(store, layers, planted.manifest, [u.id for u in planted.manifest], False)


def test_a_store_of_waves_is_not_taken_for_features(planted):
    with pytest.raises(StoreError, match="holds no layers"):
        pool(planted.store, [], planted.manifest, ["toy/000"], False)


def test_a_diverged_learning_rate_is_not_chosen_and_leaves_clean_json(planted):
    score, _ = run(planted, PARAMS.model_copy(update={"lrs": (1e-2, 1e30), "clip_norm": None}))
    assert score.lr == 1e-2
    json.loads(canonical_json(asdict(score)))


def test_where_every_learning_rate_diverges_there_is_no_score(planted):
    """A head of no numbers answers the first class each time, which is right for its share."""
    with pytest.raises(SettingsError, match=r"probes\.kws diverged at every learning rate \(1e\+30\).*smaller"):
        run(planted, PARAMS.model_copy(update={"lrs": (1e30,), "clip_norm": None}))


def test_the_command_writes_the_same_bytes_each_time_and_says_what_it_probed(planted, tmp_path, monkeypatch, capsys):
    from stages.probe import main

    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    home = tmp_path / "store" / "features" / planted.store.key
    home.parent.mkdir(parents=True)
    home.symlink_to(planted.store.directory)
    write_json(tmp_path / "hubert.json", make_receipt(home, planted.layers))
    write_manifest(tmp_path / "manifest.jsonl", planted.manifest)
    (tmp_path / "params.yaml").write_text(json.dumps({"probes": {"kws": PARAMS.model_dump(mode="json")}}))
    outs = [tmp_path / "one.json", tmp_path / "two.json"]
    for out in outs:
        main(
            model="hubert",
            task="kws",
            features=tmp_path / "hubert.json",
            manifest=tmp_path / "manifest.jsonl",
            out=out,
            params=tmp_path / "params.yaml",
            device="cpu",
        )
    assert outs[0].read_bytes() == outs[1].read_bytes()
    found = read_json(outs[0])
    assert (found["model"], found["task"], found["description"]["kind"]) == ("hubert", "kws", "hubert")
    assert found["classes"] == list(WORDS)
    assert found["params"] == PARAMS.model_dump(mode="json")
    assert "hubert on kws: accuracy" in capsys.readouterr().out
    assert str(tmp_path) not in outs[0].read_text()
