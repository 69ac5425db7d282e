"""What a fine-tuning is made of: loss weights, rates by depth, heads, and models to begin with."""

import math
import re
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from cache.errors import StoreError
from cache.publish import write_json
from pipeline.finetune.learner import Learner
from pipeline.finetune.model import KeywordHead, Model, SpeakerHead
from pipeline.finetune.rates import make_optimizer, set_rates
from pipeline.finetune.settings import FinetuneParams, Fixed, Uncertainty
from pipeline.finetune.start import open_start
from pipeline.finetune.weights import LossWeights
from pipeline.padding import frame_mask
from pipeline.student.checkpoint import save_student
from pipeline.tasks.xvector import VARIANCE_FLOOR
from tests.finetune_fixtures import FROZEN, TUNED, params
from tests.student_fixtures import TINY, changed, hf_model, noise, random_encoder

XVECTOR = {"pooling": {"kind": "xvector", "channels": 10, "pooled_width": 12}}


def sv(**changes):
    return {"sv": {**TUNED["tasks"]["sv"], **changes}}


def model_of(settings, shape=TINY, seed=0):
    return Model(settings, random_encoder(shape), {"kws": 5, "sv": 7}, torch.Generator().manual_seed(seed))


def test_learned_weights_settle_where_their_formula_says():
    weights = LossWeights(Uncertainty(kind="uncertainty"), ["kws", "sv"])
    losses = {"kws": torch.tensor(0.7), "sv": torch.tensor(5.0)}
    assert weights("kws", losses["kws"]).item() == pytest.approx(0.7)  # s = 0: the loss itself
    optimizer = torch.optim.SGD(weights.parameters(), lr=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        torch.stack([weights(task, loss) for task, loss in losses.items()]).sum().backward()
        optimizer.step()
    for task, loss in losses.items():  # d/ds (exp(-s) L + s / 2) = 0 at exp(-s) = 1 / (2 L)
        assert weights.now()[f"{task}_weight"] == pytest.approx(1 / (2 * float(loss)), rel=1e-3)
        assert weights(task, loss).item() == pytest.approx(0.5 + 0.5 * math.log(2 * float(loss)), rel=1e-4)


def test_fixed_weights_are_those_that_were_typed():
    weights = LossWeights(Fixed(kind="fixed", kws=0.25, sv=None), ["kws"])
    assert float(weights("kws", torch.tensor(8.0))) == 2.0
    assert weights.now() == {}
    assert not list(weights.parameters())


def test_rates_fall_block_by_block_and_the_convolutions_learn_slowest():
    settings = params(encoder={"learning_rate": 0.08, "layer_decay": 0.5, "frozen_steps": 0}, train={"warmup": 0.0})
    model = model_of(settings)
    optimizer = make_optimizer(model, LossWeights(settings.loss_weights, ["kws", "sv"]), settings)
    set_rates(optimizer, 1, settings)
    rate_of = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    encoder = model.encoder
    by_hand = {
        "blocks.2.ffn_up.weight": 0.08,
        "blocks.1.attention.query.bias": 0.04,
        "blocks.0.ffn_norm.weight": 0.02,
        "projection.weight": 0.01,
        "position.direction": 0.01,
        "norm.weight": 0.01,  # of a post-norm encoder: before the first block
        "front.0.conv.weight": 0.005,
        "front.0.norm.weight": 0.005,
    }
    for name, rate in by_hand.items():
        assert rate_of[id(encoder.get_parameter(name))] == pytest.approx(rate), name
    assert rate_of[id(model.heads["kws"].head.classify.weight)] == 0.01
    everything = [id(p) for p in model.parameters()]
    assert sorted(rate_of) == sorted(everything)  # each in one group, none forgotten


def test_the_norm_of_a_pre_norm_encoder_is_above_its_last_block():
    settings = params(encoder={"learning_rate": 0.08, "layer_decay": 0.5, "frozen_steps": 0}, train={"warmup": 0.0})
    model = model_of(settings, changed(TINY, pre_norm=True))
    optimizer = make_optimizer(model, torch.nn.Module(), settings)
    (group,) = [g for g in optimizer.param_groups if any(p is model.encoder.norm.weight for p in g["params"])]
    assert group["peak"] == 0.08


def test_biases_norms_and_layer_weights_do_not_decay():
    settings = params()
    model = model_of(settings)
    optimizer = make_optimizer(model, torch.nn.Module(), settings)
    decay_of = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        is_free = name.endswith(("bias", "layer_scores", "magnitude")) or "norm" in name
        assert decay_of[id(parameter)] == (0.0 if is_free else 0.01), name


def test_a_frozen_encoder_and_frozen_convolutions_are_in_no_group():
    for changes, free in (({"encoder": FROZEN}, ()), ({"encoder": {"freeze_convolutions": True}}, ("front.",))):
        settings = params(**changes)
        model = model_of(settings)
        optimizer = make_optimizer(model, torch.nn.Module(), settings)
        moving = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for name, parameter in model.encoder.named_parameters():
            moves = bool(free) and not name.startswith(free)
            assert (id(parameter) in moving) == parameter.requires_grad == moves, name


def test_a_rate_waits_for_its_frozen_steps_and_then_rises_and_falls():
    settings = params(encoder={"frozen_steps": 4, "layer_decay": 1.0}, train={"steps": 14, "warmup": 0.2})
    optimizer = make_optimizer(model_of(settings), torch.nn.Module(), settings)
    heads, encoder = [], []
    for step in range(1, 15):
        heads.append(set_rates(optimizer, step, settings))
        encoder.append(optimizer.param_groups[-1]["lr"])
    assert encoder[:4] == [0.0] * 4
    # ten updates are left, two of them rise
    by_hand = [0.5, 1.0, *(k / 9 for k in range(8, 0, -1))]
    assert encoder[4:] == pytest.approx([0.003 * share for share in by_hand])
    assert max(heads) == heads[2] == pytest.approx(0.01)


def test_the_keyword_head_is_that_of_superb_frame_by_frame():
    settings = params()
    head = KeywordHead(settings.tasks.kws, 4, 24, 5, torch.Generator().manual_seed(0))
    with torch.no_grad():
        head.head.layer_scores.copy_(torch.tensor([0.3, -1.0, 2.0, 0.1]))
    states = [torch.randn(3, 9, 24, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    counts = torch.tensor([9, 4, 7])
    frame_by_frame = head.head(torch.stack(states, 1), frame_mask(counts, 9))
    torch.testing.assert_close(head(states, counts), frame_by_frame, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layers", ["weighted", "last"])
@pytest.mark.parametrize("pooling", [{}, XVECTOR], ids=["statistics", "x-vector"])
def test_an_utterance_is_judged_alike_alone_and_among_longer_ones(layers, pooling):
    kws = {**TUNED["tasks"]["kws"], "layers": layers}
    model = model_of(params(tasks={"kws": kws, **sv(layers=layers, **pooling)}), changed(TINY, pre_norm=True)).eval()
    waves, samples = noise(9_000, 4_321, 16_000)
    for task in ("kws", "sv"):
        together = model(task, waves, samples)
        for row, count in enumerate(samples.tolist()):
            alone = model(task, waves[row : row + 1, :count], samples[row : row + 1])
            torch.testing.assert_close(together[row], alone[0], rtol=0, atol=1e-5)


def test_statistics_are_means_and_deviations_of_the_frames_there_are():
    head = SpeakerHead(params().tasks.sv, 1, 24, 7, torch.Generator().manual_seed(0))
    states = torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(1))
    counts = torch.tensor([11, 6])
    made = head([states], counts)
    for row, count in enumerate(counts.tolist()):
        frames = head.project(states[row, :count]).relu()
        pooled = torch.cat([frames.mean(0), (frames.var(0, correction=0) + VARIANCE_FLOOR).sqrt()])
        torch.testing.assert_close(made[row], head.embed(pooled), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_a_teacher_is_opened_without_its_library_and_computes_the_same(tmp_path, family):
    teacher = hf_model(family)
    teacher.save_pretrained(tmp_path)
    write_json(tmp_path / "teacher.json", {"normalise": False})
    start = open_start(tmp_path)
    assert start.kind == "teacher"
    encoder = start.encoder(params()).eval()
    waves, samples = noise(8_000)
    with torch.no_grad():
        hidden = encoder(waves, samples).hidden
        reference = teacher(waves, output_hidden_states=True).hidden_states
    for ours, theirs in zip(hidden, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_a_start_keeps_its_dropout_or_takes_that_of_the_settings(tmp_path):
    encoder = random_encoder(TINY)
    (tmp_path / "student").mkdir()
    save_student(tmp_path / "student", encoder, {})
    start = open_start(tmp_path / "student")
    assert (start.kind, start.name) == ("student", "student")
    assert start.encoder(params()).shape == TINY
    rates = {"features": 0.0, "hidden": 0.2, "attention": 0.3, "activation": 0.0}
    other = start.encoder(params(encoder={"dropout": rates}))
    assert other.blocks[0].hidden_dropout.p == 0.2
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), encoder.parameters(), strict=True))
    assert start.encoder(params(encoder=FROZEN)).shape == TINY


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(StoreError, match="neither shape.json nor teacher.json"):
        open_start(tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tasks": {"kws": None, "sv": None}}, "both tasks are null"),
        ({"tasks": {"sv": None}}, "loss_weights.sv is 1.0 and tasks.sv is null"),
        ({"loss_weights": {"kind": "fixed", "kws": None, "sv": 1.0}}, "loss_weights.kws is None and tasks.kws is set"),
        ({"seeds": [1, 1]}, "seeds has one of them twice"),
        ({"encoder": {"frozen_steps": 8}}, "leaves nothing of the 8 steps"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, told):
    with pytest.raises(ValidationError, match=told):
        params(**changes)


def test_the_update_of_both_tasks_has_the_sum_of_their_gradients():
    """Joint training is the weighted sum of two losses, each a mean over the examples of its own batch."""
    from pipeline.distill.batches import Batch

    settings = params(
        loss_weights={"kind": "fixed", "kws": 0.5, "sv": 2.0},
        encoder={"frozen_steps": 0},
        train={"clip": None},
    )
    classes = {"kws": ("a", "b"), "sv": ("x", "y", "z")}
    class_of = {"kws": {"u": 0, "v": 1}, "sv": {"u": 2, "v": 0}}
    waves, samples = noise(6_000, 5_000)
    stored = (waves * 32768).to(torch.int16)
    batch = Batch(7, ["u", "v"], stored, samples, [], torch.tensor([18, 15]))

    def learner():
        return Learner(settings, random_encoder(TINY), classes, class_of, 0, "cpu")

    joint = learner()
    update = joint.update([("kws", batch), ("sv", batch)], {"kws": 2, "sv": 2}, 1)
    by_hand = learner().train()
    losses = {}
    for task in ("kws", "sv"):
        made = by_hand.model(task, stored.float() / 32768, samples)
        truth = torch.tensor([class_of[task][name] for name in batch.ids])
        losses[task] = by_hand.model.heads[task].loss(made, truth)
    (0.5 * losses["kws"] + 2.0 * losses["sv"]).backward()
    assert update.terms["kws"] == pytest.approx(losses["kws"].item(), rel=1e-5)
    assert update.terms["total"] == pytest.approx(0.5 * losses["kws"].item() + 2.0 * losses["sv"].item(), rel=1e-5)
    for (name, ours), theirs in zip(joint.model.named_parameters(), by_hand.model.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_the_system_of_the_documentation_is_one():
    page = (Path(__file__).parent.parent / "docs/finetune.md").read_text()
    (block,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    ((name, shown),) = yaml.safe_load(block)["finetunes"].items()
    settings = FinetuneParams.model_validate(shown)
    assert (name, list(settings.tasks.named)) == ("distil-kws-sv", ["kws", "sv"])
