"""Speech recognition over a real little store: planted letters are read, other texts are not, and misfits are refused."""

import json
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from cache.errors import SettingsError
from cache.manifest import Manifest, write_manifest
from cache.publish import canonical_json, read_json, write_json
from cache.ragged import Store
from cache.receipts import make_receipt
from pipeline.tasks.asr import AsrParams
from pipeline.tasks.beam import BeamParams, TrainTexts
from pipeline.tasks.characters import text_splits
from pipeline.tasks.frames import FrameFeatures
from pipeline.tasks.labels import TASKS
from pipeline.tasks.masking import MaskParams
from pipeline.tasks.sidebyside import SideBySide
from pipeline.tasks.speechruns import train
from pipeline.tasks.textscore import AsrScore
from pipeline.tasks.transcribe import error_rates, transcribe
from pipeline.tasks.worderrors import word_error_rate
from tests.probe_fixtures import utterance, write_store

needs_beam = pytest.mark.skipif(find_spec("flashlight") is None, reason="the extra beam is not installed")
L, D, CPU = 3, 16, torch.device("cpu")
WORDS = ("a", "bad", "cab", "dead", "fed", "ace", "gaff", "beg")
SIZES = {"train": 48, "dev": 12, "test": 24}
BEAM = BeamParams(lm=TrainTexts(kind="train", order=2), width=20, lm_weights=(0.0, 1.0), word_bonuses=(0.0, 1.0))
PARAMS = AsrParams(
    head_width=16,
    lstm_layers=1,
    lstm_width=16,
    dropout=0.1,
    reduce_frames=1,
    normalise_layers=False,
    characters="corpus",
    drop=".",
    masks=None,
    lrs=(1e-4, 3e-2),
    seeds=(0, 1),
    steps=80,
    batch=8,
    clip_norm=1.0,
    validate_every=40,
    patience=None,
    beam=None,
)
BRIEF = PARAMS.model_copy(update={"steps": 12, "validate_every": 6})


class Spoken(NamedTuple):
    manifest: Manifest
    store: Store
    layers: list[str]


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Spoken:
    """Layer 1 says in every frame which letter it is, or that a word ends; the other layers are noise."""
    rng = np.random.default_rng(0)
    codes = {letter: rng.normal(size=D) * 3 for letter in " abcdefg"}
    drawn = (" ".join(rng.choice(WORDS, size=rng.integers(2, 6))) for _ in iter(int, 1))
    utterances, frames, said = [], [], set()
    for number, split in enumerate(split for split, size in SIZES.items() for _ in range(size)):
        text = next(text for text in drawn if text not in said)
        said.add(text)
        while f"{text}." in {u.text for u in utterances}:  # a sentence is in one split
            text = next(text for text in drawn if text not in said)
        said.add(text)
        held = rng.integers(2, 4, size=len(text) + 1)
        letters = np.repeat([*text, " "], held)
        utterances.append(utterance(f"{number:03d}", len(letters), {"asr": split}, text=f"{text}."))
        states = rng.normal(size=(L, len(letters), D))
        states[1] += [codes[letter] for letter in letters]
        states[1, np.cumsum([0, *held[:-1]])] *= 0.0  # every sound begins with a gap: two equal ones are two
        frames.append(states.astype(np.float16))
    manifest = Manifest(tuple(utterances))
    return Spoken(manifest, *write_store(tmp_path_factory.mktemp("planted") / "store", manifest, frames))


def parts(spoken: Spoken, params: AsrParams, manifest: Manifest | None = None, **settings):
    manifest = manifest or spoken.manifest
    splits = text_splits(manifest, TASKS["asr"], params.characters, params.drop, params.reduce_frames)
    ids = [u.id for u in manifest]
    settings = {"normalise_layers": False, "device": CPU} | settings
    return FrameFeatures(spoken.store, spoken.layers, manifest, ids, **settings), splits


def run(spoken: Spoken, params: AsrParams = PARAMS, manifest: Manifest | None = None, **settings) -> AsrScore:
    return transcribe(*parts(spoken, params, manifest, **settings), params, CPU)


@pytest.fixture(scope="module")
def score(planted) -> AsrScore:
    return run(planted)


