"""WavLM, HuBERT and wav2vec 2.0 in the student's encoder against the two libraries that compute them."""

import pytest
import torch

from tests.student_fixtures import FRONTS, adopted_encoder, hf_model, noise

pytestmark = pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")

FAMILIES = {
    "hubert": ("hubert", {}),
    "wav2vec2": ("wav2vec2", {}),
    "wavlm": ("wavlm", {}),  # 320 buckets: these utterances are too short to leave those of one distance each
    "wavlm, few buckets": ("wavlm", {"num_buckets": 12, "max_bucket_distance": 20}),
}
LENGTHS = (16_000, 3_333, 400, 8_720)


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_of_a_padded_batch_equal_those_of_transformers_alone(tmp_path, family, front):
    name, changes = FAMILIES[family]
    model = hf_model(name, **FRONTS[front], **changes)
    model.save_pretrained(tmp_path)
    encoder = adopted_encoder(tmp_path)
    waves, samples = noise(*LENGTHS)
    with torch.no_grad():
        states = encoder(waves, samples)
        last = encoder.read_out(states)
        for row, length in enumerate(LENGTHS):
            frames = (length - 400) // 320 + 1
            output = model(waves[row : row + 1, :length], output_hidden_states=True)
            assert len(states.hidden) == len(output.hidden_states) == 4
            for ours, theirs in zip(states.hidden, output.hidden_states, strict=True):
                torch.testing.assert_close(ours[row, :frames], theirs[0], rtol=0, atol=1e-5)
            torch.testing.assert_close(last[row, :frames], output.last_hidden_state[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_block_outputs_equal_those_of_torchaudio(tmp_path, family, front):
    from torchaudio.models.wav2vec2.utils import import_huggingface_model

    name, changes = FAMILIES[family]
    model = hf_model(name, **FRONTS[front], **changes)
    model.save_pretrained(tmp_path)
    reference = import_huggingface_model(model).eval()
    encoder = adopted_encoder(tmp_path)
    waves, samples = noise(*LENGTHS)
    with torch.no_grad():
        got = encoder(waves, samples).hidden
        for row, length in enumerate(LENGTHS):
            expected, _ = reference.extract_features(waves[row : row + 1, :length])
            for ours, theirs in zip(got[1:], expected, strict=True):  # outputs of blocks 1 to L
                torch.testing.assert_close(ours[row, : theirs.shape[1]], theirs[0], rtol=0, atol=1e-5)


def test_the_projection_is_what_transformers_adds_positions_to(tmp_path):
    model = hf_model("wavlm", **FRONTS["base"])
    model.save_pretrained(tmp_path)
    waves, samples = noise(8_000, 5_000)
    seen = []
    model.encoder.pos_conv_embed.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        got = adopted_encoder(tmp_path)(waves, samples).projection
        for row, length in enumerate(samples.tolist()):
            model(waves[row : row + 1, :length])
            frames = seen[-1].shape[1]
            torch.testing.assert_close(got[row, :frames], seen[-1][0], rtol=0, atol=1e-5)
    assert not got[1, 15:].any()  # past the end of the shorter one


def test_buckets_are_those_of_transformers_for_every_distance():
    from pipeline.student.attention import relative_buckets

    for buckets, farthest in ((320, 800), (12, 20), (32, 128)):
        attention = hf_model("wavlm", num_buckets=buckets, max_bucket_distance=farthest).encoder.layers[0].attention
        distances = torch.arange(-1_999, 2_000)
        expected = attention._relative_positions_bucket(distances)
        assert torch.equal(relative_buckets(2_000, buckets, farthest, torch.device("cpu")), expected)
