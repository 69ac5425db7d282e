import pytest
import torch

from cache.errors import SettingsError
from pipeline.padding import frame_mask, frames_of_samples
from pipeline.student.checkpoint import load_student, save_student
from pipeline.student.compact import compact
from pipeline.student.encoder import Encoder, GateValues, count_parameters, initialise
from pipeline.student.gates import UNITS, DropRates, Gates
from tests.prune_fixtures import HUBERT_LIKE, SHAPES, THIN, WAVLM_LIKE, changed, speech

DROP = DropRates(conv=0.2, heads=0.3, ffn=0.5)
VARIANTS = {
    **SHAPES,
    "no feature norm": changed(HUBERT_LIKE, feature_norm=False),
    "biases in front": changed(WAVLM_LIKE, conv_bias=True),
    "thin": THIN,
}


def make(shape, seed=0, units=UNITS):
    """An encoder whose every weight counts, and the gates of a training that has come to an end."""
    generator = torch.Generator().manual_seed(seed)
    encoder = Encoder(shape)
    initialise(encoder, generator)
    with torch.no_grad():
        for parameter in encoder.parameters():  # biases and norms too: what is 0 or 1 hides a wrong row
            parameter.add_(
                0.3 * parameter.std().nan_to_num(1.0).clamp(min=0.3) * torch.randn(parameter.shape, generator=generator)
            )
    gates = Gates(shape, units, DROP, generator)
    torch.nn.init.normal_(gates.log_alpha, 0.0, 2.0, generator=generator)
    return encoder.eval(), gates.closed()


def assert_same(encoder, values, smaller):
    waves, samples = speech([2900, 4000, 1333])
    mask = frame_mask(frames_of_samples(samples), int(frames_of_samples(samples).max()))
    with torch.no_grad():
        masked, removed = encoder(waves, samples, gates=values), smaller(waves, samples)
    assert len(masked.hidden) == len(removed.hidden) == encoder.shape.num_blocks + 1
    for before, after in zip((masked.projection, *masked.hidden), (removed.projection, *removed.hidden), strict=True):
        assert before[mask].std() > 0.01
        torch.testing.assert_close(after[mask], before[mask], rtol=0, atol=1e-5)
    torch.testing.assert_close(smaller.read_out(removed)[mask], encoder.read_out(masked)[mask], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_removing_units_equals_masking_them(name, seed):
    encoder, values = make(VARIANTS[name], seed)
    smaller = compact(encoder, values)
    assert count_parameters(smaller) < 0.9 * count_parameters(encoder)
    assert smaller.shape.conv_channels == tuple(int((part != 0).sum()) for part in values.conv)
    assert smaller.shape.heads == tuple(int((part != 0).sum()) for part in values.heads)
    assert smaller.shape.ffn == tuple(int((part != 0).sum()) for part in values.ffn)
    assert_same(encoder, values, smaller)


@pytest.mark.parametrize("name", SHAPES)
def test_a_block_may_lose_all_heads_or_all_units(name):
    encoder, values = make(SHAPES[name])
    for part in (values.heads[0], values.heads[2], values.ffn[1], values.ffn[2]):
        part.zero_()
    smaller = compact(encoder, values)
    assert smaller.shape.heads[0] == smaller.shape.ffn[1] == smaller.shape.heads[2] == smaller.shape.ffn[2] == 0
    assert_same(encoder, values, smaller)


@pytest.mark.parametrize("unit", UNITS)
def test_each_kind_can_be_removed_alone(unit):
    encoder, values = make(WAVLM_LIKE, units=(unit,))
    smaller = compact(encoder, values)
    changed = {"conv": "conv_channels", "heads": "heads", "ffn": "ffn"}
    assert {kind for kind, field in changed.items() if getattr(smaller.shape, field) != getattr(WAVLM_LIKE, field)} == {
        unit
    }
    assert_same(encoder, values, smaller)


def test_heads_and_units_can_go_where_channels_cannot():
    shape = changed(WAVLM_LIKE, front_norm="layer", conv_bias=True, pre_norm=True, normalise=True)
    encoder, values = make(shape, units=("heads", "ffn"))
    assert_same(encoder, values, compact(encoder, values))
    with pytest.raises(SettingsError, match="front_norm is layer"):
        compact(*make(shape))


@pytest.mark.parametrize("name", SHAPES)
def test_an_encoder_can_be_pruned_again(name):
    encoder, values = make(SHAPES[name])
    once = compact(encoder, values)
    gates = Gates(once.shape, UNITS, DROP, torch.Generator().manual_seed(9))
    torch.nn.init.normal_(gates.log_alpha, 0.5, 2.0, generator=torch.Generator().manual_seed(9))
    again = gates.closed()
    twice = compact(once, again)
    assert count_parameters(twice) < count_parameters(once)
    assert_same(once, again, twice)


def test_open_gates_change_nothing():
    encoder, values = make(WAVLM_LIKE)
    smaller = compact(encoder, GateValues(*([torch.ones_like(part) for part in kind] for kind in values)))
    assert smaller.shape == WAVLM_LIKE
    assert all(torch.equal(a, b) for a, b in zip(smaller.parameters(), encoder.parameters(), strict=True))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(smaller.parameters(), encoder.parameters(), strict=True))


def test_a_pruned_encoder_survives_the_disk_and_trains(tmp_path):
    encoder, values = make(WAVLM_LIKE)
    smaller = compact(encoder.train(), values)
    assert smaller.training
    save_student(tmp_path, smaller, {})
    loaded = load_student(tmp_path)
    assert loaded.shape == smaller.shape
    assert_same(encoder.eval(), values, loaded)
    waves, samples = speech([2000])
    smaller(waves, samples).hidden[-1].sum().backward()
    still = {name for name, parameter in smaller.named_parameters() if not parameter.requires_grad}
    assert still == {"feature_scale"}  # DPHuBERT's dummy weight does not learn either
    assert all(p.grad is not None for p in smaller.parameters() if p.requires_grad)


def test_a_convolution_without_channels_is_refused():
    encoder, values = make(HUBERT_LIKE)
    values.conv[2].zero_()
    with pytest.raises(SettingsError, match="convolution 2 without a channel"):
        compact(encoder, values)


def test_heads_that_share_attention_maps_are_not_removed():
    shape = changed(HUBERT_LIKE, shares_attention=(False, True, False), heads=(2, 2, 2))
    encoder, values = make(shape, units=("conv", "ffn"))
    assert_same(encoder, values, compact(encoder, values))
    with pytest.raises(SettingsError, match="shares_attention"):
        compact(*make(shape))