def test_planted_letters_are_read_and_so_is_their_layer(score):
    assert score.mean <= 0.02
    assert score.cer <= 0.01
    assert score.interval.low <= score.mean <= score.interval.high
    assert score.layers[int(np.argmax(score.layer_weights))] == "layer-01"
    assert (score.classes, score.counts, score.left_out) == (tuple(" ABCDEFG"), SIZES, 0)
    assert (score.metric, score.higher_is_better, score.chance) == ("WER", False, 1.0)
    assert 0.6 < score.majority < 1


def test_texts_of_other_utterances_are_not_read(planted):
    texts = [u.text for u in planted.manifest]
    shuffled = [texts[number] for number in np.random.default_rng(1).permutation(len(texts))]
    manifest = Manifest(tuple(replace(u, text=t) for u, t in zip(planted.manifest, shuffled, strict=True)))
    score = run(planted, manifest=manifest)
    assert score.mean >= score.majority - 0.05


def test_the_rate_is_chosen_with_the_first_seed_and_the_others_are_trained_at_it(score):
    assert (score.lr, score.lr_at_edge) == (3e-2, True)
    by_rate = dict(score.dev_by_lr)
    assert by_rate[1e-4] > 0.9, "too small a rate must show in the sweep"
    assert by_rate[3e-2] == score.seeds[0].dev
    assert [seed.seed for seed in score.seeds] == [0, 1]
    assert score.seeds[0].layer_weights != score.seeds[1].layer_weights


@needs_beam
def test_a_beam_with_a_language_model_is_a_second_score_tuned_on_dev(planted, score):
    beside = run(planted, PARAMS.model_copy(update={"beam": BEAM}))
    assert replace(beside, beam=None) == score, "it changes nothing of the first"
    score = beside
    assert score.beam is not None
    tried = {(lm, word): dev for lm, word, dev in score.beam.dev_by_weights}
    assert set(tried) == {(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)}
    assert score.beam.dev == min(tried.values()) == tried[score.beam.lm_weight, score.beam.word_bonus]
    assert (score.beam.lexicon, score.beam.unknown) == (len(WORDS), 0)
    assert score.beam.mean <= 0.02
    assert len(score.beam.tests) == 2


@needs_beam
def test_a_language_model_helps_a_head_that_hears_badly(planted):
    badly = PARAMS.model_copy(update={"lrs": (1e-2,), "seeds": (0,), "steps": 45, "beam": BEAM})
    score = run(planted, badly)
    assert score.beam is not None
    assert score.mean > 0.2
    assert score.beam.mean < score.mean - 0.1


def test_the_errors_of_all_seeds_make_the_rates_and_the_worst_are_named(planted):
    score = run(planted, BRIEF.model_copy(update={"lrs": (1e-2,)}))
    assert sum(score.errors) / (score.test_words * 2) == pytest.approx(score.mean)
    assert sum(score.character_errors) / (score.test_characters * 2) == pytest.approx(score.cer)
    assert score.test_words == sum(len(u.text.split()) for u in planted.manifest if u.tasks["asr"] == "test")
    assert sum(seed.test for seed in score.seeds) / 2 == pytest.approx(score.mean)
    badness = [miss.badness for miss in score.misses]
    assert len(badness) == 8
    assert badness == sorted(badness, reverse=True)
    for miss in score.misses:
        assert miss.truth == planted.manifest.by_id[miss.ids[0]].text.upper().rstrip(".")
        assert miss.badness == pytest.approx(word_error_rate([miss.truth], [miss.answer]), abs=1e-6)


def test_the_spread_is_over_seeds_and_the_interval_over_utterances(planted):
    _, splits = parts(planted, PARAMS)
    right, nothing = list(splits.test.texts), [""] * len(splits.test)
    found = error_rates(splits.test, [right, nothing])
    assert (found.tests, found.mean, found.sd) == ((0.0, 1.0), 0.5, pytest.approx(0.5**0.5))
    assert found.interval == (0.5, 0.5), "each utterance is half wrong, whichever are drawn"
    half = [text if number % 2 else "" for number, text in enumerate(splits.test.texts)]
    low, high = error_rates(splits.test, [half]).interval
    assert 0.2 < low < 0.4 < 0.6 < high < 0.8


