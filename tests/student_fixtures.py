"""Small encoders of every kind, the models of transformers whose weights they take, and batches of noise."""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.student.adopt import adopt, read_shape
from pipeline.student.encoder import Encoder, initialise
from pipeline.student.shape import DropoutRates, EncoderShape, PositionBias
from tests.conftest import TINY_HUBERT


def changed(shape: EncoderShape, **changes: Any) -> EncoderShape:
    """The shape with some fields changed, and checked again."""
    return EncoderShape.model_validate({**shape.model_dump(), **changes})


NO_DROPOUT = DropoutRates(features=0.0, hidden=0.0, attention=0.0, activation=0.0)
TINY = EncoderShape(
    conv_channels=(8, 8, 8, 8, 8, 8, 12),
    conv_spans=None,
    conv_bias=False,
    front_norm="group",
    feature_norm=True,
    feature_norm_width=None,
    feature_scale=False,
    projection=True,
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
WAVLM = changed(TINY, position_bias=PositionBias(buckets=12, max_distance=20, heads=3))
THIN = changed(  # FitHuBERT's stack of convolutions
    TINY,
    conv_spans=((10, 5), (1, 1), (3, 2), (3, 2), (3, 2), (3, 2), (1, 1), (2, 2), (2, 2)),
    conv_channels=(6, 8, 8, 8, 8, 8, 12, 12, 12),
)
FRONTS: dict[str, dict[str, Any]] = {
    "base": {"do_stable_layer_norm": False, "feat_extract_norm": "group", "conv_bias": False},
    "large": {"do_stable_layer_norm": True, "feat_extract_norm": "layer", "conv_bias": True},
    "odd kernel": {"do_stable_layer_norm": False, "feat_extract_norm": "group", "num_conv_pos_embeddings": 15},
}


def hf_model(family: str = "hubert", **changes: Any) -> nn.Module:
    """A tiny model of transformers with random weights."""
    import transformers

    config, model_class = {
        "hubert": (transformers.HubertConfig, transformers.HubertModel),
        "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
        "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
    }[family]
    torch.manual_seed(0)
    model: nn.Module = model_class(config(**{**TINY_HUBERT, **changes})).eval()
    for parameter in model.parameters():  # biases and norms too, so that a swapped pair shows
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def adopted_encoder(directory: Path) -> Encoder:
    """The encoder that computes what the model in a folder computes."""
    encoder = Encoder(read_shape(directory))
    encoder.load_state_dict(adopt(directory))
    return encoder.eval()


def random_encoder(shape: EncoderShape, seed: int = 2) -> Encoder:
    """An encoder whose every weight is random, biases, norms and position biases too, in evaluation mode."""
    encoder = Encoder(shape)
    generator = torch.Generator().manual_seed(seed)
    initialise(encoder, generator)
    for name, parameter in encoder.named_parameters():
        scale = 1.0 if name == "position_bias.table" else 0.1
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return encoder.eval()


def noise(*lengths: int) -> tuple[Float[Tensor, "B S"], Int64[Tensor, " B"]]:
    """Noise of some lengths, padded with zeros."""
    generator = torch.Generator().manual_seed(1)
    waves = torch.zeros(len(lengths), max(lengths))
    for row, length in enumerate(lengths):
        waves[row, :length] = torch.randn(length, generator=generator) * 0.1
    return waves, torch.tensor(lengths)
