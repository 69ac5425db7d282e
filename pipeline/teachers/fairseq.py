"""Checkpoints of fairseq, s3prl and unilm: a .pt file in, a Hugging Face configuration, weights and normalisation out.

HuBERT, wav2vec 2.0 and WavLM were published in fairseq's layout; s3prl converted some (Robust HuBERT among them) into plain
dictionaries, Microsoft wrote WavLM without fairseq. The three differ in where settings lie, hardly in the tensors' names.
Each tensor is renamed, left out for a reason given here, or an error, and each setting that shows in a shape is held to it.
"""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, Field
from torch import Tensor

from cache.errors import SettingsError, StoreError
from cache.frames import RATE_HZ
from cache.publish import digest_file
from pipeline.teachers.pinned import listed
from pipeline.teachers.unpickle import plain, read_pickle


class Fairseq(BaseModel, frozen=True, extra="forbid"):
    """A checkpoint of HuBERT, wav2vec 2.0 or WavLM as fairseq, s3prl (converted) or unilm wrote it; nothing of it is run."""

    kind: Literal["fairseq"]
    path: str
    """The .pt file."""
    sha256: str | None = Field(pattern="^[0-9a-f]{64}$")
    """What the file must be, checked before it is read. None: whatever lies there."""


class Converted(NamedTuple):
    """A checkpoint as transformers would have saved it."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    normalise: bool | None
    """What the checkpoint says; None: nothing."""


RENAMED = [
    (r"mask_emb$", "masked_spec_embed"),
    (r"layer_norm\.", "feature_projection.layer_norm."),
    (r"post_extract_proj\.", "feature_projection.projection."),
    (r"feature_extractor\.conv_layers\.(\d+)\.0\.", r"feature_extractor.conv_layers.\1.conv."),
    # a group norm (base, first layer) or a layer norm between two transpositions (large)
    (
        r"feature_extractor\.conv_layers\.(\d+)\.2\.(1\.)?(?=weight$|bias$)",
        r"feature_extractor.conv_layers.\1.layer_norm.",
    ),
    (
        r"encoder\.pos_conv\.0\.(weight_g|parametrizations\.weight\.original0)$",
        "encoder.pos_conv_embed.conv.parametrizations.weight.original0",
    ),
    (
        r"encoder\.pos_conv\.0\.(weight_v|parametrizations\.weight\.original1)$",
        "encoder.pos_conv_embed.conv.parametrizations.weight.original1",
    ),
    (r"encoder\.pos_conv\.0\.bias$", "encoder.pos_conv_embed.conv.bias"),
    (r"encoder\.layer_norm\.", "encoder.layer_norm."),
    (r"encoder\.layers\.(\d+)\.self_attn\.grep_a$", r"encoder.layers.\1.attention.gru_rel_pos_const"),
    (r"encoder\.layers\.(\d+)\.self_attn\.grep_linear\.", r"encoder.layers.\1.attention.gru_rel_pos_linear."),
    (r"encoder\.layers\.0\.self_attn\.relative_attention_bias\.", "encoder.layers.0.attention.rel_attn_embed."),
    (r"encoder\.layers\.(\d+)\.self_attn\.([kvq]|out)_proj\.", r"encoder.layers.\1.attention.\2_proj."),
    (r"encoder\.layers\.(\d+)\.self_attn_layer_norm\.", r"encoder.layers.\1.layer_norm."),
    (r"encoder\.layers\.(\d+)\.fc1\.", r"encoder.layers.\1.feed_forward.intermediate_dense."),
    (r"encoder\.layers\.(\d+)\.fc2\.", r"encoder.layers.\1.feed_forward.output_dense."),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.", r"encoder.layers.\1.final_layer_norm."),
]

LEFT_OUT = {  # what follows the trunk in pretraining, and why no layer needs it
    r"label_embs_concat$": "embeddings of the units that HuBERT predicts",
    r"final_proj\.": "the last layer projected to predict them (wav2vec 2.0: the quantised frames)",
    r"quantizer\.(vars$|weight_proj\.)": "wav2vec 2.0's codebooks, the targets of its loss",
    r"project_q\.": "projects those targets",
    r"proj\.(weight|bias)$": "letters or phones of a fine-tuned model",
}
FINE_TUNED = "w2v_encoder.w2v_model."  # what fine-tuning puts before a trunk's names; "w2v_encoder." before its own

DEFAULTS = {  # fairseq's own, for files that write down only what was changed
    "extractor_mode": "default",
    "encoder_layers": 12,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "layer_norm_first": False,
    "conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
    "conv_bias": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "encoder_layerdrop": 0.0,
    "dropout_input": 0.0,
    "num_buckets": 320,
    "max_distance": 1280,
}
ONLY = {  # variants of the trunk that transformers' three models do not compute
    "activation_fn": "gelu",
    "layer_type": "transformer",
    "conv_pos_batch_norm": False,
    "pos_conv_depth": 1,
    "attn_type": "",
}


def read_fairseq(source: Fairseq) -> Converted:
    """Read and convert a checkpoint.

    Raises:
        DataError: no such file.
        SettingsError: a model that cannot be a teacher.
        StoreError: damaged, unsafe, another file than sha256 says, or not what its own settings describe.
    """
    path = Path(source.path)
    if source.sha256 is not None and path.is_file() and (found := digest_file(path)) != source.sha256:
        raise StoreError(
            f"{path} has SHA-256 {found[:12]}… and source.sha256 says {source.sha256[:12]}…; fetch it again"
        )
    return convert(read_pickle(path, str(path)), str(path))


def convert(checkpoint: Any, where: str) -> Converted:
    """A checkpoint's dictionary as transformers would have saved the model; `where` names it in errors.

    Raises:
        SettingsError: a model that cannot be a teacher.
        StoreError: no checkpoint of a layout known here, an unknown tensor, or settings that the shapes contradict.
    """
    if not isinstance(checkpoint, dict):
        raise StoreError(f"{where} holds no dictionary of a checkpoint; fetch it again")
    settings, task, weights = _parts(checkpoint, where)
    tuned = any(key.startswith(FINE_TUNED) for key in weights)
    if tuned:
        settings = _trunk_settings(settings)
        weights = {key.removeprefix(FINE_TUNED).removeprefix("w2v_encoder."): t for key, t in weights.items()}
    family = _family(settings, weights, where)
    settings = DEFAULTS | {key: value for key, value in settings.items() if value is not None}
    if (rate := task.get("sample_rate") or RATE_HZ) != RATE_HZ:
        raise SettingsError(f"{where} was trained at {rate} Hz; a teacher hears {RATE_HZ} Hz")
    config = _config(family, settings, where)
    _check_shapes(settings, config, weights, where)
    normalise = task.get("normalize", settings.get("normalize"))
    return Converted(config, _rename(weights, where), normalise if isinstance(normalise, bool) else None)


def conv_layers(text: Any, where: str) -> list[tuple[int, int, int]]:
    """Channels, kernel and stride of each convolution from "[(512,10,5)] + [(512,3,2)] * 4", which fairseq gave to eval.

    Raises:
        StoreError: anything but sums and multiples of lists of three whole numbers.
    """

    def layers(node: ast.expr) -> list[Any]:
        match node:
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return layers(left) + layers(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=ast.Constant(value=int(times))) if 0 <= times < 100:
                repeated = layers(left)
                return repeated * times if len(repeated) < 100 else repeated  # what is long is refused below
            case ast.List():
                return list(ast.literal_eval(node))
        raise ValueError(type(node).__name__)

    try:
        found = layers(ast.parse(str(text).strip(), mode="eval").body)
        if len(found) < 100 and all(len(x) == 3 and all(type(n) is int for n in x) for x in found):
            return [(dim, kernel, stride) for dim, kernel, stride in found]
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        pass  # said below
    raise StoreError(f"{where}: conv_feature_layers is {str(text)[:80]!r}, no list of (channels, kernel, stride)")


def _parts(checkpoint: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Settings of the model, settings of its task, and weights."""
    if "model_weight" in checkpoint:  # s3prl
        settings, task = (plain(checkpoint.get(key), where) for key in ("model_cfg", "task_cfg"))
        weights = checkpoint["model_weight"]
    else:
        config = plain(checkpoint.get("cfg") or checkpoint.get("args"), where)
        weights = checkpoint.get("model")
        # fairseq nests model and task; its older args and unilm have everything in one place
        nested = isinstance(config, dict) and isinstance(config.get("model"), dict)
        settings, task = (config["model"], config.get("task")) if nested else (config, config)
    if not isinstance(settings, dict) or not isinstance(weights, dict):
        raise StoreError(
            f"{where} has {listed(map(str, checkpoint)) or 'nothing'}; a checkpoint of fairseq or unilm has model and cfg (or "
            "args), one that s3prl converted has model_weight, model_cfg and task_cfg"
        )
    if strange := [str(key) for key, t in weights.items() if not isinstance(key, str) or not isinstance(t, Tensor)]:
        raise StoreError(f"{where}: {listed(strange)} among the weights is no tensor; fetch it again")
    return settings, task if isinstance(task, dict) else {}, dict(weights)


