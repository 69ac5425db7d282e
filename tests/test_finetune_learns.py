"""Fine-tuning learns both tasks, and what it publishes is what was judged."""

import csv
import json

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from sklearn.metrics import roc_curve

from cache.publish import read_json
from cache.receipts import open_receipt
from pipeline.finetune.model import load_tuned
from pipeline.padding import pad_waves
from pipeline.report.products import TunedFile, parsed
from pipeline.student.checkpoint import load_student
from pipeline.student.upstream import load_student_upstream
from tests.finetune_fixtures import LEARNS, draw_trials, make_world, products, relabelled, tune, write_params


@pytest.fixture(scope="module")
def corpus(shared_root):
    """One corpus for all tests: each has an output of its own."""
    return make_world(shared_root)


@pytest.fixture
def world(corpus):
    write_params(corpus)
    return corpus


@pytest.fixture(scope="module")
def learned(corpus):
    """A model of enough steps to learn both tasks, and its metrics."""
    write_params(corpus, **LEARNS)
    return tune(corpus, "models/learned")


def test_both_tasks_are_learned_and_the_product_is_whole(corpus, learned):
    assert learned["tasks"]["kws"]["mean"] > 0.9
    assert learned["tasks"]["sv"]["mean"] < 0.35  # chance is 0.5, and 16 voices are few to learn what a voice is
    assert learned["tasks"]["sv"]["min_dcf"] <= 1.0
    low, high = learned["tasks"]["kws"]["interval"]
    assert low <= learned["tasks"]["kws"]["mean"] <= high
    assert learned["tasks"]["kws"]["sd"] is None  # of one seed
    assert learned == read_json(corpus.root / "models/learned/metrics.json")
    in_a_table = parsed(corpus.root / "models/learned/metrics.json", TunedFile)
    assert in_a_table.tasks["sv"].min_dcf == learned["tasks"]["sv"]["min_dcf"]
    assert (in_a_table.frozen, in_a_table.starts_from.name) == (False, "start")
    products(corpus, "models/learned")
    rows = list(csv.DictReader((corpus.root / "models/learned/curves.csv").read_text().splitlines()))
    assert {row["seed"] for row in rows} == {"0"}
    assert [int(row["step"]) for row in rows if row["dev_error"]] == [40, 80, 120]
    assert float(rows[-1]["total"]) < 0.5 * float(rows[0]["total"])
    described = read_json(corpus.root / "models/learned/shape.json")
    assert described["kind"] == "finetuned"
    assert described["starts_from"]["name"] == "start"
    assert described["classes"]["kws"] == ["fast", "slow", "still"]
    assert str(corpus.root) not in json.dumps(described)
    assert not list((corpus.root / "models").glob(".learned*"))


def test_shuffled_labels_are_not_learned(world):
    """The test's own labels stay: what beats chance here would be a leak."""

    def shuffled(u):
        if u.tasks["kws"] != "train":
            return {}
        drawn = int(u.audio, 16)
        return {"keyword": ("fast", "slow", "still")[drawn % 3], "speaker": f"v{(1, 2, 4, 5)[drawn // 3 % 4]:02d}"}

    write_params(world, **{**LEARNS, "train": {**LEARNS["train"], "steps": 80}})
    told = tune(world, "models/shuffled", relabelled(world.manifest, shuffled))["tasks"]
    assert told["kws"]["mean"] < 0.6  # of 24 utterances, chance a third
    assert told["sv"]["mean"] > 0.35


def test_the_product_judges_as_its_metrics_say(corpus, learned):
    """Read back, every test utterance alone, trials scored by hand: another way to the same accuracy and EER."""
    model, manifest = load_tuned(corpus.root / "models/learned"), corpus.manifest
    store = open_receipt(corpus.root / "receipts/waves.json")
    right, embedding = 0, {}
    for utterance in manifest.select(split="test"):
        waves, samples = pad_waves([store.read("wave", utterance.id)])
        with torch.no_grad():
            scores, embedding[utterance.id] = model("kws", waves, samples), model("sv", waves, samples)[0]
        right += ["fast", "slow", "still"][int(scores.argmax())] == utterance.keyword
    assert right / len(embedding) == pytest.approx(learned["tasks"]["kws"]["mean"])
    trials = [t for t in draw_trials(manifest) if t.list == "hum/test"]
    scores = [float(torch.cosine_similarity(embedding[t.first], embedding[t.second], dim=0)) for t in trials]
    same = np.array([t.same for t in trials])
    far, hit, _ = roc_curve(same, scores, drop_intermediate=False)
    rate = brentq(lambda x: 1 - x - np.interp(x, far, hit), 0, 1)
    assert rate == pytest.approx(learned["tasks"]["sv"]["mean"], abs=1e-4)


def test_the_encoder_opens_as_a_student_and_can_be_extracted_and_tuned_again(corpus, learned, world):
    encoder = load_student(world.root / "models/learned")
    upstream = load_student_upstream(world.root / "models/learned")
    assert upstream.num_layers == encoder.shape.num_blocks + 1
    write_params(world, train={"steps": 2})
    again = tune(world, "models/again", start="models/learned")
    assert again["starts_from"]["name"] == "learned"
    assert again["parameters"]["encoder"] == learned["parameters"]["encoder"]
