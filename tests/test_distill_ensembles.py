"""Several teachers: what they are combined to, what is trained on it, and what is refused."""

import csv
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from cache.codecs import decode
from cache.errors import StoreError
from cache.manifest import Manifest
from cache.publish import read_json, write_json
from cache.receipts import open_receipt
from pipeline.distill.batches import BatchReader
from pipeline.distill.build import first_learner
from pipeline.distill.ensemble import TargetMaker
from pipeline.distill.plan import Aligned, Item, Planned, plan_epoch
from pipeline.distill.settings import StudentParams
from pipeline.distill.train import distil
from pipeline.extraction.settings import Skip
from pipeline.layers.targets import open_targets, targets_json
from stages._params import read_params
from tests.distill_fixtures import EXTRACT, STOP_BEFORE, make_world, relabelled, without_teachers, write_params
from tests.distill_fixtures import write_receipt as run_teacher
from tests.ensemble_fixtures import BOTH, MIXED, PAIRED, SAMPLE, choose, make_teachers, several, single

WEIGHTS = ("heads.safetensors", "weights.safetensors")
FILES = ("curves.csv", "heads.safetensors", "metrics.json", "weights.safetensors")


@pytest.fixture(scope="module")
def world(shared_root):
    return make_teachers(shared_root)


@pytest.fixture
def own_world(tmp_path, monkeypatch):
    """One that a test may change, with hubert and wavlm."""
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    world = make_world(tmp_path)
    run_teacher(world, "wavlm", seed=9)
    return world


def params_of(world, ensemble, **train):
    write_params(world, ensemble=ensemble, init={"kind": "random"}, train=train)
    return read_params("students.distil", StudentParams, world.root / "params.yaml")


def train(world, ensemble, out, said=None, **settings):
    """Train a student; gives its files."""
    params = params_of(world, ensemble, **settings)
    waves = open_receipt(world.root / "receipts/waves.json")
    say = (lambda _: None) if said is None else said.append
    folder = world.root / out
    distil(params, choose(world, ensemble), world.manifest, waves, [], folder, "cpu", lambda *_, **__: None, say)
    return {name: (folder / name).read_bytes() for name in FILES}


def frames_of(world, teacher, layer, utterance, normalise):
    """The targets of one layer in float64, by the meaning of the codec and of "channel"."""
    store = open_receipt(world.root / f"receipts/{teacher}.json")
    array = f"layer-{layer:02d}"
    codec, tables = store.spec(array).coding, store.tables(array)

    def decoded(u):
        return decode(store.read(array, u), codec, tables).astype(np.float64)

    if normalise is None:
        return decoded(utterance)
    if tables:
        mean, std = tables["mean"].astype(np.float64), tables["std"].astype(np.float64)
    else:
        drawn, seconds = [], 0.0
        for u in np.random.default_rng(normalise["seed"]).permutation(len(store.rows)).tolist():
            if seconds < normalise["seconds"]:
                drawn.append(decoded(u))
                seconds += len(drawn[-1]) / 50
        assert len(drawn) < len(store.rows)
        mean, std = np.concatenate(drawn).mean(0), np.concatenate(drawn).std(0)
    return (decoded(utterance) - mean) / std


def losses_of(predicted, targets, form):
    """L1, L2 and distance of some frames of all heads of one group, in float64: lists of (frames, width)."""
    p, h = np.concatenate(predicted), np.concatenate(targets)
    cosine = (p * h).sum(1) / np.sqrt((p * p).sum(1) * (h * h).sum(1))
    distance = -cosine if form == "raw" else np.log1p(np.exp(-cosine))
    return np.array([np.abs(p - h).mean(), np.square(p - h).mean(), distance.mean()])