def _trunk_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the model that was fine-tuned, which fairseq keeps inside those of the fine-tuning."""
    inner = settings.get("w2v_args")
    inner = inner.get("model", inner) if isinstance(inner, dict) else {}
    return inner if isinstance(inner, dict) else {}


def _family(settings: Mapping[str, Any], weights: Mapping[str, Tensor], where: str) -> str:
    if any(".self_attn.grep_" in key or "relative_attention_bias" in key for key in weights):
        return "wavlm"
    name = settings.get("_name") or settings.get("arch")
    if name is None:  # the loss tells the two apart; their trunks compute the same
        name = "hubert" if "label_embs_concat" in weights else "wav2vec2" if "quantizer.vars" in weights else None
    if name not in ("hubert", "wav2vec2"):
        raise SettingsError(f"{where} is a model {name!r}; a checkpoint can be of hubert, wav2vec2 or wavlm")
    return str(name)


def _config(family: str, settings: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key, wanted in ONLY.items():
        if (found := settings.get(key, wanted)) not in (wanted, None):
            raise SettingsError(f"{where}: {key} is {found!r} and only {wanted!r} can be a teacher")
    convolutions = conv_layers(settings["conv_feature_layers"], where)
    config = {
        "model_type": family,
        "conv_dim": [dim for dim, _, _ in convolutions],
        "conv_kernel": [kernel for _, kernel, _ in convolutions],
        "conv_stride": [stride for _, _, stride in convolutions],
        "num_feat_extract_layers": len(convolutions),
        "conv_bias": settings["conv_bias"],
        "feat_extract_norm": "layer" if settings["extractor_mode"] == "layer_norm" else "group",
        "hidden_size": settings["encoder_embed_dim"],
        "num_hidden_layers": settings["encoder_layers"],
        "num_attention_heads": settings["encoder_attention_heads"],
        "intermediate_size": settings["encoder_ffn_embed_dim"],
        "num_conv_pos_embeddings": settings["conv_pos"],
        "num_conv_pos_embedding_groups": settings["conv_pos_groups"],
        "do_stable_layer_norm": settings["layer_norm_first"],
        "hidden_dropout": settings["dropout"],
        "attention_dropout": settings["attention_dropout"],
        "activation_dropout": settings["activation_dropout"],
        "feat_proj_dropout": settings["dropout_input"],
        "layerdrop": settings["encoder_layerdrop"],
    }
    if family == "wavlm":
        config |= {"num_buckets": settings["num_buckets"], "max_bucket_distance": settings["max_distance"]}
    return config


def _check_shapes(
    settings: Mapping[str, Any], config: Mapping[str, Any], weights: Mapping[str, Tensor], where: str
) -> None:
    """Hold every setting that shows in the weights to them; which tensors there are is checked when they are pinned."""

    def seen() -> Iterator[tuple[str, Any, Any]]:  # (setting, what it says, what the weights say)
        def size(name: str, axis: int) -> int | None:
            return weights[name].shape[axis] if name in weights and weights[name].ndim > axis else None

        blocks = {int(m[1]) for key in weights if (m := re.match(r"encoder\.layers\.(\d+)\.", key))}
        yield "encoder_layers", settings["encoder_layers"], len(blocks)
        yield "encoder_embed_dim", settings["encoder_embed_dim"], size("post_extract_proj.weight", 0)
        yield "encoder_ffn_embed_dim", settings["encoder_ffn_embed_dim"], size("encoder.layers.0.fc1.weight", 0)
        first = "feature_extractor.conv_layers.0."
        yield "extractor_mode", config["feat_extract_norm"] == "layer", first + "2.1.weight" in weights
        yield "conv_bias", settings["conv_bias"], first + "0.bias" in weights
        for i, channels_kernel in enumerate(zip(config["conv_dim"], config["conv_kernel"], strict=True)):
            name = f"feature_extractor.conv_layers.{i}.0.weight"
            yield f"conv_feature_layers[{i}]", channels_kernel, (size(name, 0), size(name, 2))
        position = next((k for k in weights if re.match(r"encoder\.pos_conv\.0\..*(weight_v|original1)$", k)), "")
        yield "conv_pos", settings["conv_pos"], size(position, 2)
        yield "encoder_embed_dim/conv_pos_groups", _ratio(settings), size(position, 1)
        if config["model_type"] == "wavlm":
            attention = "encoder.layers.0.self_attn."
            yield "encoder_attention_heads", settings["encoder_attention_heads"], size(attention + "grep_a", 1)
            yield "num_buckets", settings["num_buckets"], size(attention + "relative_attention_bias.weight", 0)

    if wrong := [f"{key} is {said!r} and the weights have {found!r}" for key, said, found in seen() if said != found]:
        raise StoreError(f"{where}: settings and weights disagree: {listed(wrong)}; fetch it again")


def _ratio(settings: Mapping[str, Any]) -> Any:
    width, groups = settings["encoder_embed_dim"], settings["conv_pos_groups"]
    return width // groups if isinstance(width, int) and isinstance(groups, int) and groups > 0 else (width, groups)


def _rename(weights: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in weights.items():
        matches = (match.expand(name) + key[match.end() :] for old, name in RENAMED if (match := re.match(old, key)))
        name = next(matches, None)
        if name is not None and name not in renamed:  # two spellings of one tensor: which is meant?
            renamed[name] = tensor
        elif not any(re.match(pattern, key) for pattern in LEFT_OUT):
            unknown.append(key)
    if unknown:
        raise StoreError(f"{where} has tensors that belong to no model known here: {listed(unknown)}")
    return renamed
