"""Teacher families: a config.json in, the transformers model it describes out, without weights.

Only the three families whose frames the whole pipeline counts in are built, and only from this library's own classes:
code that a checkpoint brings along is never run. What would make an utterance depend on its batch is refused here.
"""

from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from cache.errors import SettingsError

KERNELS = [10, 3, 3, 3, 3, 2, 2]  # with these strides T = (S - 400) // 320 + 1, which every store is counted in
STRIDES = [5, 2, 2, 2, 2, 2, 2]

FAMILIES = {  # model_type -> configuration, model, and the attention that computes it in float32 exactly as published
    "hubert": (transformers.HubertConfig, transformers.HubertModel, "sdpa"),
    "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model, "sdpa"),
    "wavlm": (transformers.WavLMConfig, transformers.WavLMModel, "eager"),  # its gated bias has no fused kernel
}


def family_of(config: dict[str, Any], where: str) -> str:
    """The family a config.json names, after checking that its frames are exact.

    Raises:
        SettingsError: another family, another frame grid, or a layer whose output depends on padding.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise SettingsError(f"{where}: model_type is {family!r}; a teacher can be {', '.join(FAMILIES)}")
    for key, wanted, why in (
        ("conv_kernel", KERNELS, "stores count frames of 400 samples"),
        ("conv_stride", STRIDES, "stores count frames every 320 samples"),
        ("conv_pos_batch_norm", False, "its batch norm spreads padding into speech"),
        ("add_adapter", False, "it changes the frame rate"),
    ):
        found = config.get(key, wanted)
        if (list(found) if isinstance(found, list | tuple) else found) != wanted:
            raise SettingsError(f"{where}: {key} is {found!r} and only {wanted!r} can be a teacher: {why}")
    return str(family)


def build_model(config: dict[str, Any], where: str, device: str = "meta") -> nn.Module:
    """The trunk that `config` describes, in float32; on "meta" it has names and shapes only.

    Raises:
        SettingsError: see `family_of`; also values that the library refuses.
    """
    make_config, make_model, attention = FAMILIES[family_of(config, where)]
    known = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype", "architectures", "auto_map")}
    try:
        settings = make_config.from_dict(known)
        with torch.device(device):
            return make_model._from_config(settings, attn_implementation=attention, dtype=torch.float32)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise SettingsError(f"{where}: transformers refuses this configuration: {reason}") from error
