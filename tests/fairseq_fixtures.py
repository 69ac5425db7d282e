"""Random models in fairseq's layout: modules that carry its names and attributes, and the settings it would have written.

They hold weights and do not compute; torchaudio's importer, written against fairseq's own classes, reads them.
"""

import torch
from torch import nn
from torch.nn.utils import weight_norm

TINY = {
    "conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] + [(12,2,2)]",
    "encoder_embed_dim": 24,
    "encoder_layers": 3,
    "encoder_attention_heads": 3,
    "encoder_ffn_embed_dim": 40,
    "conv_pos": 16,
    "conv_pos_groups": 4,
}
BASE = {"extractor_mode": "default", "conv_bias": False, "layer_norm_first": False}
LARGE = {"extractor_mode": "layer_norm", "conv_bias": True, "layer_norm_first": True}
# HuBERT's and WavLM's large models have layer norm in every convolution and no bias there; lv60's wav2vec 2.0 has both
LARGE_WITHOUT_BIAS = {**LARGE, "conv_bias": False}
CONVOLUTIONS = {
    TINY["conv_feature_layers"]: [(8, 10, 5), *[(8, 3, 2)] * 4, (8, 2, 2), (12, 2, 2)],
    "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2": [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2],
}


class Block(nn.Module):
    """A transformer layer's parameters."""

    def __init__(self, width, heads, ffn, gated, first):
        super().__init__()
        self.self_attn = nn.Module()
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            self.self_attn.add_module(name, nn.Linear(width, width))
        self.self_attn.num_heads, self.self_attn.dropout_module = heads, nn.Dropout(0.1)
        if gated:
            self.self_attn.grep_linear = nn.Linear(width // heads, 8)
            self.self_attn.grep_a = nn.Parameter(torch.ones(1, heads, 1, 1))
            if first:
                self.self_attn.relative_attention_bias = nn.Embedding(320, heads)
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, ffn), nn.Linear(ffn, width)
        self.dropout2, self.dropout3 = nn.Dropout(0.0), nn.Dropout(0.1)


class Trunk(nn.Module):
    """What HuBERT, wav2vec 2.0 and WavLM share."""

    def __init__(self, settings, gated=False):
        super().__init__()
        width, deep = settings["encoder_embed_dim"], settings["extractor_mode"] == "layer_norm"
        blocks, channels = [], 1
        for i, (dim, kernel, stride) in enumerate(CONVOLUTIONS[settings["conv_feature_layers"]]):
            block = [nn.Conv1d(channels, dim, kernel, stride, bias=settings["conv_bias"]), nn.Dropout(0.0)]
            if deep:
                block.append(nn.Sequential(nn.Identity(), nn.LayerNorm(dim), nn.Identity()))
            elif i == 0:
                block.append(nn.GroupNorm(dim, dim))
            blocks.append(nn.Sequential(*block, nn.GELU()))
            channels = dim
        self.feature_extractor = nn.Module()
        self.feature_extractor.conv_layers = nn.ModuleList(blocks)
        self.post_extract_proj, self.layer_norm = nn.Linear(channels, width), nn.LayerNorm(channels)
        self.dropout_input, self.mask_emb = nn.Dropout(0.1), nn.Parameter(torch.rand(width))
        kernel, groups = settings["conv_pos"], settings["conv_pos_groups"]
        position = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=groups)
        self.encoder = nn.Module()
        self.encoder.pos_conv = nn.Sequential(weight_norm(position, name="weight", dim=2), nn.Identity(), nn.GELU())
        self.encoder.layers = nn.ModuleList(
            Block(width, settings["encoder_attention_heads"], settings["encoder_ffn_embed_dim"], gated, i == 0)
            for i in range(settings["encoder_layers"])
        )
        self.encoder.layer_norm = nn.LayerNorm(width)
        self.encoder.layer_norm_first, self.encoder.layerdrop = settings["layer_norm_first"], 0.05


class HubertModel(Trunk):
    """With its units; the name is the one torchaudio's importer asks for."""

    def __init__(self, settings):
        super().__init__(settings)
        self.label_embs_concat = nn.Parameter(torch.rand(7, 5))
        self.final_proj = nn.Linear(settings["encoder_embed_dim"], 5)


class Wav2Vec2Model(Trunk):
    """With its codebooks."""

    def __init__(self, settings):
        super().__init__(settings)
        channels = self.layer_norm.normalized_shape[0]
        self.quantizer = nn.Module()
        self.quantizer.vars = nn.Parameter(torch.rand(1, 6, 4))
        self.quantizer.weight_proj = nn.Linear(channels, 6)
        self.project_q, self.final_proj = nn.Linear(4, 4), nn.Linear(settings["encoder_embed_dim"], 4)


class WavLM(Trunk):
    """With its gated relative positions."""

    def __init__(self, settings):
        super().__init__(settings, gated=True)


MODELS = {"hubert": HubertModel, "wav2vec2": Wav2Vec2Model, "wavlm": WavLM}


def random_model(family, settings, seed=0):
    """A model of a family; norms and biases are random too."""
    torch.manual_seed(seed)
    model = MODELS[family](settings).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def checkpoint(family, settings, model, normalise=False):
    """The dictionary as it was published: fairseq's (hubert, wav2vec2) or unilm's (wavlm)."""
    weights = model.state_dict()
    if family == "wavlm":
        more = {"relative_position_embedding": True, "gru_rel_pos": True, "num_buckets": 320, "max_distance": 800}
        return {"cfg": {**settings, **more, "normalize": normalise}, "model": weights}
    names = {"hubert": "hubert_pretraining", "wav2vec2": "audio_pretraining"}
    return {
        "args": None,
        "cfg": {
            "_name": None,
            "common": {"fp16": True, "seed": 1337},
            "model": {"_name": family, **settings},
            "task": {"_name": names[family], "normalize": normalise, "sample_rate": 16_000},
        },
        "model": weights,
        "optimizer_history": [{"num_updates": 400_000}],
        "extra_state": {"epoch": 1},
        "last_optimizer_state": {"state": {0: {"exp_avg": torch.zeros(3)}}},
    }
