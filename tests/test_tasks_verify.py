"""Speaker verification over a real little store: planted voices are told apart, shuffled ones are not, nothing leaks."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from cache.errors import SettingsError
from cache.frames import FrameSpan
from cache.manifest import write_manifest
from cache.publish import canonical_json, read_json, write_json
from cache.receipts import make_receipt
from pipeline.corpora.trials import write_trials
from pipeline.tasks import verify as verify_module
from pipeline.tasks.frames import FrameFeatures
from pipeline.tasks.labels import TASKS
from pipeline.tasks.sidebyside import SideBySide
from pipeline.tasks.verify import SvParams, run_of, verify
from pipeline.tasks.voicerun import (
    NEVER,
    beside,
    cosines,
    crop,
    embed,
    quality_of,
    rows_without_end,
    train,
    training_batches,
)
from pipeline.tasks.voices import VoiceSplits, voice_splits
from pipeline.tasks.voicescore import SvScore
from tests.sv_fixtures import PARAMS, Voiced, voices

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Voiced:
    return voices(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory) -> Voiced:
    return voices(tmp_path_factory.mktemp("shuffled"), truthful=False)


def with_(**changes) -> SvParams:
    return PARAMS.model_copy(update=changes)


def read(voiced: Voiced, params=PARAMS, **held) -> tuple[FrameFeatures, VoiceSplits]:
    splits = voice_splits(voiced.manifest, TASKS["sv"], voiced.trials, params.list)
    return FrameFeatures(
        voiced.store, voiced.layers, voiced.manifest, splits.ids, params.normalise_layers, CPU, **held
    ), splits


def run(voiced: Voiced, params=PARAMS, **held) -> SvScore:
    return verify(*read(voiced, params, **held), params, CPU)


@pytest.fixture(scope="module")
def score(planted) -> SvScore:
    return run(planted)


def test_voices_never_heard_are_told_apart_and_their_layer_is_found(score):
    assert score.mean <= 0.02
    assert score.min_dcf[0].mean <= 0.2
    assert score.layers[int(np.argmax(score.layer_weights))] == "layer-01"
    assert score.counts == {"train": 240, "dev": 30, "test": 50}
    assert score.trials == {"dev": 30 * 29 // 2, "test": 50 * 49 // 2}
    assert score.speakers == {"train": 48, "dev": 6, "test": 10}
    assert (score.headline, len(score.lists), score.lists[0].same) == ("toy/test", 1, 10 * 10)
    assert (score.metric, score.higher_is_better, score.chance) == ("EER", False, 0.5)


def test_with_shuffled_speakers_the_score_is_chance(shuffled):
    score = run(shuffled, with_(lrs=(1e-2,), steps=60))
    assert 0.4 < score.mean < 0.6
    assert score.interval.low < 0.5 < score.interval.high
    assert len(score.misses) == 8
    assert [miss.badness for miss in score.misses] == sorted((miss.badness for miss in score.misses), reverse=True)


def test_the_learning_rate_is_the_best_on_dev_of_the_first_seed(score):
    rates = dict(score.dev_by_lr)
    assert (score.lr, score.lr_at_edge) == (1e-2, True)
    assert rates[1e-2] == score.seeds[0].dev < rates[1e-5]
    assert [seed.seed for seed in score.seeds] == [0, 1]


def test_the_same_settings_give_the_same_bytes_and_another_seed_does_not(planted):
    first, second, other = (run(planted, with_(steps=10, seeds=(seed,))) for seed in (0, 0, 5))
    assert canonical_json(asdict(first)) == canonical_json(asdict(second))
    assert other.sd is None
    assert other.layer_weights != first.layer_weights


def test_a_run_is_the_same_in_any_company_on_any_number_of_threads(planted, score):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        alone = run(planted, with_(seeds=(0,), lrs=(1e-2,)))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert alone.seeds[0] == score.seeds[0]


@pytest.mark.parametrize("held_bytes", [0, 20_000])
def test_what_is_held_in_memory_changes_no_bit(planted, held_bytes):
    params = with_(seeds=(0,), lrs=(1e-2,), steps=5, speakers_balanced=True)
    assert run(planted, params, held_bytes=held_bytes) == run(planted, params)


def test_the_best_checkpoint_on_dev_is_kept_and_not_the_last(shuffled):
    features, splits = read(shuffled)
    one, watched = (run_of(features, splits, PARAMS, 0, 1e-2, CPU) for _ in range(2))

    def batches():
        generator = torch.Generator().manual_seed(0)
        return training_batches(features, splits.train, 8, 20, False, generator)

    with SideBySide(CPU) as side:
        train([one], batches(), features, splits.dev, 12, 1, None, side)
        seen, stream = [], batches()
        for number in range(1, 13):
            watched.step(*next(stream))
            scores = cosines(embed([watched], features, splits.dev.ids, side)[0], splits.dev)
            alarms, hits, _ = roc_curve(splits.dev.same, scores)
            eer = brentq(lambda x, a=alarms, h=hits: 1 - x - interp1d(a, h)(x), 0.0, 1.0)
            seen.append((round(eer, 9), number))
        again = cosines(embed([one], features, splits.dev.ids, side)[0], splits.dev)
    assert round(one.best.eer, 9) == min(eer for eer, _ in seen)
    assert one.best_step in {number for eer, number in seen if eer == round(one.best.eer, 9)}
    assert one.best_step != 12, "labels are shuffled: the last checkpoint should not be the best on dev"
    alarms, hits, _ = roc_curve(splits.dev.same, again)
    assert brentq(lambda x: 1 - x - interp1d(alarms, hits)(x), 0.0, 1.0) == pytest.approx(one.best.eer, abs=1e-9)


def test_lists_of_dev_count_the_same_and_are_not_thrown_together(planted):
    trials = [t._replace(list="toy/easy") if t.list == "toy/dev" and n % 3 else t for n, t in enumerate(planted.trials)]
    dev = voice_splits(planted.manifest, TASKS["sv"], trials, "toy/test").dev
    assert np.bincount(dev.lists).tolist() == [145, 290]  # dev, easy
    embeddings = np.random.default_rng(0).normal(size=(len(dev.ids), 4))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    scores, found = cosines(embeddings, dev), []
    for number in (0, 1):
        alarms, hits, _ = roc_curve(dev.same[dev.lists == number], scores[dev.lists == number])
        found.append(brentq(lambda x, a=alarms, h=hits: 1 - x - interp1d(a, h)(x), 0.0, 1.0))
    assert found[0] != found[1]
    assert quality_of(embeddings, dev).eer == pytest.approx(sum(found) / 2, abs=1e-9)


def test_patience_ends_a_run(shuffled):
    features, splits = read(shuffled)
    heard: list[float] = []
    one = run_of(features, splits, PARAMS, 0, 1e-2, CPU)
    stream = training_batches(features, splits.train, 8, 20, False, torch.Generator().manual_seed(0))
    with SideBySide(CPU) as side:
        train([one], stream, features, splits.dev, 100, 1, 3, side, heard.append)
    assert len(heard) == one.best_step + 3 < 100


def test_every_utterance_is_read_once_to_be_embedded_and_as_it_is_alone(planted, monkeypatch):
    features, splits = read(planted)
    runs = [run_of(features, splits, PARAMS, seed, 1e-2, CPU) for seed in (0, 1)]
    asked: list[str] = []
    of = features.of
    monkeypatch.setattr(features, "of", lambda ids, *rest: (asked.extend(ids), of(ids, *rest))[1])
    with SideBySide(CPU) as side:
        found = embed(runs, features, splits.test_ids, side)
    assert sorted(asked) == sorted(splits.test_ids)
    for one, together in zip(runs, found, strict=True):
        alone = [one.embed(beside(of([name])))[0] for name in splits.test_ids]
        np.testing.assert_allclose(together, np.stack(alone), atol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_crops_lie_anywhere_in_the_utterance_and_short_ones_are_whole():
    generator = torch.Generator().manual_seed(0)
    assert crop(7, 7, generator) == crop(7, None, generator) == FrameSpan(0, 7)
    starts = {crop(10, 7, generator) for _ in range(100)}
    assert starts == {FrameSpan(start, 7) for start in range(4)}


def test_a_crop_of_the_store_is_that_part_of_the_utterance(planted):
    ids = [u.id for u in planted.manifest][:4] * 2
    spans = [FrameSpan(n % 3, 5) for n in range(8)]
    for held_bytes in (0, 1 << 30):
        features, _ = read(planted, held_bytes=held_bytes)
        features.hold(ids)
        whole, cut = features.of(ids), features.of(ids, spans)
        for one, part, span in zip(
            whole.layers.split(whole.counts, 1), cut.layers.split(cut.counts, 1), spans, strict=True
        ):
            assert torch.equal(one[:, span.rows], part)


def test_balanced_speakers_are_drawn_equally_often(planted):
    _, splits = read(planted)
    rare = type(splits.train)(splits.train.ids, (0,) * 200 + (1,) * 30 + (2,) * 10)
    stream = rows_without_end(rare, 24, True, torch.Generator().manual_seed(0))
    drawn = torch.tensor([rare.classes[row] for _ in range(500) for row in next(stream)]).bincount() / 12_000
    assert drawn.tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    plain = rows_without_end(rare, 24, False, torch.Generator().manual_seed(0))
    assert sorted(row for _ in range(10) for row in next(plain)) == list(range(240))


def test_a_rate_that_diverges_is_not_chosen_and_one_that_all_do_is_refused(planted):
    score = run(planted, with_(lrs=(1e-2, 1e30), clip_norm=None, seeds=(0,), steps=20))
    assert score.lr == 1e-2
    assert dict(score.dev_by_lr)[1e30] == NEVER.eer
    json.loads(canonical_json(asdict(score)))
    with pytest.raises(SettingsError, match=r"diverged at every learning rate \(1e\+30\)"):
        run(planted, with_(lrs=(1e30,), seeds=(0,), clip_norm=None, steps=2))


def test_the_worst_trials_are_on_the_wrong_side_of_the_threshold(planted):
    _, splits = read(planted)
    asked = splits.tests[0]
    scores = np.where(asked.same, 0.9, 0.1) + np.linspace(0, 1e-3, len(asked))
    assert verify_module.worst_trials(asked, scores) == ()
    false_alarm, (first, second) = np.flatnonzero(~asked.same)[7], np.flatnonzero(asked.same)[[3, 8]]
    scores[false_alarm], scores[first], scores[second] = 0.95, -0.5, -0.3
    found = verify_module.worst_trials(asked, scores)[:3]  # 2 of 100 are refused, so the threshold is down near 0.1
    assert [miss.ids for miss in found] == [
        tuple(asked.ids[number] for number in asked.pairs[trial]) for trial in (false_alarm, first, second)
    ]
    assert [miss.badness for miss in found] == pytest.approx([0.85, 0.6, 0.4], abs=2e-3)
    assert [(miss.truth, miss.answer) for miss in found[:2]] == [
        ("two speakers", "one speaker"),
        ("one speaker", "two speakers"),
    ]


def test_the_command_asks_for_trials_and_writes_the_same_bytes_each_time(planted, tmp_path, monkeypatch, capsys):
    from stages.probe import main

    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    home = tmp_path / "store" / "features" / planted.store.key
    home.parent.mkdir(parents=True)
    home.symlink_to(planted.store.directory)
    write_json(tmp_path / "hubert.json", make_receipt(home, planted.layers))
    write_manifest(tmp_path / "manifest.jsonl", planted.manifest)
    write_trials(tmp_path / "trials.jsonl", planted.trials)
    params = with_(steps=8, seeds=(0,))
    (tmp_path / "params.yaml").write_text(json.dumps({"probes": {"sv": params.model_dump(mode="json")}}))

    def probe(out, trials):
        main(
            model="hubert",
            task="sv",
            features=tmp_path / "hubert.json",
            manifest=tmp_path / "manifest.jsonl",
            out=tmp_path / out,
            trials=trials,
            params=tmp_path / "params.yaml",
            device="cpu",
        )

    with pytest.raises(SettingsError, match="name their file with `decant probe ... --trials data/trials.jsonl`"):
        probe("none.json", None)
    probe("one.json", tmp_path / "trials.jsonl")
    probe("two.json", tmp_path / "trials.jsonl")
    assert (tmp_path / "one.json").read_bytes() == (tmp_path / "two.json").read_bytes()
    found = read_json(tmp_path / "one.json")
    assert (found["task"], found["metric"], found["headline"]) == ("sv", "EER", "toy/test")
    (one_list,) = found["lists"]
    assert (one_list["mean"], one_list["trials"], one_list["min_dcf"]) == (found["mean"], 1225, found["min_dcf"])
    assert {"p_target", "mean"} <= set(found["min_dcf"][0])
    assert found["params"] == params.model_dump(mode="json")
    assert "hubert on sv: EER" in capsys.readouterr().out