@pytest.mark.parametrize("form", ["log_sigmoid", "raw"])
@pytest.mark.parametrize("normalise", [None, SAMPLE])
@pytest.mark.parametrize(
    ("kind", "teachers"),
    [("single", BOTH[:1]), ("heads", MIXED), ("average", BOTH), ("concat", PAIRED)],
    ids=["single", "heads", "average", "concat"],
)
def test_the_loss_of_an_ensemble_is_its_equation_in_float64(world, kind, teachers, normalise, form):
    ensemble = single(normalise=normalise) if kind == "single" else several(kind, *teachers, normalise=normalise)
    params = params_of(world, ensemble, cosine=form, l1_weight=0.7, l2_weight=0.3, cosine_weight=2.0)
    targets = choose(world, ensemble)
    stores = open_targets(targets)
    learner = first_learner(params, targets, [], "cpu", TargetMaker(params.ensemble, targets, stores, "cpu")).eval()
    waves = open_receipt(world.root / "receipts/waves.json")
    reader = BatchReader(world.manifest, waves, stores, [list(store.arrays) for store in targets.stores])
    utterances = [0, 7, 3]
    batch = reader.read_clean([Item(u, None) for u in utterances])
    with torch.no_grad():
        sums, predicted = learner(batch)
    counts = [world.manifest[u].num_frames for u in utterances]
    assert len(set(counts)) == 3  # there is padding

    shares = [w / sum(w for *_, w in teachers) for *_, w in teachers]
    wanted = [  # teacher, layer, utterance
        [[frames_of(world, name, layer, u, normalise) for u in utterances] for layer in layers]
        for name, layers, _ in teachers
    ]
    if kind == "average":
        wanted = [
            [
                [sum(s * f for s, f in zip(shares, fs, strict=True)) for fs in zip(*ls, strict=True)]
                for ls in zip(*wanted, strict=True)
            ]
        ]
    if kind == "concat":
        wanted = [[[np.concatenate(fs, axis=1) for fs in zip(*ls, strict=True)] for ls in zip(*wanted, strict=True)]]
    shares = shares if kind == "heads" else [1.0]
    expected = np.zeros(3)
    for share, group, heads in zip(shares, predicted, wanted, strict=True):
        assert group.shape == (3, len(heads), max(counts), heads[0][0].shape[1])
        own = [group[b, n, :count].double().numpy() for n in range(len(heads)) for b, count in enumerate(counts)]
        expected += share * losses_of(own, [frames for head in heads for frames in head], form)
    assert list(sums) == ["l1", "l2", "cosine", "total"]
    terms = {name: (learner.target_weights * per_target).sum() / sum(counts) for name, per_target in sums.items()}
    np.testing.assert_allclose([float(terms[n]) for n in ("l1", "l2", "cosine")], expected, rtol=0, atol=1e-6)
    assert float(terms["total"]) == pytest.approx(expected @ [0.7, 0.3, 2.0], abs=2e-6)


def test_an_ensemble_of_one_is_that_teacher_bit_for_bit(world):
    settings = {"steps": 5, "validate_every": 5}
    alone = train(world, single(), "models/single", **settings)
    for kind in ("heads", "average", "concat"):
        assert train(world, several(kind, ("hubert", (3, 1), 1.0)), f"models/{kind}", **settings) == alone
        assert train(world, several(kind, ("hubert", (3, 1), 0.3)), f"models/{kind}", **settings) == alone
    assert train(world, single("wavlm"), "models/other", **settings) != alone


def test_the_average_of_two_like_teachers_is_one_of_them(world):
    alone = train(world, single(), "models/single", steps=5)
    twice = several("average", ("hubert", (3, 1), 2.0), ("twin", (3, 1), 2.0))
    same = train(world, twice, "models/twice", steps=5)
    assert [same[name] for name in WEIGHTS] == [alone[name] for name in WEIGHTS]


@pytest.mark.parametrize("normalise", [None, SAMPLE])
@pytest.mark.parametrize(("kind", "teachers"), [("heads", MIXED), ("concat", PAIRED), ("average", BOTH)])
def test_teachers_of_other_codecs_and_widths_are_learned_from(world, kind, teachers, normalise):
    ensemble = several(kind, *teachers, normalise=normalise)
    settings = {"crop": {"kind": "full"}, "feature_grad_mult": 1.0, "validate_every": None}
    train(world, ensemble, "models/mixed", steps=80, learning_rate=0.005, **settings)
    rows = list(csv.DictReader((world.root / "models/mixed/curves.csv").read_text().splitlines()))
    totals = [float(row["total"]) for row in rows if row["total"]]
    assert np.mean(totals[-4:]) < 0.95 * np.mean(totals[:2])
    parameters = read_json(world.root / "models/mixed/metrics.json")["parameters"]["heads"]
    out_widths = {"heads": [16, 16, 12, 12, 12], "concat": [28, 28], "average": [16, 16]}[kind]
    assert parameters == sum(17 * 16 + 17 * width for width in out_widths)


def test_an_utterance_is_found_wherever_each_store_has_it(own_world):
    turned = replace(own_world, manifest=Manifest(own_world.manifest.utterances[::-1]))
    run_teacher(turned, "turned", seed=0)
    stores = [open_receipt(own_world.root / f"receipts/{name}.json") for name in ("hubert", "turned")]
    assert stores[0].ids == stores[1].ids[::-1]
    waves = open_receipt(own_world.root / "receipts/waves.json")
    reader = BatchReader(own_world.manifest, waves, stores, [["layer-01"], ["layer-01"]])
    batch = reader.read_clean([Item(u, None) for u in (0, 7, 3)])
    for b, name in enumerate(batch.ids):
        for rows, store in zip(batch.targets, stores, strict=True):
            np.testing.assert_array_equal(rows[b, 0, : batch.frames[b]], store.read("layer-01", name))


