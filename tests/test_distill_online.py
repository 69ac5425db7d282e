"""Cached training is online training: the same losses from a float32 store as from the teachers run on every batch."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter
from transformers import HubertConfig, HubertModel, WavLMConfig, WavLMModel

from cache.manifest import Manifest
from cache.publish import write_json
from cache.receipts import open_receipt
from pipeline.distill.batches import BatchReader
from pipeline.distill.build import first_learner
from pipeline.distill.ensemble import TargetMaker
from pipeline.distill.plan import Full, Planned, plan_epoch
from pipeline.distill.settings import StudentParams
from pipeline.extract import extract
from pipeline.extraction.settings import Keep
from pipeline.layers.choose import choose_targets
from pipeline.layers.ensembles import Ensemble, members
from pipeline.layers.targets import Random, open_targets
from pipeline.padding import INT16_SCALE
from pipeline.teachers.forward import Teacher
from pipeline.teachers.pinned import Pinned
from tests.conftest import TINY_HUBERT
from tests.distill_fixtures import EXTRACT, STUDENT, make_world

TINY = {**TINY_HUBERT, "conv_dim": (4, 4, 4, 4, 4, 4, 8), "hidden_size": 16, "num_attention_heads": 2}
TINY |= {"intermediate_size": 24, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}
WIDER = {**TINY, "hidden_size": 24, "num_attention_heads": 3, "num_conv_pos_embedding_groups": 4}
SETTINGS = {"crop": {"kind": "full"}, "batch_seconds": 3.0, "validate_every": None, "feature_grad_mult": 1.0}


class Online(TargetMaker):
    """Targets from the teachers themselves, which hear the batch that is being learned from."""

    def __init__(self, ensemble, teachers) -> None:
        self.members, self.teachers, self.batch = members(ensemble), teachers, None

    def __call__(self, rows):
        waves = self.batch.waves.float() * INT16_SCALE
        made = []
        for member in self.members:
            outputs = self.teachers[member.teacher].outputs(waves, self.batch.samples)
            layers = [outputs.projection if n == "projection" else outputs.layers[n] for n in member.layers]
            made.append(torch.stack(layers, dim=1))
        return made


def teacher_of(model, name):
    pinned = Pinned(
        family=model.config.model_type,
        digest=name,
        source={"kind": "random"},
        normalise=False,
        layers=model.config.num_hidden_layers + 1,
        width=model.config.hidden_size,
        num_params=sum(p.numel() for p in model.parameters()),
    )
    return Teacher(model, pinned, torch.device("cpu"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A corpus, two teachers of transformers, and their float32 and float16 stores."""
    root: Path = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DECANT_STORE", str(root / "store"))
        world = make_world(root)
        torch.manual_seed(0)
        models = {"hubert": HubertModel(HubertConfig(**TINY)), "wavlm": WavLMModel(WavLMConfig(**WIDER))}
        teachers = {name: teacher_of(model, name) for name, model in models.items()}
        waves = open_receipt(root / "receipts/waves.json")
        for codec in ("float32", "float16"):
            params = EXTRACT.model_copy(update={"codec": codec})
            for name, teacher in teachers.items():
                keep = Keep(layers=("projection", 1, 2, 3), select="all")
                receipt = extract(teacher, world.manifest, waves, params, keep, "cpu", lambda *_, **__: None)
                write_json(root / codec / f"{name}.json", receipt)
        yield world, teachers


def losses(world, teachers, ensemble, steps, codec="float32", **changes):
    """The terms of every step, from the store and from the teachers, and the padding that the batches had."""
    student = {**STUDENT, "ensemble": ensemble, "init": {"kind": "random"}, **changes}
    student["train"] = {**STUDENT["train"], **SETTINGS, "steps": steps}
    params = StudentParams.model_validate(student)
    parsed = TypeAdapter(Ensemble).validate_python(ensemble)
    targets = choose_targets(parsed, world.root / codec, Random(kind="random"), world.root / "init")
    stores = open_targets(targets)
    online = Online(parsed, teachers)
    makers = [TargetMaker(parsed, targets, stores, "cpu"), online]
    cached, looped = (first_learner(params, targets, [], "cpu", maker) for maker in makers)
    train = world.manifest.select(split="train")
    waves = open_receipt(world.root / "receipts/waves.json")
    reader = BatchReader(train, waves, stores, [list(store.arrays) for store in targets.stores])
    rows, padding = [], 0
    with reader.ahead(islice(planned(params, train), steps), params.train.batch_seconds, 1, cached.device) as batches:
        for step, batch in enumerate(batches, 1):
            online.batch = batch
            frames = int(batch.frames.sum())
            rows.append([learner.update([batch], frames, step).terms for learner in (cached, looped)])
            padding += int(batch.frames.max() * len(batch.frames)) - frames
    assert len(rows) == steps
    return rows, padding


def planned(params: StudentParams, train: Manifest):
    number = 0
    for epoch in range(10**6):
        for items in plan_epoch(train.samples, Full(kind="full"), params.train.batch_seconds, params.seed, epoch):
            yield Planned(number, items)
            number += 1


def farthest(rows):
    """Over all steps and terms, how far the two are apart."""
    return max(abs(cached[name] - looped[name]) for cached, looped in rows for name in cached)


def single(*layers):
    return {"kind": "single", "teacher": "hubert", "layers": list(layers), "normalise": None}


def test_a_hundred_steps_from_the_store_have_the_losses_of_a_teacher_in_the_loop(world):
    world, teachers = world
    rows, padding = losses(world, teachers, single(3, 1), steps=100)
    assert padding > 0  # teachers are exact in padded batches too
    assert farthest(rows) < 1e-5
    totals = [cached["total"] for cached, _ in rows]
    assert sum(totals[-10:]) < 0.97 * sum(totals[:10])  # and something is learned


def test_so_have_two_teachers_with_heads_of_their_own(world):
    world, teachers = world
    listed = [
        {"teacher": "hubert", "layers": [3, 1], "weight": 1.0},
        {"teacher": "wavlm", "layers": [2], "weight": 3.0},
    ]
    rows, _ = losses(world, teachers, {"kind": "heads", "teachers": listed, "normalise": None}, steps=20)
    assert farthest(rows) < 1e-5


def test_so_has_layer_to_layer_distillation_of_a_whole_copy(world):
    world, teachers = world
    predict = {"kind": "layers", "student": "same", "several": "mean", "linears": [[0], [1, 2]]}
    shape = {**STUDENT["shape"], "heads": [2, 2, 2], "ffn": [24, 24, 24]}
    rows, _ = losses(world, teachers, single("projection", 1, 3), steps=20, predict=predict, shape=shape)
    assert farthest(rows) < 1e-5


def test_float16_targets_leave_the_losses_where_they_were_to_three_digits(world):
    world, teachers = world
    rows, _ = losses(world, teachers, single(3, 1), steps=20, codec="float16")
    assert 1e-7 < farthest(rows) < 1e-3
