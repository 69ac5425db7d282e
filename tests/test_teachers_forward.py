"""A teacher's layers: the same in any batch, and those of two independent implementations."""

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torchaudio.models.wav2vec2.utils import import_huggingface_model

from cache.errors import StoreError
from pipeline.padding import normalise_waves
from pipeline.teachers.families import FAMILIES
from pipeline.teachers.forward import load_teacher
from pipeline.teachers.sources import Folder, TeacherParams, materialise
from tests.conftest import TINY_HUBERT

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # in WavLM's own call

FRONTS = {
    "base": {"do_stable_layer_norm": False, "feat_extract_norm": "group", "conv_bias": False},
    "large": {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
}
CASES = [(family, front) for family in ("hubert", "wav2vec2", "wavlm") for front in FRONTS]


def make_folder(path, family, front, **changes):
    """A random model of a family as transformers saves it; norms and biases are random too."""
    make_config, make_model = FAMILIES[family].config, FAMILIES[family].model
    torch.manual_seed(0)
    model = make_model(make_config(**{**TINY_HUBERT, **FRONTS[front], **changes})).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=front == "large").save_pretrained(path)
    return model


def make_teacher(tmp_path, family, front, **changes):
    model = make_folder(tmp_path / "source", family, front, **changes)
    source = Folder(kind="folder", path=str(tmp_path / "source"))
    materialise(TeacherParams(source=source, normalise=None), tmp_path / "teacher")
    return load_teacher(tmp_path / "teacher"), model


def speech_like(*lengths, seed=1):
    """Padded noise of different loudness, with an offset."""
    generator = torch.Generator().manual_seed(seed)
    waves = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        waves[row, :length] = torch.randn(length, generator=generator) * 0.05 * (row + 1) + 0.01
    return waves, torch.tensor(lengths)


def assert_same_alone_and_together(teacher, waves, samples):
    together = teacher.layers(waves, samples)
    for row, length in enumerate(samples.tolist()):
        alone = teacher.layers(waves[row : row + 1, :length], samples[row : row + 1])
        frames = (length - 400) // 320 + 1
        assert len(alone) == len(together) == teacher.num_layers
        for one, many in zip(alone, together, strict=True):
            assert one.shape == (1, frames, teacher.width)
            torch.testing.assert_close(many[row, :frames], one[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "front"), CASES)
def test_an_utterance_has_the_same_layers_alone_and_in_any_padded_batch(tmp_path, family, front):
    teacher, _ = make_teacher(tmp_path, family, front)
    waves, samples = speech_like(3_333, 16_000, 400, 8_720, 719)
    assert_same_alone_and_together(teacher, waves, samples)
    order = torch.tensor([4, 2, 0, 3, 1])
    assert_same_alone_and_together(teacher, torch.nn.functional.pad(waves, (0, 9_999))[order], samples[order])


@pytest.mark.parametrize("front", FRONTS)
def test_what_lies_in_the_padding_does_not_matter(tmp_path, front):
    teacher, _ = make_teacher(tmp_path, "hubert", front)
    waves, samples = speech_like(3_333, 16_000)
    dirty = waves + 7.0 * (torch.arange(16_000) >= samples[:, None])
    for clean, other in zip(teacher.layers(waves, samples), teacher.layers(dirty, samples), strict=True):
        assert torch.equal(clean[0, :10], other[0, :10])


def test_the_stock_group_norm_would_not_give_the_same_layers(tmp_path):
    teacher, model = make_teacher(tmp_path, "hubert", "base")
    waves, samples = speech_like(3_333, 16_000)
    with torch.no_grad():
        mask = (torch.arange(16_000) < samples[:, None]).long()
        stock = model(waves, attention_mask=mask).last_hidden_state[0, :10]
    assert (stock - teacher.layers(waves, samples)[-1][0, :10]).abs().max() > 0.1