@pytest.mark.parametrize("masks", [None, MaskParams(time_masks=1, time_width=4, channel_masks=1, channel_width=4)])
def test_a_run_in_a_sweep_is_the_run_alone_bit_for_bit(planted, masks):
    params = BRIEF.model_copy(update={"masks": masks})
    features, splits = parts(planted, params)
    starts = [(0, 1e-2), (0, 3e-2), (1, 3e-2)]
    with SideBySide(CPU) as cores:
        together = train(features, splits, params, starts, CPU, cores)
        single = [train(features, splits, params, [start], CPU, cores)[0] for start in starts]
    for beside, by_itself in zip(together, single, strict=True):
        assert (beside.dev, beside.best_step) == (by_itself.dev, by_itself.best_step)
        for name, value in beside.head.state_dict().items():
            assert torch.equal(value, by_itself.head.state_dict()[name]), name


def test_the_number_of_cores_changes_no_bit(planted):
    threads, scores = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            scores.append(canonical_json(asdict(run(planted, BRIEF))))
    finally:
        torch.set_num_threads(threads)
    assert scores[0] == scores[1]
    assert scores[0] != canonical_json(asdict(run(planted, BRIEF.model_copy(update={"seeds": (5, 6)}))))


def test_what_is_held_in_memory_changes_no_bit_of_the_score(planted):
    assert run(planted, BRIEF, held_bytes=20_000) == run(planted, BRIEF)


def test_a_diverged_rate_is_not_chosen_and_leaves_clean_json(planted):
    diverged = run(planted, BRIEF.model_copy(update={"lrs": (1e-2, 1e30), "clip_norm": None}))
    assert (diverged.lr, dict(diverged.dev_by_lr)[1e30]) == (1e-2, 1.0)
    json.loads(canonical_json(asdict(diverged)))


def test_where_every_rate_diverges_there_is_no_score(planted):
    with pytest.raises(SettingsError, match=r"probes\.asr diverged at every learning rate \(1e\+30\).*smaller"):
        run(planted, BRIEF.model_copy(update={"lrs": (1e30,), "clip_norm": None}))


def test_a_run_without_patience_left_takes_no_more_steps(planted):
    features, splits = parts(planted, PARAMS)
    params = PARAMS.model_copy(update={"steps": 1000, "validate_every": 1, "patience": 2})
    steps: list[float] = []
    with SideBySide(CPU) as cores:
        still = train(features, splits, params, [(0, 1e-9)], CPU, cores, steps.append)
    assert still[0].best_step + 2 == len(steps) < 1000


def project(planted: Spoken, root: Path, monkeypatch) -> dict[str, Path]:
    """The files that the command reads."""
    monkeypatch.setenv("DECANT_STORE", str(root / "store"))
    home = root / "store" / "features" / planted.store.key
    home.parent.mkdir(parents=True)
    home.symlink_to(planted.store.directory)
    write_json(root / "hubert.json", make_receipt(home, planted.layers))
    write_manifest(root / "manifest.jsonl", planted.manifest)
    settings = BRIEF.model_copy(update={"beam": BEAM}).model_dump(mode="json")
    (root / "params.yaml").write_text(json.dumps({"probes": {"asr": settings}}))
    return {"features": root / "hubert.json", "manifest": root / "manifest.jsonl", "params": root / "params.yaml"}


@needs_beam
def test_the_command_writes_the_same_bytes_each_time_and_says_what_it_read(planted, tmp_path, monkeypatch, capsys):
    from stages.probe import main

    paths = project(planted, tmp_path, monkeypatch)
    outs = [tmp_path / "one.json", tmp_path / "two.json"]
    for out in outs:
        main(model="hubert", task="asr", out=out, device="cpu", **paths)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    found = read_json(outs[0])
    assert (found["model"], found["task"], found["metric"], found["higher_is_better"]) == (
        "hubert",
        "asr",
        "WER",
        False,
    )
    assert found["params"]["beam"]["lm"] == {"kind": "train", "order": 2}
    said = capsys.readouterr().out
    assert "24/24 updates" in said
    assert f"hubert on asr: WER {100 * found['mean']:.1f}" in said
    assert f"with a language model: WER {100 * found['beam']['mean']:.1f} %" in said


def test_settings_of_another_kind_of_task_are_refused_by_their_key(planted, tmp_path, monkeypatch):
    from stages.probe import main

    paths = project(planted, tmp_path, monkeypatch)
    settings = PARAMS.model_dump(mode="json") | {"silences": []}
    paths["params"].write_text(json.dumps({"probes": {"asr": settings}}))
    with pytest.raises(SettingsError, match="probes.asr.silences"):
        main(model="hubert", task="asr", out=tmp_path / "out.json", device="cpu", **paths)
