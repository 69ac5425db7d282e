"""Teacher families: a config.json in, the transformers model it describes out, without weights.

Only from this library's own classes: code that a checkpoint brings along is never run. What would make an utterance depend
on its batch, or give frames whose time nobody knows, is refused here.
"""

from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from cache.errors import SettingsError
from pipeline.teachers.grid import STORE, Grid

KERNELS = [10, 3, 3, 3, 3, 2, 2]  # with these strides T = (S - 400) // 320 + 1, which every store is counted in
STRIDES = [5, 2, 2, 2, 2, 2, 2]


class Family(NamedTuple):
    """What is known of a model_type beside its configuration."""

    config: Any
    model: Any
    attention: str
    """The implementation that computes it in float32 exactly as published."""
    prefixes: tuple[str, ...]
    """What its models with a head put before the names of the trunk."""
    grid: Grid
    """Where its frames lie."""
    fixed: tuple[tuple[str, Any, str], ...]
    """Options, the value each must have, and why."""
    heads: str = r"(?!)"
    """Names, as a pattern, of what a published model has beside the trunk and no layer needs; see also `pinned.HEADS`."""


CONVOLUTIONS = (
    ("conv_kernel", KERNELS, "stores count frames of 400 samples"),
    ("conv_stride", STRIDES, "stores count frames every 320 samples"),
    ("conv_pos_batch_norm", False, "its batch norm spreads padding into speech"),
    ("add_adapter", False, "it changes the frame rate"),
)
# two banks of 400 samples, 160 apart, make a frame
PAIRS = Grid(hop=320, field=560, centre=280)
# frame i is a convolution around mel frame 2i, which is centred on sample 320i; a last part of a hop has a frame too
WHISPER = Grid(hop=320, field=1, centre=0)

FAMILIES = {
    "hubert": Family(*(transformers.HubertConfig, transformers.HubertModel, "sdpa", ("hubert.",)), STORE, CONVOLUTIONS),
    "wav2vec2": Family(
        *(transformers.Wav2Vec2Config, transformers.Wav2Vec2Model, "sdpa", ("wav2vec2.",)), STORE, CONVOLUTIONS
    ),
    # its gated bias has no fused kernel
    "wavlm": Family(*(transformers.WavLMConfig, transformers.WavLMModel, "eager", ("wavlm.",)), STORE, CONVOLUTIONS),
    "data2vec-audio": Family(
        *(transformers.Data2VecAudioConfig, transformers.Data2VecAudioModel, "sdpa", ("data2vec_audio.",)),
        *(STORE, CONVOLUTIONS),
    ),
    # its position bias is an argument that fused kernels need not know
    "wav2vec2-bert": Family(
        *(transformers.Wav2Vec2BertConfig, transformers.Wav2Vec2BertModel, "eager", ("wav2vec2_bert.",)),
        PAIRS,
        (
            ("feature_projection_input_dim", 160, "its input is pairs of 80 filter banks"),
            ("add_adapter", False, "it changes the frame rate"),
        ),
    ),
    "whisper": Family(
        *(transformers.WhisperConfig, WhisperEncoder, "sdpa", ("model.encoder.", "encoder.")),
        WHISPER,
        (),
        r"(model\.)?(decoder\.)|proj_out\.",
    ),
}


def family_of(config: dict[str, Any], where: str) -> str:
    """The family a config.json names, after checking that its frames are exact.

    Raises:
        SettingsError: another family, another frame grid, or a layer whose output depends on padding.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise SettingsError(f"{where}: model_type is {family!r}; a teacher can be {', '.join(FAMILIES)}")
    for key, wanted, why in FAMILIES[family].fixed:
        found = config.get(key, wanted)
        if (list(found) if isinstance(found, list | tuple) else found) != wanted:
            raise SettingsError(f"{where}: {key} is {found!r} and only {wanted!r} can be a teacher: {why}")
    return str(family)


def build_model(config: dict[str, Any], where: str, device: str = "meta") -> nn.Module:
    """The trunk that `config` describes, in float32; on "meta" it has names and shapes only.

    Raises:
        SettingsError: see `family_of`; also values that the library refuses.
    """
    family = FAMILIES[family_of(config, where)]
    known = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype", "architectures", "auto_map")}
    try:
        settings = family.config.from_dict(known)
        with torch.device(device):
            model: nn.Module = family.model._from_config(
                settings, attn_implementation=family.attention, dtype=torch.float32
            )
            return model
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{where}: transformers refuses this configuration: {reason}") from error