@pytest.mark.slow
def test_hubert_of_base_size_has_the_same_layers_in_any_batch(tmp_path):
    base = {key: getattr(transformers.HubertConfig(), key) for key in TINY_HUBERT}
    teacher, _ = make_teacher(tmp_path, "hubert", "base", **base)
    assert teacher.pinned.num_params == 94_370_944  # without the masked embedding, as published tables count
    assert_same_alone_and_together(teacher, *speech_like(32_000, 12_345))


@pytest.mark.parametrize(("family", "front"), CASES)
def test_layers_equal_those_of_transformers_for_one_utterance(tmp_path, family, front):
    teacher, model = make_teacher(tmp_path, family, front)
    wave, samples = speech_like(8_000)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "source")
    prepared = extractor(wave[0].numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        expected = model(prepared, output_hidden_states=True).hidden_states
    for ours, theirs in zip(teacher.layers(wave, samples), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("family", "front"), CASES)
def test_block_outputs_equal_those_of_torchaudio(tmp_path, family, front):
    """torchaudio lists the outputs of blocks 1 to L: its index i is our layer i + 1, raw, before any final norm."""
    teacher, model = make_teacher(tmp_path, family, front)
    reference = import_huggingface_model(model).eval()
    wave, samples = speech_like(8_000)
    given = normalise_waves(wave, torch.tensor([wave.shape[1]])) if front == "large" else wave
    with torch.no_grad():
        expected, _ = reference.extract_features(given)
    assert len(expected) == teacher.num_layers - 1
    for ours, theirs in zip(teacher.layers(wave, samples)[1:], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_normalisation_is_that_of_the_feature_extractor():
    waves, samples = speech_like(3_333, 16_000)
    extractor = transformers.Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    rows = [wave[:n].numpy() for wave, n in zip(waves, samples.tolist(), strict=True)]
    expected = extractor(rows, sampling_rate=16_000, padding=True, return_tensors="np")["input_values"]
    ours = normalise_waves(waves, samples)
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=1e-5)


def test_silence_stays_finite(tmp_path):
    for front in FRONTS:
        teacher, _ = make_teacher(tmp_path / front, "hubert", front)
        assert all(torch.isfinite(x).all() for x in teacher.layers(torch.zeros(1, 4_000), torch.tensor([4_000])))


def test_description_says_what_decides_the_numbers(tmp_path):
    teacher, _ = make_teacher(tmp_path, "wavlm", "large")
    pinned = json.loads((tmp_path / "teacher" / "teacher.json").read_text())
    assert teacher.describe() == {
        "kind": "wavlm",
        "digest": pinned["digest"],
        "normalise": True,
        "layers": 4,
        "width": 24,
        "num_params": pinned["num_params"],
        "precision": "float32",
        "attention": "eager",
    }


def test_a_flipped_bit_in_the_weights_is_noticed(tmp_path):
    make_teacher(tmp_path, "hubert", "base")
    path = tmp_path / "teacher" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(StoreError, match="damaged or was changed; run `decant teacher` again"):
        load_teacher(tmp_path / "teacher")


@pytest.mark.parametrize(
    "change",
    [
        lambda d: (d / "config.json").write_text((d / "config.json").read_text().replace("false", "true", 1)),
        lambda d: (d / "teacher.json").write_text((d / "teacher.json").read_text().replace('e": false', 'e": true')),
        lambda d: (d / "model.safetensors").unlink(),
        lambda d: (d / "teacher.json").unlink(),
        lambda d: (d / "teacher.json").write_text("{}"),
        lambda d: save_file({**load_file(d / "model.safetensors"), "x": torch.ones(1)}, d / "model.safetensors"),
    ],
)
def test_a_folder_that_is_not_what_was_pinned_is_refused(tmp_path, change):
    make_teacher(tmp_path, "hubert", "base")
    change(tmp_path / "teacher")
    with pytest.raises(StoreError) as refused:
        load_teacher(tmp_path / "teacher")
    assert str(tmp_path / "teacher") in str(refused.value)
