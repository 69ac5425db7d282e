"""Masked prediction: the published loss, over the hidden frames, in any precision of the model."""

import numpy as np
import pytest
import torch

from pipeline.teachers.pretrain.batches import mask_spans
from pipeline.teachers.pretrain.masked_units import MaskedPrediction
from pipeline.teachers.pretrain.models import new_model
from tests.pretrain_fixtures import objective, settings


def masked_prediction(family="hubert", **changes):
    params = settings(family=family, objective=objective(**changes))
    return MaskedPrediction(new_model(params), params.objective, clusters=8).eval()


@pytest.mark.parametrize("family", ["hubert", "wavlm"])
def test_the_loss_is_the_published_formula_over_the_hidden_frames_alone(family):
    torch.manual_seed(0)
    task = masked_prediction(family)
    waves, units = torch.randn(3, 16_000) * 0.1, torch.randint(0, 8, (3, 49))
    hidden = torch.from_numpy(mask_spans(3, 49, 0.8, 10, np.random.default_rng(0)))
    with torch.no_grad():
        found = task(waves, hidden, units)
        other = task(waves, hidden, torch.where(hidden, units, 7 - units))
        states = task.model(waves, mask_time_indices=hidden).last_hidden_state
    assert found.loss == other.loss
    o = (
        states.double().numpy() @ task.projection.weight.detach().double().numpy().T
        + task.projection.bias.detach().double().numpy()
    )
    e = task.codewords.detach().double().numpy()
    cosine = (o / np.linalg.norm(o, axis=2, keepdims=True)) @ (e / np.linalg.norm(e, axis=1, keepdims=True)).T
    p = np.exp(cosine / 0.1) / np.exp(cosine / 0.1).sum(2, keepdims=True)
    picked = np.take_along_axis(p, units.numpy()[..., None], 2)[..., 0][hidden.numpy()]
    assert found.loss.item() == pytest.approx(-np.log(picked).mean(), abs=1e-5)


def test_frames_that_were_not_hidden_count_when_asked():
    torch.manual_seed(0)
    plain = masked_prediction()
    waves, units = torch.randn(2, 16_000) * 0.1, torch.randint(0, 8, (2, 49))
    hidden = torch.zeros(2, 49, dtype=torch.bool)
    hidden[:, 5:20] = True
    with torch.no_grad():
        masked = plain(waves, hidden, units).loss
        plain.params = plain.params.model_copy(update={"unmasked_weight": 0.5})
        both = plain(waves, hidden, units).loss
        states = plain.model(waves, mask_time_indices=hidden).last_hidden_state
        seen = torch.nn.functional.cross_entropy(plain.score(states[~hidden]), units[~hidden])
    torch.testing.assert_close(both, masked + 0.5 * seen)


def test_a_batch_of_which_everything_is_hidden_has_a_loss():
    task = masked_prediction(unmasked_weight=1.0)
    found = task(torch.randn(2, 3_200), torch.ones(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.int64))
    assert found.loss.isfinite()


def test_what_is_hidden_is_not_seen_and_what_is_not_hidden_is():
    """With every frame hidden the transformer has nothing to hear."""
    torch.manual_seed(0)
    for family in ("hubert", "wavlm"):
        task = masked_prediction(family)
        one, other = torch.randn(2, 1, 16_000)
        units = torch.zeros(1, 49, dtype=torch.int64)
        nothing, everything = torch.ones(1, 49, dtype=torch.bool), torch.zeros(1, 49, dtype=torch.bool)
        everything[0, 0] = True
        with torch.no_grad():
            assert task(one, nothing, units).loss == task(other, nothing, units).loss
            assert task(one, everything, units).loss != task(other, everything, units).loss


def test_a_model_in_bfloat16_has_a_loss_in_float32_close_to_that_of_float32():
    torch.manual_seed(0)
    task = masked_prediction()
    waves, units = torch.randn(4, 16_000) * 0.1, torch.randint(0, 8, (4, 49))
    hidden = torch.from_numpy(mask_spans(4, 49, 0.8, 10, np.random.default_rng(0)))
    whole = task(waves, hidden, units).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = task(waves, hidden, units).loss
    assert half.dtype == torch.float32
    assert half.item() != whole.item()
    assert half.item() == pytest.approx(whole.item(), rel=0.02)


def test_wavlm_has_gated_relative_positions_that_learn():
    torch.manual_seed(0)
    task = masked_prediction("wavlm")
    hidden = torch.zeros(2, 49, dtype=torch.bool)
    hidden[:, 5:20] = True
    task(torch.randn(2, 16_000), hidden, torch.randint(0, 8, (2, 49))).loss.backward()
    gated = {name: p.grad for name, p in task.named_parameters() if "rel_attn_embed" in name or "gru_rel_pos" in name}
    assert {name.rpartition("attention.")[2] for name in gated} >= {"gru_rel_pos_const", "rel_attn_embed.weight"}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gated.values())
