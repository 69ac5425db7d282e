import math

import pytest
import scipy.integrate
import torch

from pipeline.student.gates import OPEN, UNITS, DropRates, Gates, sizes_of
from tests.prune_fixtures import HUBERT_LIKE, changed

DROP = DropRates(conv=0.01, heads=0.01, ffn=0.5)
DRAWS = 200_000


def make_gates(units=UNITS, seed=0, shape=HUBERT_LIKE, drop=DROP):
    return Gates(shape, units, drop, torch.Generator().manual_seed(seed))


def with_log_alpha(value, draws=DRAWS):
    shape = changed(HUBERT_LIKE, heads=(2,), ffn=(draws,))
    gates = make_gates(("ffn",), shape=shape)
    torch.nn.init.constant_(gates.log_alpha, value)
    return gates


def tail(x, log_alpha):
    """P(z > x) for 0 <= x < 1, from the distribution function of the logistic noise."""
    s = (x + 0.1) / 1.2  # undo the stretch to (-0.1, 1.1)
    logit = math.log(s) - math.log(1 - s)
    return 1 / (1 + math.exp(-(log_alpha - 2 / 3 * logit)))


@pytest.mark.parametrize("log_alpha", [-3.0, -1.0, 0.0, 1.5, 4.6])
def test_draws_have_the_probabilities_and_the_mean_of_a_hard_concrete_variable(log_alpha):
    gates = with_log_alpha(log_alpha)
    z = gates.sample(torch.Generator().manual_seed(1)).ffn[0].detach().double()

    def within(share, expected):  # five standard errors of a share
        return abs(share - expected) < 5 * math.sqrt(max(expected * (1 - expected), 1e-6) / DRAWS)

    assert within((z > 0).double().mean().item(), tail(0.0, log_alpha))
    assert within((z == 1).double().mean().item(), tail(1 - 1e-12, log_alpha))
    assert within((z > 0.3).double().mean().item(), tail(0.3, log_alpha))
    mean, _ = scipy.integrate.quad(tail, 0, 1, args=(log_alpha,))  # of a variable in [0, 1]
    assert abs(z.mean().item() - mean) < 5 * z.std().item() / math.sqrt(DRAWS)
    assert gates.keep()[0].item() == pytest.approx(tail(0.0, log_alpha), abs=1e-6)


def test_the_paper_s_drop_rates_keep_what_is_worked_out_by_hand():
    # -2/3 ln(0.1 / 1.1); sigmoid(1.5986); sigmoid(ln 99 + 1.5986)
    assert pytest.approx(1.5986, abs=1e-4) == OPEN
    gates = make_gates()
    counts = gates.counts(gates.keep())
    assert counts.ffn.sum().item() / sum(HUBERT_LIKE.ffn) == pytest.approx(0.832, abs=2e-3)
    assert counts.heads.sum().item() / sum(HUBERT_LIKE.heads) == pytest.approx(0.998, abs=1e-3)
    assert counts.conv.sum().item() / sum(HUBERT_LIKE.conv_channels) == pytest.approx(0.998, abs=1e-3)


def test_gates_start_around_the_log_odds_of_the_drop_rate():
    shape = changed(HUBERT_LIKE, heads=(2,), ffn=(50_000,))
    drop = DropRates(conv=0.2, heads=0.01, ffn=0.1)
    gates = make_gates(("ffn", "conv"), shape=shape, drop=drop)
    own = gates.log_alpha.detach()
    conv, ffn = own[: sum(shape.conv_channels)], own[sum(shape.conv_channels) :]
    assert conv.mean().item() == pytest.approx(math.log(4), abs=0.01)
    assert ffn.mean().item() == pytest.approx(math.log(9), abs=1e-3)
    assert ffn.std().item() == pytest.approx(0.01, rel=0.02)
    assert torch.equal(own, make_gates(("conv", "ffn"), shape=shape, drop=drop).log_alpha)
    assert not torch.equal(own, make_gates(("conv", "ffn"), 1, shape, drop).log_alpha)


def test_kinds_without_gates_are_always_on():
    gates = make_gates(("heads",))
    torch.nn.init.constant_(gates.log_alpha, -50.0)
    for values in (gates.sample(), gates.closed()):
        for kind in UNITS:
            parts = getattr(values, kind)
            assert tuple(len(part) for part in parts) == sizes_of(HUBERT_LIKE, kind)
            assert all(bool((part == (0 if kind == "heads" else 1)).all()) for part in parts)


def test_draws_come_from_the_given_generator_or_from_the_global_one():
    gates = make_gates()
    torch.manual_seed(3)
    first = gates.sample().ffn[1]
    torch.manual_seed(3)
    assert torch.equal(first, gates.sample().ffn[1])
    assert not torch.equal(first, gates.sample().ffn[1])
    torch.manual_seed(3)
    torch.rand(7)
    state = torch.get_rng_state()
    explicit = gates.sample(torch.Generator().manual_seed(3)).ffn[1]
    assert torch.equal(first, explicit)  # the same algorithm from the same seed
    assert torch.equal(state, torch.get_rng_state())


def test_a_draw_has_a_gradient_where_the_gate_is_half_open():
    gates = with_log_alpha(0.0, draws=1000)
    z = gates.sample(torch.Generator().manual_seed(0)).ffn[0]
    z.sum().backward()
    half_open = (z > 0) & (z < 1)
    assert torch.equal(gates.log_alpha.grad != 0, half_open)
    assert 100 < half_open.sum() < 900


@pytest.mark.parametrize("seed", range(3))
def test_closed_gates_drop_the_expected_number_of_the_least_likely_units_of_each_layer(seed):
    gates = make_gates()
    torch.nn.init.normal_(gates.log_alpha, -1.0, 2.0, generator=torch.Generator().manual_seed(seed))
    alphas = gates.values(gates.log_alpha)
    closed = gates.closed()
    for kind in UNITS:
        for alpha, z in zip(getattr(alphas, kind), getattr(closed, kind), strict=True):
            expected = sum(tail(0.0, a) for a in alpha.tolist())
            zeros = round(len(alpha) - expected)
            zeros = min(zeros, len(alpha) - 1) if kind == "conv" else zeros
            assert int((z == 0).sum()) == zeros
            kept = sorted(alpha.tolist())[zeros:]
            soft = [1 / (1 + math.exp(-0.8 * a * 3 / 2)) for a in kept]
            assert sorted(z[z > 0].tolist()) == pytest.approx(soft, abs=1e-6)


def test_a_convolution_keeps_its_likeliest_channel():
    gates = make_gates(("conv", "heads"))
    torch.nn.init.constant_(gates.log_alpha, -30.0)
    with torch.no_grad():
        gates.log_alpha[3] = -29.0
    closed = gates.closed()
    assert closed.conv[0].nonzero().tolist() == [[3]]
    assert all(int((part != 0).sum()) == 1 for part in closed.conv)
    assert not any(bool(part.any()) for part in closed.heads)


def test_gates_follow_their_state_dict():
    gates, other = make_gates(seed=0), make_gates(seed=1)
    other.load_state_dict(gates.state_dict())
    one, two = (g.sample(torch.Generator().manual_seed(0)).heads[0] for g in (gates, other))
    assert torch.equal(one, two)
