import pytest
import torch
from pydantic import ValidationError
from torch import nn

from cache.errors import SettingsError
from pipeline.distill.pruning import PruneParams, SparsityControl, check_prunable
from pipeline.student.compact import compact
from pipeline.student.encoder import Encoder, count_parameters, initialise
from pipeline.student.gates import Gates
from pipeline.student.size import expected_parameters, expected_sparsity, full_parameters
from tests.prune_fixtures import HUBERT_LIKE, SHAPES, changed, speech

PRUNE = {
    "units": ["conv", "heads", "ffn"],
    "sparsity": 0.4,
    "warmup_steps": 100,
    "gate_lr": 0.02,
    "lambda_lr": 0.02,
    "drop": {"conv": 0.01, "heads": 0.01, "ffn": 0.5},
    "rounding": "each",
    "final": {"steps": 100, "learning_rate": 1e-3, "warmup": 0.2},
}


def params(**changes):
    return PruneParams.model_validate({**PRUNE, **changes})


def test_the_sparsity_to_reach_rises_in_a_line_and_stays():
    control = SparsityControl(params(sparsity=0.75, warmup_steps=50))
    assert [control.target(step) for step in (1, 11, 26, 51, 52, 9999)] == [0.0, 0.15, 0.375, 0.75, 0.75, 0.75]
    assert SparsityControl(params(warmup_steps=0)).target(1) == 0.4


def test_the_regulariser_is_the_augmented_lagrangian():
    control = SparsityControl(params())
    with torch.no_grad():
        control.lambda1.fill_(-1.5)
        control.lambda2.fill_(4.0)
    sparsity = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    value = control.regulariser(sparsity, 51)  # the target is 0.2
    value.backward()
    assert value.item() == pytest.approx(-1.5 * 0.1 + 4.0 * 0.01)
    assert sparsity.grad.item() == pytest.approx(-1.5 + 2 * 4.0 * 0.1, rel=1e-5)
    assert control.lambda1.grad.item() == pytest.approx(0.1)
    assert control.lambda2.grad.item() == pytest.approx(0.01)


def test_the_multipliers_climb_and_the_gates_descend():
    control = SparsityControl(params(gate_lr=0.03, lambda_lr=0.05, warmup_steps=0))
    gates = Gates(HUBERT_LIKE, ("ffn",), params().drop, torch.Generator().manual_seed(0))
    groups = control.groups(gates)
    assert [group["peak"] for group in groups] == [0.03, 0.05]
    optimizer = torch.optim.AdamW(groups, lr=0.0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    with torch.no_grad():
        control.lambda1.fill_(-1.0)
    before = gates.log_alpha.detach().clone()
    sparsity = expected_sparsity(HUBERT_LIKE, gates)
    assert sparsity < 0.4
    control.regulariser(sparsity, 1).backward()
    optimizer.step()
    # Adam's first step is the learning rate long. Too little is pruned: lambda_1 goes down along its gradient s - t < 0,
    assert control.lambda1.item() == pytest.approx(-1.05, abs=1e-4)
    assert control.lambda2.item() == pytest.approx(0.05, abs=1e-4)  # lambda_2 up along (s - t)^2 > 0,
    torch.testing.assert_close(before - gates.log_alpha.detach(), torch.full_like(before, 0.03), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({}, {"front_norm": "layer"}, "front_norm is layer"),
        ({}, {"conv_channels": (6, 7, 5, 6, 7, 6, 16), "projection": False}, "no projection"),
        ({"units": ["heads"]}, {"shares_attention": (False, True, False), "heads": (2, 2, 2)}, "shares_attention"),
        ({"units": ["heads"], "sparsity": 0.9}, {}, "prune.sparsity 0.9 is out of reach"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_training(changes, shape, message):
    with pytest.raises(SettingsError, match=message):
        check_prunable(changed(HUBERT_LIKE, **shape), params(**changes))


def test_what_can_be_pruned_is_not_refused():
    for shape in SHAPES.values():
        check_prunable(shape, params())
    check_prunable(changed(HUBERT_LIKE, front_norm="layer"), params(units=["heads", "ffn"], sparsity=0.3))


@pytest.mark.parametrize(
    ("field", "value"), [("sparsity", 1.0), ("units", []), ("units", ["layers"]), ("rounding", "up")]
)
def test_settings_that_mean_nothing_are_refused(field, value):
    with pytest.raises(ValidationError, match=field):
        params(**{field: value})


def test_every_setting_has_to_be_written():
    for field in PRUNE:
        with pytest.raises(ValidationError, match=field):
            PruneParams.model_validate({key: value for key, value in PRUNE.items() if key != field})


@pytest.mark.parametrize("name", ["HuBERT", "WavLM"])
def test_training_reaches_the_sparsity_counted_on_the_encoder_that_is_built(name):
    """In 400 steps, at rates above the paper's: E[s] is led to the target, and rounding to the size does the rest."""
    shape, prune = SHAPES[name], params(rounding="size", warmup_steps=200, gate_lr=0.1, lambda_lr=0.3)
    generator = torch.Generator().manual_seed(0)
    encoder = Encoder(shape)
    initialise(encoder, generator)
    gates, control = Gates(shape, prune.units, prune.drop, generator), SparsityControl(prune)
    waves, samples = speech([800, 1200])
    with torch.no_grad():
        target = torch.randn(encoder(waves, samples).hidden[-1].shape, generator=generator)
    weights = {"params": [p for p in encoder.parameters() if p.requires_grad], "peak": 2e-3, "weight_decay": 0.0}
    optimizer = torch.optim.AdamW([weights, *control.groups(gates)], lr=0.0)
    first = None
    for step in range(1, 401):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * min(step / 40, (401 - step) / 360)
        states = encoder(waves, samples, gates=gates.sample(generator))
        loss = nn.functional.l1_loss(states.hidden[-1], target)
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        (loss + control.regulariser(expected_sparsity(shape, gates), step)).backward()
        optimizer.step()
    full = full_parameters(shape)
    assert loss.item() < first  # the weights have learned beside it
    expected = 1 - expected_parameters(shape, gates).item() / full
    assert expected == pytest.approx(prune.sparsity, abs=0.02)
    smaller = compact(encoder, control.close(shape, gates))
    assert 1 - count_parameters(smaller) / full == pytest.approx(prune.sparsity, abs=0.005)
    rounded = compact(encoder, gates.closed())  # each layer for itself: a head of this encoder is 2 % of it
    assert 1 - count_parameters(rounded) / full == pytest.approx(prune.sparsity, abs=0.04)
