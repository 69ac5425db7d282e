import numpy as np
import pytest
import scipy.optimize
import torch

from pipeline.student.compact import compact
from pipeline.student.encoder import Encoder, count_parameters
from pipeline.student.gates import UNITS, DropRates, Gates
from pipeline.student.size import (
    expected_parameters,
    expected_sparsity,
    fit,
    full_parameters,
    parameters,
    smallest_parameters,
)
from tests.prune_fixtures import BASE, HUBERT_LIKE, SHAPES, THIN, WAVLM_LIKE, changed

DROP = DropRates(conv=0.2, heads=0.3, ffn=0.5)


def random_gates(shape, seed=0, units=UNITS, mean=0.0, std=2.0):
    gates = Gates(shape, units, DROP, torch.Generator().manual_seed(seed))
    torch.nn.init.normal_(gates.log_alpha, mean, std, generator=torch.Generator().manual_seed(seed))
    return gates


def built(shape):
    with torch.device("meta"):
        return Encoder(shape)


VARIANTS = {
    **SHAPES,
    "large": changed(HUBERT_LIKE, front_norm="layer", conv_bias=True, pre_norm=True),
    "no feature norm": changed(HUBERT_LIKE, feature_norm=False),
    "no projection": changed(HUBERT_LIKE, conv_channels=(6, 7, 5, 6, 7, 6, 16), projection=False),
    "scaled": changed(HUBERT_LIKE, feature_scale=True, feature_norm_width=20),
    "nothing in a block": changed(HUBERT_LIKE, heads=(0, 3, 2), ffn=(12, 0, 14)),
    "shared attention": changed(WAVLM_LIKE, shares_attention=(False, True, False)),
    "shared attention, no bias": changed(HUBERT_LIKE, shares_attention=(False, True, False), heads=(2, 2, 2)),
    "thin": THIN,
}


@pytest.mark.parametrize("name", VARIANTS)
def test_the_size_of_a_shape_is_that_of_the_encoder_built_from_it(name):
    assert full_parameters(VARIANTS[name]) == count_parameters(built(VARIANTS[name]))


def test_hubert_base_has_the_parameters_it_is_known_for():
    assert full_parameters(BASE) == 94_370_944
    # channels, heads and units are all that DPHuBERT prunes; norms, positions and output biases stay
    assert smallest_parameters(BASE, UNITS) == count_parameters(
        built(changed(BASE, conv_channels=(1,) * 7, heads=(0,) * 12, ffn=(0,) * 12, feature_scale=True))
    )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("seed", range(4))
def test_the_expected_size_of_decided_gates_is_the_counted_size_after_removal(name, seed):
    shape = SHAPES[name]
    gates = random_gates(shape, seed)
    with torch.no_grad():  # sigmoid(+-80) is 1 and 0, in float32 too
        gates.log_alpha.copy_(torch.where(gates.kept(), 80.0, -80.0))
    smaller = compact(Encoder(shape), gates.closed())
    assert round(expected_parameters(shape, gates).item(), 6) == count_parameters(smaller)


@pytest.mark.parametrize("name", SHAPES)
def test_a_block_without_heads_or_units_is_counted_without_what_goes_with_them(name):
    shape = SHAPES[name]
    gates = random_gates(shape, units=("heads", "ffn"))
    heads, ffn = sum(shape.heads), sum(shape.ffn)
    kept = torch.ones(heads + ffn, dtype=torch.bool)
    kept[: shape.heads[0]] = False  # all of the first block
    kept[-shape.ffn[-1] :] = False  # all of the last one
    with torch.no_grad():
        gates.log_alpha.copy_(torch.where(kept, 80.0, -80.0))
    smaller = compact(Encoder(shape), gates.closed())
    assert (smaller.shape.heads[0], smaller.shape.ffn[-1]) == (0, 0)
    assert round(expected_parameters(shape, gates).item(), 6) == count_parameters(smaller)


@pytest.mark.parametrize("name", ["HuBERT", "WavLM"])
def test_the_expected_size_is_the_mean_size_over_draws(name):
    shape = SHAPES[name]
    gates = random_gates(shape, std=1.0)
    generator = torch.Generator().manual_seed(1)
    draws = []
    for _ in range(3000):
        z = gates.sample(generator)
        flat = torch.cat([part.detach() for kind in z for part in kind])
        draws.append(parameters(shape, gates.counts((flat > 0).float()), True).item())
    error = np.std(draws) / np.sqrt(len(draws))
    assert expected_parameters(shape, gates).item() == pytest.approx(np.mean(draws), abs=5 * error)


