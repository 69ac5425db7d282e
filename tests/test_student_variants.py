"""What shapes, gates and hidden features may change: nothing in any batch, and what is said to be as good as pruned is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.padding import LengthMaskedGroupNorm
from pipeline.student.attention import Context
from pipeline.student.checkpoint import load_student, save_student
from pipeline.student.encoder import Encoder, GateValues, Hidden
from pipeline.student.front import CountingNorm
from pipeline.student.shape import DropoutRates
from tests.student_fixtures import THIN, TINY, WAVLM, changed, noise, random_encoder

KEPT = ((0, 2), (), (2, 1, 0))
PRUNED = changed(WAVLM, heads=(2, 0, 3), kept_heads=KEPT, ffn=(17, 40, 0), feature_norm_width=20, feature_scale=True)
LARGE = {"front_norm": "layer", "pre_norm": True, "normalise": True, "conv_bias": True}
VARIANTS = {
    "base": TINY,
    "large": changed(TINY, **LARGE),
    "thin": THIN,
    "thin without a projection": changed(THIN, conv_channels=(6, 8, 8, 8, 8, 8, 24, 24, 24), projection=False),
    "wavlm": WAVLM,
    "wavlm large": changed(WAVLM, **LARGE),
    "pruned": PRUNED,
    "pruned large": changed(PRUNED, **LARGE),
    "shared": changed(TINY, shares_attention=(False, True, True)),
    "shared wavlm": changed(WAVLM, shares_attention=(False, False, True), head_width=5),
    "nothing left": changed(TINY, heads=(0, 0, 0), ffn=(0, 0, 0)),
}


def open_gates(encoder):
    shape = encoder.shape
    return GateValues(
        [torch.ones(count) for count in shape.conv_channels],
        [torch.ones(count) for count in shape.heads],
        [torch.ones(count) for count in shape.ffn],
    )


def assert_same_states(got, expected, atol=1e-5):
    torch.testing.assert_close(got.projection, expected.projection, rtol=0, atol=atol)
    for ours, theirs in zip(got.hidden, expected.hidden, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=5, deadline=None)
@given(lengths=st.lists(st.integers(400, 12_000), min_size=2, max_size=4))
def test_an_utterance_has_the_same_states_alone_and_in_a_padded_batch(variant, lengths):
    """In double precision, where nothing but a mistake is larger than 1e-12."""
    encoder = random_encoder(VARIANTS[variant]).double()
    waves, samples = noise(*lengths)
    waves = waves.double()
    past = torch.arange(waves.shape[1]) >= samples[:, None]
    with torch.no_grad():
        together = encoder(waves + 7.0 * past, samples)  # padding must not matter, whatever it is
        for row, length in enumerate(lengths):
            alone = encoder(waves[row : row + 1, :length], samples[row : row + 1])
            frames = (length - 400) // 320 + 1
            for one, many in zip(
                [alone.projection, *alone.hidden], [together.projection, *together.hidden], strict=True
            ):
                assert one.shape[1] == frames
                torch.testing.assert_close(many[row, :frames], one[0], rtol=0, atol=1e-12)
            assert not together.projection[row, frames:].any()


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_survives_the_disk(variant, tmp_path):
    encoder = random_encoder(VARIANTS[variant])
    save_student(tmp_path, encoder, {})
    loaded = load_student(tmp_path)
    waves, samples = noise(4_000, 2_500)
    with torch.no_grad():
        assert_same_states(loaded(waves, samples), encoder(waves, samples), atol=0.0)
    encoder.read_out(encoder(waves, samples)).square().sum().backward()
    still = {name for name, parameter in encoder.named_parameters() if parameter.grad is None}
    # nothing reads the norm before a sublayer without heads or units
    unread = {f"blocks.{block}_norm.{part}" for block in ("1.attention", "2.ffn") for part in ("weight", "bias")}
    assert still == ({"feature_scale"} if "pruned" in variant else set()) | (
        unread if variant == "pruned large" else set()
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_open_gates_and_an_empty_mask_change_nothing(variant):
    encoder = random_encoder(VARIANTS[variant])
    waves, samples = noise(8_000, 5_000)
    with torch.no_grad():
        plain = encoder(waves, samples)
        frames, width = plain.projection.shape[1:]
        hide = Hidden(torch.zeros(2, frames, dtype=torch.bool), torch.zeros(2, width, dtype=torch.bool))
        assert_same_states(encoder(waves, samples, open_gates(encoder), hide), plain, atol=0.0)


@pytest.mark.parametrize("variant", ["wavlm", "shared wavlm", "pruned"])
def test_bfloat16_autocast_stays_near_float32(variant):
    encoder = random_encoder(VARIANTS[variant])
    waves, samples = noise(9_000, 16_000)
    gates = open_gates(encoder)
    with torch.no_grad():
        exact = encoder(waves, samples).hidden[-1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = encoder(waves, samples, gates).hidden[-1]
    assert float((rough[0, :27] - exact[0, :27]).norm() / exact[0, :27].norm()) < 0.05


def test_gates_multiply_channels_heads_and_units():
    """The same numbers from weights that were multiplied instead."""
    encoder, other = (
        random_encoder(changed(WAVLM, feature_norm=False)),
        random_encoder(changed(WAVLM, feature_norm=False)),
    )
    generator = torch.Generator().manual_seed(0)
    gates = GateValues(
        *([torch.rand(part.shape, generator=generator) for part in kind] for kind in open_gates(encoder))
    )
    with torch.no_grad():
        for layer, gate in zip(other.front[1:], gates.conv, strict=False):
            layer.conv.weight *= gate[:, None]
        other.projection.weight *= gates.conv[-1]
        for block, heads, ffn in zip(other.blocks, gates.heads, gates.ffn, strict=True):
            block.attention.out.weight *= heads.repeat_interleave(8)
            block.ffn_down.weight *= ffn
        waves, samples = noise(8_000, 5_000)
        assert_same_states(encoder(waves, samples, gates), other(waves, samples))


def test_a_head_that_is_closed_is_as_good_as_one_that_is_not_there():
    encoder = random_encoder(WAVLM)
    kept = ((0, 2), (), (1,))
    smaller = Encoder(changed(WAVLM, heads=(2, 0, 1), kept_heads=kept)).eval()
    weights, gates = encoder.state_dict(), open_gates(encoder)
    for number, heads in enumerate(kept):
        prefix = f"blocks.{number}.attention."
        rows = [8 * head + i for head in heads for i in range(8)]
        for part in ("query", "key", "value"):
            for kind in ("weight", "bias"):
                weights[f"{prefix}{part}.{kind}"] = weights[f"{prefix}{part}.{kind}"][rows]
        weights[f"{prefix}out.weight"] = weights[f"{prefix}out.weight"][:, rows]
        weights[f"{prefix}gate_scale"] = weights[f"{prefix}gate_scale"][list(heads)]
        gates.heads[number][[head for head in range(3) if head not in heads]] = 0.0
    smaller.load_state_dict({name: weights[name] for name in smaller.state_dict()})
    waves, samples = noise(8_000, 5_000)
    with torch.no_grad():
        assert_same_states(smaller(waves, samples), encoder(waves, samples, gates))


def test_a_closed_channel_before_the_feature_norm_is_as_good_as_one_that_is_not_there():
    encoder = random_encoder(TINY)
    gates = open_gates(encoder)
    gates.conv[-1][[1, 5, 11]] = 0.0
    gates.conv[-1][3] = 0.25
    kept = gates.conv[-1].nonzero()[:, 0]
    channels = (*TINY.conv_channels[:-1], 9)
    smaller = Encoder(changed(TINY, conv_channels=channels, feature_norm_width=12, feature_scale=True)).eval()
    weights = encoder.state_dict() | {"feature_scale": gates.conv[-1][kept]}
    for name in ("front.6.conv.weight", "feature_norm.weight", "feature_norm.bias"):
        weights[name] = weights[name][kept]
    weights["projection.weight"] = weights["projection.weight"][:, kept]
    smaller.load_state_dict(weights)
    waves, samples = noise(8_000, 5_000)
    with torch.no_grad():
        assert_same_states(smaller(waves, samples), encoder(waves, samples, gates))


def test_a_norm_that_counts_missing_channels_is_the_norm_over_zeros():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, generator=generator)
    whole, counting = torch.nn.LayerNorm(8), CountingNorm(5, 8)
    with torch.no_grad():
        whole.weight.copy_(torch.randn(8, generator=generator))
        whole.bias.copy_(torch.randn(8, generator=generator))
        counting.weight.copy_(whole.weight[:5])
        counting.bias.copy_(whole.bias[:5])
    expected = whole(torch.cat([x, torch.zeros(2, 3, 3)], dim=2))[..., :5]
    torch.testing.assert_close(counting(x), expected, rtol=0, atol=1e-6)


def test_what_is_hidden_is_zero_before_positions_are_added_and_the_projection_shows_it_all():
    encoder = random_encoder(TINY)
    waves, samples = noise(8_000, 5_000)
    frames, channels = torch.zeros(2, 24, dtype=torch.bool), torch.zeros(2, 24, dtype=torch.bool)
    frames[0, 3:7] = True
    channels[1, 10:13] = True
    seen = []
    encoder.position.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        plain = encoder(waves, samples)
        hidden = encoder(waves, samples, hide=Hidden(frames, channels))
    expected = plain.projection.clone()
    expected[0, 3:7], expected[1, :, 10:13] = 0.0, 0.0
    assert torch.equal(seen[1], expected)
    assert torch.equal(hidden.projection, plain.projection)
    assert not torch.equal(hidden.hidden[3], plain.hidden[3])


def test_a_shared_map_is_that_of_the_block_before():
    """As if the block had that block's queries and keys and attended from that block's input."""
    encoder = random_encoder(changed(TINY, shares_attention=(False, True, False)))
    waves, samples = noise(8_000, 5_000)
    own = encoder.blocks[0].attention
    inputs = {}
    for number in (0, 1):
        encoder.blocks[number].attention.register_forward_pre_hook(lambda _, got, n=number: inputs.update({n: got}))
    with torch.no_grad():
        states = encoder(waves, samples).hidden
        x, context, _ = inputs[0]
        query, key = (part(x).unflatten(2, (3, 8)).transpose(1, 2) for part in (own.query, own.key))
        shared = encoder.blocks[1].attention
        value = shared.value(inputs[1][0]).unflatten(2, (3, 8)).transpose(1, 2)
        heard = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=context.keys)
        block = encoder.blocks[1]
        y = block.attention_norm(states[1] + shared.out(heard.transpose(1, 2).flatten(2)))
        y = block.ffn_norm(y + block.ffn_down(torch.nn.functional.gelu(block.ffn_up(y))))
        torch.testing.assert_close(states[2], y, rtol=0, atol=1e-5)
    assert not any("query" in name or "key" in name for name, _ in shared.named_parameters())


def test_a_block_whose_map_is_shared_computes_what_it_did():
    encoder = random_encoder(TINY)
    sharing = Encoder(changed(TINY, shares_attention=(False, False, True))).eval()
    sharing.load_state_dict({name: encoder.state_dict()[name] for name in sharing.state_dict()})
    waves, samples = noise(8_000, 5_000)
    with torch.no_grad():
        expected, got = encoder(waves, samples).hidden, sharing(waves, samples).hidden
    for ours, theirs in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(got[3], expected[3], atol=1e-3)


def test_attention_drops_out_where_a_map_is_made_not_where_it_is_shared():
    rates = DropoutRates(features=0.0, hidden=0.0, attention=0.5, activation=0.0)
    encoder = random_encoder(changed(TINY, shares_attention=(False, True, False), dropout=rates)).train()
    x, keys = torch.randn(1, 24, 24, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1, 1, 24).bool()
    maker, sharer = (encoder.blocks[number].attention for number in (0, 1))
    (one, weights), (other, same) = (maker(x, Context(keys, None, None), None) for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(weights, same)
    torch.testing.assert_close(weights.sum(3), torch.ones(1, 3, 24))
    first, second = (sharer(x, Context(keys, None, weights), None)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_valid_positions_may_be_handed_over_or_set():
    norm = LengthMaskedGroupNorm(6)
    x, counts = torch.randn(3, 6, 50, generator=torch.Generator().manual_seed(0)), torch.tensor([50, 20, 31])
    handed = norm(x, counts)
    norm.valid = counts
    assert torch.equal(norm(x), handed)
    assert math.isclose(float(handed[1, 0, :20].detach().mean()), 0.0, abs_tol=1e-6)
