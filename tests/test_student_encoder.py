import numpy as np
import pytest
import torch
from torch import nn

from cache.errors import StoreError
from pipeline.padding import normalise_waves
from pipeline.student.checkpoint import load_student, save_student
from pipeline.student.encoder import Encoder, initialise
from pipeline.student.shape import DropoutRates
from pipeline.student.upstream import load_student_upstream
from tests.student_fixtures import TINY, noise


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
