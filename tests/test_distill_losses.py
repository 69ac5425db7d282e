import numpy as np
import pytest
import torch

from pipeline.distill.heads import PredictionHeads, initialise_heads
from pipeline.distill.losses import LossWeights, distillation_sums
from pipeline.distill.schedule import make_optimizer, rate_at, set_rates
from pipeline.student.encoder import count_parameters

COUNTS = [7, 3, 5]
DISTILHUBERT = LossWeights(1.0, 0.0, 1.0, "log_sigmoid")


def drawn(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    predicted, targets = torch.randn(2, 3, 2, 7, 6, generator=generator, dtype=torch.float64).to(dtype)
    mask = torch.arange(7)[None] < torch.tensor(COUNTS)[:, None]
    return predicted, targets, mask


def by_the_formula(predicted, targets):
    """|p - h|, (p - h)^2, -log sigmoid cos and -cos, frame by frame, head by head, in float64."""
    l1, l2, log_sigmoid, raw = [], [], [], []
    for b, count in enumerate(COUNTS):
        for n in range(predicted.shape[1]):
            for t in range(count):
                p, h = predicted[b, n, t].double().numpy(), targets[b, n, t].double().numpy()
                cosine = p @ h / np.sqrt((p @ p) * (h @ h))
                l1 += list(np.abs(p - h))
                l2 += list((p - h) ** 2)
                log_sigmoid.append(np.log1p(np.exp(-cosine)))
                raw.append(-cosine)
    return {"l1": np.mean(l1), "l2": np.mean(l2), "log_sigmoid": np.mean(log_sigmoid), "raw": np.mean(raw)}


def means(predicted, targets, mask, weights):
    """Over targets and frames, as the published loss has them."""
    sums = distillation_sums(predicted, targets, mask, weights)
    return {name: term.sum() / (predicted.shape[1] * sum(COUNTS)) for name, term in sums.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", ["log_sigmoid", "raw"])
@pytest.mark.parametrize("l2_weight", [0.0, 0.25])
def test_the_loss_is_the_published_formula_over_valid_frames(dtype, form, l2_weight):
    predicted, targets, mask = drawn(dtype)
    want = by_the_formula(predicted, targets)
    terms = means(predicted, targets, mask, LossWeights(2.0, l2_weight, 0.5, form))
    assert all(term.dtype == dtype for term in terms.values())
    assert list(terms) == (["l1", "l2", "cosine", "total"] if l2_weight else ["l1", "cosine", "total"])
    expected = {"l1": want["l1"], "l2": want["l2"], "cosine": want[form]}
    expected["total"] = 2.0 * want["l1"] + l2_weight * want["l2"] + 0.5 * want[form]
    for name, term in terms.items():
        assert float(term) == pytest.approx(expected[name], abs=1e-6)


def test_every_target_has_its_own_loss():
    predicted, targets, mask = drawn()
    sums = distillation_sums(predicted, targets, mask, LossWeights(1.0, 0.5, 1.0, "raw"))
    for n in range(2):
        want = by_the_formula(predicted[:, n : n + 1], targets[:, n : n + 1])
        expected = want["l1"] + 0.5 * want["l2"] + want["raw"]
        assert float(sums["total"][n]) == pytest.approx(expected * sum(COUNTS), rel=1e-6)


@pytest.mark.parametrize("weights", [DISTILHUBERT, LossWeights(1.0, 1.0, 1.0, "raw")])
def test_nan_in_the_padding_changes_neither_the_loss_nor_its_gradient(weights):
    results = []
    for fill in (0.0, float("nan")):
        predicted, targets, mask = drawn()
        predicted[~mask[:, None].expand(-1, 2, -1)] = fill
        targets[~mask[:, None].expand(-1, 2, -1)] = fill
        predicted.requires_grad_()
        total = distillation_sums(predicted, targets, mask, weights)["total"].sum()
        total.backward()
        results.append((total.detach(), predicted.grad))
    assert torch.isfinite(results[1][0])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)
    assert not results[1][1][~mask[:, None].expand(-1, 2, -1)].any()


def test_half_precision_targets_are_compared_in_float32():
    predicted, targets, mask = drawn()
    stored = targets.half()
    terms = means(predicted, stored, mask, DISTILHUBERT)
    assert terms["total"].dtype == torch.float32
    want = by_the_formula(predicted, stored.float())
    assert float(terms["l1"]) == pytest.approx(want["l1"], abs=1e-6)


def test_heads_are_a_wide_linear_and_a_block_diagonal_one():
    heads = PredictionHeads(width=5, heads=3, out_width=4)
    initialise_heads(heads, torch.Generator().manual_seed(0))
    x = torch.randn(2, 6, 5)
    blocks = torch.block_diag(*heads.split.weight)  # (N D, N E)
    wide = torch.nn.functional.gelu(heads.expand(x)) @ blocks + heads.split.bias.flatten()
    expected = torch.stack(wide.chunk(3, dim=2), dim=1)
    torch.testing.assert_close(heads(x), expected)
    bound = 5**-0.5
    assert all(-bound <= p.min() < p.max() <= bound for p in heads.parameters())


@pytest.mark.parametrize(("layers", "published"), [(2, 2_362_368), (3, 3_543_552)])
def test_heads_have_the_published_number_of_parameters(layers, published):
    with torch.device("meta"):
        assert count_parameters(PredictionHeads(768, layers, 768)) == published


def test_the_rate_rises_to_its_peak_and_falls_in_straight_lines():
    rates = [rate_at(k, steps=100, peak=2e-4, warmup=0.07) for k in range(1, 101)]
    assert max(rates) == rates[6] == 2e-4
    np.testing.assert_allclose(np.diff(rates[:7]), 2e-4 / 7)
    np.testing.assert_allclose(np.diff(rates[6:]), -2e-4 / 94, rtol=1e-9)
    assert min(rates) > 0
    assert rate_at(1, steps=1, peak=1.0, warmup=0.07) == 1.0


def test_every_parameter_is_in_one_group_and_only_matrices_decay():
    heads = PredictionHeads(4, 2, 3)
    norm = torch.nn.LayerNorm(4)
    optimizer = make_optimizer([heads, norm], learning_rate=0.1, weight_decay=0.01)
    decayed, free = (group["params"] for group in optimizer.param_groups)
    assert {id(p) for p in decayed} == {id(heads.expand.weight), id(heads.split.weight)}
    assert len(free) == 4
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.01, 0.0]


def test_groups_have_peaks_of_their_own_and_rise_together():
    extra = {"params": [torch.nn.Parameter(torch.zeros(3))], "peak": 0.02, "maximize": True}
    optimizer = make_optimizer([torch.nn.LayerNorm(4)], learning_rate=2e-4, weight_decay=0.0, more=[extra])
    assert set_rates(optimizer, step=5, steps=100, warmup=0.1) == pytest.approx(1e-4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-4, 0.01])
