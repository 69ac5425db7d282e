import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from cache.errors import SettingsError, StoreError
from cache.publish import read_json, write_json
from pipeline.padding import normalise_waves
from pipeline.student.adopt import adopt, copy_adopted, read_shape
from pipeline.student.checkpoint import load_student, save_student
from pipeline.student.encoder import Encoder, count_parameters, initialise
from pipeline.student.shape import DropoutRates, EncoderShape
from pipeline.student.upstream import load_student_upstream
from tests.conftest import TINY_HUBERT

NO_DROPOUT = DropoutRates(features=0.0, hidden=0.0, attention=0.0, activation=0.0)
TINY = EncoderShape(
    conv_channels=(8, 8, 8, 8, 8, 8, 12),
    conv_spans=None,
    conv_bias=False,
    front_norm="group",
    feature_norm=True,
    feature_norm_width=None,
    feature_scale=False,
    normalise=False,
    width=24,
    heads=(3, 3, 3),
    head_width=8,
    ffn=(40, 40, 40),
    position_bias=None,
    kept_heads=None,
    shares_attention=None,
    position_kernel=16,
    position_groups=4,
    pre_norm=False,
    dropout=NO_DROPOUT,
)
BASE = TINY.model_copy(
    update={
        "conv_channels": (512,) * 7,
        "width": 768,
        "heads": (12,) * 12,
        "head_width": 64,
        "ffn": (3072,) * 12,
        "position_kernel": 128,
        "position_groups": 16,
    }
)
FRONTS = {
    "base": {"do_stable_layer_norm": False, "feat_extract_norm": "group", "conv_bias": False},
    "large": {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
    "odd kernel": {"do_stable_layer_norm": False, "feat_extract_norm": "group", "num_conv_pos_embeddings": 15},
}


def hf_model(family="hubert", **changes):
    import transformers

    config, model = {
        "hubert": (transformers.HubertConfig, transformers.HubertModel),
        "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
        "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
    }[family]
    torch.manual_seed(0)
    model = model(config(**{**TINY_HUBERT, **changes})).eval()
    for parameter in model.parameters():  # biases and norms too, so that a swapped pair shows
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def adopted_encoder(directory):
    encoder = Encoder(read_shape(directory))
    encoder.load_state_dict(adopt(directory))
    return encoder.eval()


def noise(*lengths):
    generator = torch.Generator().manual_seed(1)
    waves = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        waves[row, :length] = torch.randn(length, generator=generator) * 0.1
    return waves, torch.tensor(lengths)


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("family", ["hubert", "wav2vec2"])
def test_hidden_states_equal_those_of_transformers(tmp_path, family, front):
    model = hf_model(family, **FRONTS[front])
    model.save_pretrained(tmp_path)
    waves, samples = noise(8_000, 8_000)
    with torch.no_grad():
        output = model(waves, output_hidden_states=True)
        encoder = adopted_encoder(tmp_path)
        got = encoder(waves, samples)
        torch.testing.assert_close(encoder.read_out(got), output.last_hidden_state, rtol=0, atol=1e-5)
    expected = output.hidden_states
    assert len(got.hidden) == len(expected) == 4
    for ours, theirs in zip(got.hidden, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("front", FRONTS)
def test_block_outputs_equal_those_of_torchaudio(tmp_path, front):
    from torchaudio.models.wav2vec2.utils import import_huggingface_model

    model = hf_model("hubert", **FRONTS[front])
    model.save_pretrained(tmp_path)
    reference = import_huggingface_model(model).eval()
    waves, samples = noise(8_000, 8_000)
    with torch.no_grad():
        expected, _ = reference.extract_features(waves)
        got = adopted_encoder(tmp_path)(waves, samples)
    for ours, theirs in zip(got.hidden[1:], expected, strict=True):  # outputs of blocks 1 to L
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("front", ["base", "large"])
def test_an_utterance_has_the_same_states_alone_and_in_a_padded_batch(front):
    changes = (
        {"front_norm": "layer", "pre_norm": True, "normalise": True, "conv_bias": True} if front == "large" else {}
    )
    encoder = Encoder(TINY.model_copy(update=changes))
    initialise(encoder, torch.Generator().manual_seed(2))
    encoder.eval()
    waves, samples = noise(3_333, 16_000, 400, 8_720)
    poisoned = waves + 7.0 * (
        torch.arange(waves.shape[1]) >= samples[:, None]
    )  # padding must not matter, whatever it is
    with torch.no_grad():
        together = encoder(poisoned, samples).hidden
        for row, length in enumerate(samples.tolist()):
            alone = encoder(waves[row : row + 1, :length], samples[row : row + 1]).hidden
            frames = (length - 400) // 320 + 1
            for one, many in zip(alone, together, strict=True):
                assert one.shape[1] == frames
                torch.testing.assert_close(many[row, :frames], one[0], rtol=0, atol=1e-5)


def test_parameter_counts_are_the_published_ones():
    with torch.device("meta"):
        hubert_base = Encoder(BASE)
        two_blocks = BASE.model_copy(update={"heads": (12,) * 2, "ffn": (3072,) * 2, "feature_norm": False})
        distilhubert = Encoder(two_blocks)
    assert count_parameters(hubert_base) == 94_370_944
    assert count_parameters(distilhubert) == 23_491_200


def test_blocks_may_differ_in_heads_and_ffn():
    encoder = Encoder(TINY.model_copy(update={"heads": (3, 1, 2), "ffn": (40, 8, 17)}))
    assert encoder.blocks[1].attention.query.weight.shape == (8, 24)
    assert encoder.blocks[2].ffn_up.weight.shape == (17, 24)
    waves, samples = noise(4_000)
    assert [tuple(s.shape) for s in encoder(waves, samples).hidden] == [(1, 12, 24)] * 4


def test_the_gradient_of_the_convolutions_alone_is_scaled():
    waves, samples = noise(4_000, 2_000)
    gradients = []
    for factor in (1.0, 0.1):
        encoder = Encoder(TINY, feature_grad_mult=factor)
        initialise(encoder, torch.Generator().manual_seed(0))
        encoder(waves, samples).hidden[-1].square().sum().backward()
        gradients.append({name: p.grad for name, p in encoder.named_parameters()})
    for name, whole in gradients[0].items():
        factor = 0.1 if name.startswith("front.") else 1.0
        torch.testing.assert_close(gradients[1][name], factor * whole, rtol=1e-4, atol=1e-6)


def test_initialisation_is_a_function_of_the_generator_alone():
    states = []
    for seed, global_seed in ((3, 0), (3, 1), (4, 0)):
        torch.manual_seed(global_seed)
        encoder = Encoder(TINY)
        initialise(encoder, torch.Generator().manual_seed(seed))
        states.append(encoder.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not torch.equal(states[0]["projection.weight"], states[2]["projection.weight"])
    assert all(torch.isfinite(tensor).all() for tensor in states[0].values())


def test_waves_are_normalised_as_the_feature_extractor_does():
    from transformers import Wav2Vec2FeatureExtractor

    waves, samples = noise(3_000, 5_000)
    waves += 0.3 * (waves != 0)
    raw = [waves[row, :length].numpy() for row, length in enumerate(samples.tolist())]
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    expected = extractor(raw, sampling_rate=16_000, padding=True)["input_values"]
    np.testing.assert_allclose(normalise_waves(waves, samples).numpy(), np.stack(expected), rtol=0, atol=1e-5)


def test_older_and_newer_spellings_of_weight_norm_are_the_same_weights(tmp_path):
    hf_model().save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    root = "encoder.pos_conv_embed.conv."
    pairs = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    now = adopt(tmp_path)
    for old, new in pairs.items():
        source, target = (root + new, root + old) if root + new in written else (root + old, root + new)
        written[target] = written.pop(source)
    save_file(written, tmp_path / "model.safetensors")
    again = adopt(tmp_path)
    assert now.keys() == again.keys()
    assert all(torch.equal(now[name], again[name]) for name in now)


def test_a_ctc_model_gives_its_trunk(tmp_path):
    import transformers

    ctc = transformers.HubertForCTC(hf_model("hubert").config)
    ctc.save_pretrained(tmp_path)
    assert any(key.startswith("hubert.") for key in load_file(tmp_path / "model.safetensors"))
    assert set(adopt(tmp_path)) == set(Encoder(TINY).state_dict())


def test_tensors_that_nobody_expects_are_refused_by_name(tmp_path):
    hf_model().save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    save_file({**written, "encoder.adapter.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(StoreError, match=r"unknown tensors.*encoder\.adapter\.weight"):
        adopt(tmp_path)
    written.pop("encoder.layers.2.final_layer_norm.bias")
    save_file(written, tmp_path / "model.safetensors")
    with pytest.raises(StoreError, match=r"disagree about blocks\.2\.ffn_norm\.bias"):
        adopt(tmp_path)


def test_an_unknown_family_or_activation_is_refused(tmp_path):
    hf_model().save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "hidden_act": "relu"})
    with pytest.raises(StoreError, match="hidden_act is 'relu'"):
        adopt(tmp_path)
    write_json(tmp_path / "config.json", {**config, "model_type": "whisper"})
    with pytest.raises(StoreError, match="'whisper'; a student can adopt from hubert"):
        adopt(tmp_path)


def test_a_student_copies_everything_but_the_encoder_norm(tmp_path):
    hf_model().save_pretrained(tmp_path)
    adopted = adopt(tmp_path)
    save_file(adopted, tmp_path / "init.safetensors")
    student = Encoder(TINY.model_copy(update={"heads": (3, 3), "ffn": (40, 40), "feature_norm": False}))
    initialise(student, torch.Generator().manual_seed(0))
    copy_adopted(student, [tmp_path / "init.safetensors"], final_norm=False)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, adopted[name]) != name.startswith("norm."), name
    torch.testing.assert_close(student.norm.weight, torch.ones(24))


def test_an_init_of_another_shape_is_refused_with_both_shapes(tmp_path):
    hf_model().save_pretrained(tmp_path)
    save_file(adopt(tmp_path), tmp_path / "init.safetensors")
    wider = Encoder(TINY.model_copy(update={"ffn": (48, 40, 40)}))
    with pytest.raises(SettingsError, match=r"blocks\.0\.ffn_up\.weight is \(40, 24\).*\(48, 24\)"):
        copy_adopted(wider, [tmp_path / "init.safetensors"], final_norm=False)
    deeper = Encoder(TINY.model_copy(update={"heads": (3,) * 4, "ffn": (40,) * 4}))
    with pytest.raises(SettingsError, match=r"has no blocks\.3\."):
        copy_adopted(deeper, [tmp_path / "init.safetensors"], final_norm=False)


def test_a_saved_student_comes_back_and_serves_as_an_upstream(tmp_path):
    student = Encoder(TINY)
    initialise(student, torch.Generator().manual_seed(5))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    save_student(tmp_path / "a", student, {"targets": "x"})
    save_student(tmp_path / "b", student, {"targets": "y"})
    assert (tmp_path / "a/weights.safetensors").read_bytes() == (tmp_path / "b/weights.safetensors").read_bytes()
    upstream = load_student_upstream(tmp_path / "a")
    waves, samples = noise(4_000, 2_000)
    with torch.no_grad():
        expected = student.eval()(waves, samples).hidden
    assert (upstream.num_layers, upstream.width) == (4, 24)
    for ours, theirs in zip(upstream.layers(waves, samples), expected, strict=True):
        assert torch.equal(ours, theirs)
    # what it was trained on does not change what it computes
    assert upstream.describe() == load_student_upstream(tmp_path / "b").describe()


def test_a_flipped_bit_in_the_weights_is_refused(tmp_path):
    save_student(tmp_path, Encoder(TINY), {})
    data = bytearray((tmp_path / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "weights.safetensors").write_bytes(data)
    with pytest.raises(StoreError, match="SHA-256 differs"):
        load_student(tmp_path)


def test_dropout_is_for_training_only():
    rates = DropoutRates(features=0.5, hidden=0.5, attention=0.5, activation=0.5)
    encoder = Encoder(TINY.model_copy(update={"dropout": rates}))
    waves, samples = noise(4_000)
    assert not torch.equal(encoder(waves, samples).hidden[-1], encoder(waves, samples).hidden[-1])
    encoder.eval()
    assert torch.equal(encoder(waves, samples).hidden[-1], encoder(waves, samples).hidden[-1])
    assert isinstance(encoder.feature_dropout, nn.Dropout)


def test_bfloat16_autocast_stays_near_float32_and_keeps_norms_in_float32():
    encoder = Encoder(TINY)
    initialise(encoder, torch.Generator().manual_seed(2))
    encoder.eval()
    waves, samples = noise(9_000, 16_000)
    seen = []
    encoder.front[0].norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    with torch.no_grad():
        exact = encoder(waves, samples).hidden[-1]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = encoder(waves, samples).hidden[-1]
    assert seen == [torch.float32, torch.float32]
    assert float((rough[0, :26] - exact[0, :26]).norm() / exact[0, :26].norm()) < 0.05