def test_the_expected_size_is_dphubert_s_formula_but_for_its_dummy_weight_in_the_full_model():
    gates = random_gates(BASE, mean=0.5, std=1.0)
    keep = torch.sigmoid(gates.log_alpha.detach().double() + 2 / 3 * np.log(11))
    conv = keep[: 7 * 512].view(7, 512).sum(1).tolist()
    heads = keep[7 * 512 :][: 12 * 12].view(12, 12).sum(1).tolist()
    ffn = keep[7 * 512 + 12 * 12 :].view(12, 3072).sum(1).tolist()
    size, before = 0.0, 1.0
    for channels, kernel in zip(conv, (10, 3, 3, 3, 3, 2, 2), strict=True):
        size += before * channels * kernel
        before = channels
    size += 2 * conv[0] + before  # group norm; the dummy weight after the last convolution
    size += 2 * before + (before + 1) * 768
    size += 768 * 48 * 128 + 128 + 768 + 2 * 768  # positional convolution, norm
    for h, m in zip(heads, ffn, strict=True):
        size += 4 * 768 + 769 * 3 * 64 * h + (64 * h + 1) * 768 + (768 + 1) * m + (m + 1) * 768
    assert expected_parameters(BASE, gates).item() == pytest.approx(size, rel=1e-6)
    # theirs divides by a model that has the dummy weight too: 512 of 94 371 456
    assert expected_sparsity(BASE, gates).item() == pytest.approx(1 - size / 94_371_456, abs=6e-6)


def test_the_gradient_of_the_size_is_what_a_small_change_of_a_gate_does():
    gates = random_gates(WAVLM_LIKE).double()
    expected_parameters(WAVLM_LIKE, gates).backward()
    for place in (0, 40, len(gates.log_alpha) // 2, len(gates.log_alpha) - 1):
        sizes = []
        for change in (-1e-4, 1e-4):
            moved = random_gates(WAVLM_LIKE).double()
            with torch.no_grad():
                moved.log_alpha[place] += change
            sizes.append(expected_parameters(WAVLM_LIKE, moved).item())
        assert gates.log_alpha.grad[place].item() == pytest.approx((sizes[1] - sizes[0]) / 2e-4, rel=1e-5)


def counted(shape, gates, kept):
    """Parameters after removal, without building anything but the shape."""
    return count_parameters(compact(Encoder(shape), gates.closed(kept)))


@pytest.mark.parametrize("units", [UNITS, ("conv",), ("heads",), ("heads", "conv")])
@pytest.mark.parametrize("share", [0.35, 0.8])
def test_fitting_moves_all_gates_together_and_then_the_finest_units_one_by_one(units, share):
    gates = random_gates(HUBERT_LIKE, seed=5, units=units)
    size = round(share * full_parameters(HUBERT_LIKE))
    shifted = random_gates(HUBERT_LIKE, seed=5, units=units)

    def gap(shift):
        with torch.no_grad():
            shifted.log_alpha.copy_(gates.log_alpha + shift)
        return expected_parameters(HUBERT_LIKE, shifted).item() - size

    gap(scipy.optimize.brentq(gap, -30, 30) if gap(-30) < 0 else -30)
    rounded = shifted.kept()
    kept = rounded.clone()
    of_kind, protected, start = {kind: [] for kind in ("ffn", "conv", "heads")}, [], 0
    for kind in gates.units:
        for count in gates.sizes[kind]:
            own = range(start, start + count)
            of_kind[kind] += own
            protected += [max(own, key=lambda i: gates.log_alpha[i].item())] if kind == "conv" else []
            start += count
    shrinking = counted(HUBERT_LIKE, gates, kept) > size
    moves = []
    for places in of_kind.values():  # the finest kind first
        moves += sorted(
            (i for i in places if bool(kept[i]) == shrinking and i not in protected),
            key=lambda i: gates.log_alpha[i].item(),
            reverse=not shrinking,
        )
    gaps = [abs(counted(HUBERT_LIKE, gates, kept) - size)]
    for i in moves:
        kept[i] = not shrinking
        gaps.append(abs(counted(HUBERT_LIKE, gates, kept) - size))
    fitted = fit(HUBERT_LIKE, gates, size)
    assert abs(counted(HUBERT_LIKE, gates, fitted) - size) == min(gaps)
    assert int((fitted != rounded).sum()) == gaps.index(min(gaps))
