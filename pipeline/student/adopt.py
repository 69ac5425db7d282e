"""Adoption: a Hugging Face folder in, its trunk under the student's names out; then those tensors into a student.

The folder is read as plain files, config.json and model.safetensors: no transformers, no teacher object. Every tensor is
accounted for: renamed, left out for a reason given here, or an error. What a trunk computes beside its tensors' sizes goes
with them, so that no student takes weights that mean something else to it.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from cache.errors import SettingsError, StoreError
from cache.publish import read_json
from pipeline.student.encoder import Encoder
from pipeline.student.shape import KERNELS, STRIDES, DropoutRates, EncoderShape, PositionBias

FAMILIES = ("hubert", "wav2vec2", "wavlm")

RENAMED = [
    (r"feature_extractor\.conv_layers\.(\d+)\.conv\.", r"front.\1.conv."),
    (r"feature_extractor\.conv_layers\.(\d+)\.layer_norm\.", r"front.\1.norm."),
    (r"feature_projection\.layer_norm\.", "feature_norm."),
    (r"feature_projection\.projection\.", "projection."),
    # three spellings of weight norm: before transformers 4.3x, since then, and exports of either
    (r"encoder\.pos_conv_embed\.conv\.(weight_g|parametrizations\.weight\.original0)$", "position.magnitude"),
    (r"encoder\.pos_conv_embed\.conv\.(weight_v|parametrizations\.weight\.original1)$", "position.direction"),
    (r"encoder\.pos_conv_embed\.conv\.bias$", "position.bias"),
    (r"encoder\.layer_norm\.", "norm."),
    (r"encoder\.layers\.(\d+)\.attention\.q_proj\.", r"blocks.\1.attention.query."),
    (r"encoder\.layers\.(\d+)\.attention\.k_proj\.", r"blocks.\1.attention.key."),
    (r"encoder\.layers\.(\d+)\.attention\.v_proj\.", r"blocks.\1.attention.value."),
    (r"encoder\.layers\.(\d+)\.attention\.out_proj\.", r"blocks.\1.attention.out."),
    (r"encoder\.layers\.0\.attention\.rel_attn_embed\.weight$", "position_bias.table"),
    (r"encoder\.layers\.(\d+)\.attention\.gru_rel_pos_linear\.", r"blocks.\1.attention.gate."),
    (r"encoder\.layers\.(\d+)\.attention\.gru_rel_pos_const$", r"blocks.\1.attention.gate_scale"),
    (r"encoder\.layers\.(\d+)\.layer_norm\.", r"blocks.\1.attention_norm."),
    (r"encoder\.layers\.(\d+)\.feed_forward\.intermediate_dense\.", r"blocks.\1.ffn_up."),
    (r"encoder\.layers\.(\d+)\.feed_forward\.output_dense\.", r"blocks.\1.ffn_down."),
    (r"encoder\.layers\.(\d+)\.final_layer_norm\.", r"blocks.\1.ffn_norm."),
]

LEFT_OUT = re.compile(r"masked_spec_embed$")  # stands in for masked frames in pretraining only

NEEDED = (  # of config.json; `decant teacher` writes out what a source leaves to its library's defaults
    *("conv_dim", "conv_bias", "feat_extract_norm", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "do_stable_layer_norm"),
    *("hidden_dropout", "attention_dropout", "activation_dropout"),
)
NEEDED_OF_WAVLM = ("num_buckets", "max_bucket_distance")

HEADS = re.compile(  # of HubertForCTC and its like, beside the trunk
    r"(lm_head|quantizer|project_q|project_hid|projector|classifier|layer_weights|tdnn|objective|feature_extractor"
    r"|final_proj|label_embs_concat)\b"
)


def adopt(teacher_dir: Path) -> dict[str, Tensor]:
    """The trunk's weights in float32 under the student's names.

    Raises:
        StoreError: a file is missing or damaged, the model is of another family, or a tensor is unknown, absent or of
            another shape than config.json says; the message names it.
    """
    shape = read_shape(teacher_dir)
    weights = _read_weights(Path(teacher_dir) / "model.safetensors")
    family = read_json(Path(teacher_dir) / "config.json")["model_type"]
    prefix = f"{family}." if any(key.startswith(f"{family}.") for key in weights) else ""
    adopted: dict[str, Tensor] = {}
    unknown = []
    for key, tensor in weights.items():
        name = _rename(key.removeprefix(prefix)) if key.startswith(prefix) else None
        if name is not None:
            tensor = tensor.flatten() if name.endswith(".gate_scale") else tensor  # (1, H, 1, 1) -> (H,)
            adopted[name] = tensor.float().contiguous()
        elif not LEFT_OUT.match(key.removeprefix(prefix)) and not (prefix and HEADS.match(key)):
            unknown.append(key)
    if unknown:
        raise StoreError(
            f"{teacher_dir}: unknown tensors in model.safetensors: {_listed(unknown)}; not a plain {family}"
        )
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Encoder(shape).state_dict().items()}
    if differing := sorted(set(expected) ^ set(adopted)):
        raise StoreError(f"{teacher_dir}: config.json and model.safetensors disagree about {_listed(differing)}")
    for name, size in expected.items():
        if tuple(adopted[name].shape) != size:
            raise StoreError(f"{teacher_dir}: {name} is {tuple(adopted[name].shape)} but config.json says {size}")
    return adopted


def read_shape(teacher_dir: Path, normalise: bool = False) -> EncoderShape:
    """The trunk's shape from config.json; whether waveforms are normalised is not written there.

    Raises:
        StoreError: a family or an option that the encoder does not compute, or a value that is left out.
    """
    path = Path(teacher_dir) / "config.json"
    config: dict[str, Any] = read_json(path)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise StoreError(f"{path}: model_type is {family!r}; a student can adopt from {', '.join(FAMILIES)}")
    for key, wanted in {
        "conv_kernel": list(KERNELS),
        "conv_stride": list(STRIDES),
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "conv_pos_batch_norm": False,
        "layer_norm_eps": 1e-5,
    }.items():
        if config.get(key, wanted) != wanted:
            raise StoreError(f"{path}: {key} is {config[key]!r}; the student's encoder only computes {wanted!r}")
    needed = NEEDED + (NEEDED_OF_WAVLM if family == "wavlm" else ())
    if missing := [key for key in needed if key not in config]:
        raise StoreError(f"{path} leaves out {', '.join(missing)}; `decant teacher` writes it out: run it again")
    blocks, heads = config["num_hidden_layers"], config["num_attention_heads"]
    return EncoderShape(
        conv_channels=tuple(config["conv_dim"]),
        conv_spans=None,
        conv_bias=config["conv_bias"],
        front_norm=config["feat_extract_norm"],
        feature_norm=config.get("feat_proj_layer_norm", True),
        feature_norm_width=None,
        feature_scale=False,
        projection=True,
        normalise=normalise,
        width=config["hidden_size"],
        heads=(heads,) * blocks,
        head_width=config["hidden_size"] // heads,
        ffn=(config["intermediate_size"],) * blocks,
        position_bias=PositionBias(
            buckets=config["num_buckets"], max_distance=config["max_bucket_distance"], heads=heads
        )
        if family == "wavlm"
        else None,
        kept_heads=None,
        shares_attention=None,
        position_kernel=config["num_conv_pos_embeddings"],
        position_groups=config["num_conv_pos_embedding_groups"],
        pre_norm=config["do_stable_layer_norm"],
        dropout=DropoutRates(
            features=config.get("feat_proj_dropout", 0.0),
            hidden=config["hidden_dropout"],
            attention=config["attention_dropout"],
            activation=config["activation_dropout"],
        ),
    )


def save_adopted(file: Path, weights: dict[str, Tensor], shape: EncoderShape | None, teacher: str) -> None:
    """Write what `adopt` gave, and with it what the trunk computes beside its tensors' sizes; the same gives the same bytes.

    Args:
        file: the safetensors file to write.
        weights: none where no student computes what they mean.
        shape: of the trunk, as `read_shape` gives it; None without weights.
        teacher: digest of the teacher.
    """
    described = {"digest": teacher, "computes": None if shape is None else _computes(shape)}
    # under one key: safetensors writes several in another order each time
    metadata = {"teacher": json.dumps(described, sort_keys=True)}
    file.write_bytes(save(weights, metadata=metadata))  # save_file hides what the disk refuses


@torch.no_grad()
def copy_adopted(encoder: Encoder, files: Sequence[Path], final_norm: bool) -> None:
    """Copy an adopted trunk, or the mean of several, into a student: its front, projection, positions and first blocks.

    A student takes what its shape has a place for. Without `feature_norm` it leaves that norm out, with fewer blocks the
    later ones; without `position_bias` a WavLM's blocks lose their relative bias and attend without it, as in
    RobustDistiller; a block that shares an attention map has no use for its queries and keys.

    Args:
        encoder: the student, whose weights are overwritten.
        files: what `save_adopted` wrote. Several are averaged tensor by tensor in float64 and rounded once.
        final_norm: whether the encoder's own norm comes along (DPHuBERT's full copy) or stays as it is (DistilHuBERT,
            where it starts at 1 and 0).

    Raises:
        SettingsError: a tensor of the student is not in a file or has another shape there, or the student would compute
            something else with it.
        StoreError: a file is missing or damaged, or does not say what its trunk computes.
    """
    adopted = [(file, _read_weights(Path(file))) for file in files]
    student = encoder.state_dict()
    taken = {name: tensor for name, tensor in student.items() if final_norm or not name.startswith("norm.")}
    if all("feature_scale" not in weights for _, weights in adopted):
        taken.pop("feature_scale", None)  # of a pruned student alone; 1 elsewhere
    for name, tensor in taken.items():
        for file, weights in adopted:
            _check_fits(file, weights, name, tensor)
    for file, weights in adopted:
        spare = ("blocks.", "feature_norm.", "position_bias.")
        if unused := [name for name in weights if name not in student and not name.startswith(spare)]:
            raise SettingsError(f"{file} has {_listed(unused)}, which the student's shape has no place for")
    _check_computes(encoder.shape, {file: _read_computes(Path(file)) for file in files})
    for name, tensor in taken.items():
        total = torch.zeros(tensor.shape, dtype=torch.float64)
        for _, weights in adopted:
            total += weights[name]
        tensor.copy_(total / len(adopted))


def _computes(shape: EncoderShape) -> dict[str, Any]:
    """What changes the numbers of an encoder and no size of its tensors, by the names of the settings."""
    facts: dict[str, Any] = {
        "conv_spans": [list(span) for span in shape.spans],
        "normalise": shape.normalise,
        "head_width": shape.head_width,
        "pre_norm": shape.pre_norm,
    }
    if shape.feature_norm:
        facts["feature_norm_width"] = shape.feature_norm_width or shape.conv_channels[-1]
    if shape.position_bias is not None:
        kept = [list(columns) for columns in shape.kept_heads or ()]
        facts["kept_heads"] = None if all(columns == list(range(len(columns))) for columns in kept) else kept
        facts["position_bias.max_distance"] = shape.position_bias.max_distance
    return facts


def _check_computes(shape: EncoderShape, trunks: dict[Path, dict[str, Any]]) -> None:
    """Compare what the student has a place for: one without `position_bias` does not ask for its distances."""
    for name, here in _computes(shape).items():
        for file, there in trunks.items():
            if name not in there:
                raise StoreError(f"{file} does not say its trunk's {name}; run `decant teacher` again")
        (first, wanted), *others = ((file, there[name]) for file, there in trunks.items())
        for file, other in others:
            if other != wanted:
                raise SettingsError(
                    f"{name} is {json.dumps(wanted)} in {first} but {json.dumps(other)} in {file}: their mean computes "
                    "neither; start from teachers that agree"
                )
        if here != wanted:
            remedy = f"set {name} to {json.dumps(wanted)}"
            if name == "head_width":
                remedy += f" and heads to {[heads * here // wanted for heads in shape.heads]}"
            raise SettingsError(
                f"{name} is {json.dumps(wanted)} in {first} but {json.dumps(here)} by the student's shape, which would "
                f"compute something else with these weights; {remedy}, or its init to {{kind: random}}"
            )


def _check_fits(file: Path, weights: dict[str, Tensor], name: str, tensor: Tensor) -> None:
    remedy = "change the student's shape, or its init to {kind: random}"
    if name not in weights:
        raise SettingsError(f"{file} has no {name}, which the student's shape asks for; {remedy}")
    if weights[name].shape != tensor.shape:
        there, here = tuple(weights[name].shape), tuple(tensor.shape)
        raise SettingsError(f"{name} is {there} in {file} but {here} by the student's shape; {remedy}")


def _rename(key: str) -> str | None:
    for pattern, name in RENAMED:
        if match := re.match(pattern, key):
            return match.expand(name) + key[match.end() :]
    return None


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise StoreError(f"{path} does not exist; write it with `decant teacher` (or `dvc repro`)")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise StoreError(f"{path} is damaged ({error}); delete it and run `decant teacher` again") from error


def _read_computes(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    try:
        computes = json.loads(metadata.get("teacher", ""))["computes"]
    except (ValueError, TypeError, KeyError):
        computes = None
    if not isinstance(computes, dict):
        raise StoreError(
            f"{path} does not say what its trunk computes beside its sizes (an older version wrote it); run "
            "`decant teacher` again"
        )
    return computes


def _listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