def test_l2_has_a_column_where_it_counts(world):
    train(world, single(), "models/l2", steps=5, l2_weight=0.5)
    head, *rows = (world.root / "models/l2/curves.csv").read_text().splitlines()
    assert (
        head
        == "step,rate,l1,l2,cosine,total,grad_norm,dev_l1,dev_l2,dev_cosine,dev_total,dev_hubert.layer-03,dev_hubert.layer-01"
    )
    (last,) = csv.DictReader([head, rows[-1]])
    assert float(last["dev_total"]) == pytest.approx(
        float(last["dev_l1"]) + 0.5 * float(last["dev_l2"]) + float(last["dev_cosine"]), rel=1e-6
    )


def test_a_batch_holds_the_rows_of_every_store(world):
    stores = [open_receipt(world.root / f"receipts/{name}.json") for name in ("hubert", "narrow", "twin")]
    waves = open_receipt(world.root / "receipts/waves.json")
    arrays = [["layer-03"], ["layer-01", "layer-00", "layer-03"], ["layer-01"]]
    reader = BatchReader(world.manifest, waves, stores, arrays)
    plan = list(plan_epoch(world.manifest.samples, Aligned(kind="aligned", max_seconds=0.5), 3.0, 0, 0))
    assert any(item.span is None for items in plan for item in items)
    assert any(item.span is not None for items in plan for item in items)
    numbered = (Planned(number, items) for number, items in enumerate(plan))
    with reader.ahead(numbered, 3.0, 2, torch.device("cpu")) as batches:
        for items, batch in zip(plan, batches, strict=True):
            for b, (utterance, span) in enumerate(items):
                name, count = world.manifest[utterance].id, int(batch.frames[b])
                for rows, store, names in zip(batch.targets, stores, arrays, strict=True):
                    np.testing.assert_array_equal(
                        rows[b, :, :count], np.stack([store.read(array, name, span) for array in names])
                    )
                    assert not rows[b, :, count:].any()


def test_targets_of_another_ensemble_are_refused(world):
    waves = open_receipt(world.root / "receipts/waves.json")
    for asked, chosen in (
        (several("heads", *BOTH), single()),
        (single(layers=(1, 3)), single()),
        (single(normalise=SAMPLE), single()),
    ):
        params, targets = params_of(world, asked), choose(world, chosen)
        with pytest.raises(StoreError, match="chosen for another ensemble .*; run `decant targets` again"):
            distil(params, targets, world.manifest, waves, [], world.root / "m", "cpu", lambda *_, **__: None, print)


def test_teachers_of_other_audio_are_refused_and_of_the_same_skipped_audio_are_not(own_world):
    both = several("heads", *BOTH)
    limit = sorted(u.samples for u in own_world.manifest if u.split == "train")[-3] / 16_000
    skip = EXTRACT.model_copy(update={"long": Skip(kind="skip", max_sec=limit)})
    run_teacher(own_world, "wavlm", seed=9, params=skip)
    with pytest.raises(StoreError, match="wavlm was extracted from other utterances than hubert, .*one extract.long"):
        choose(own_world, both)
    run_teacher(own_world, "hubert", seed=0, params=skip)
    said = []
    train(own_world, both, "models/kept", said, steps=2, validate_every=2)
    left_out = sum(u.samples > limit * 16_000 for u in own_world.manifest)
    assert said == [f"{left_out} utterances of more than {limit:g} s have no targets"]
    other = relabelled(own_world.manifest, audio="0" * 32)
    params, targets = params_of(own_world, both), choose(own_world, both)
    waves = open_receipt(own_world.root / "receipts/waves.json")
    with pytest.raises(StoreError, match="extracted from other audio"):
        distil(params, targets, other, waves, [], own_world.root / "m", "cpu", lambda *_, **__: None, print)


def test_an_ensemble_trains_without_its_teachers_and_goes_on_after_kill_9(own_world):
    ensemble = several("heads", *BOTH, normalise=SAMPLE)
    settings = {"steps": 12, "checkpoint_every": 2, "validate_every": 6}
    whole = train(own_world, ensemble, "models/whole", **settings)
    write_json(own_world.root / "targets.json", targets_json(choose(own_world, ensemble)))
    environment = without_teachers(own_world)
    state = own_world.root / "models/.distil.training.partial"
    command = [sys.executable, "-c", STOP_BEFORE, "6", *own_world.command()[4:]]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and not (state / "state-000000004.json").exists():
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run(own_world.command(), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "going on after step 4 of 12" in done.stdout
    assert {name: (own_world.root / "models/distil" / name).read_bytes() for name in FILES} == whole
