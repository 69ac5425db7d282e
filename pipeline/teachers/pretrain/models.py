"""The model that is trained: settings, or another teacher, in; a transformers model out; and its Hugging Face folder."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from cache.errors import SettingsError
from cache.publish import read_json, write_json
from pipeline.teachers.families import FAMILIES, build_model
from pipeline.teachers.pinned import CONFIG, PREPROCESSOR, WEIGHTS, Pinned, load_pinned, preprocessor
from pipeline.teachers.pretrain.settings import MaskedUnits, PretrainParams
from pipeline.teachers.units import LayerUnits

SCRATCH = "scratch"


class Start(NamedTuple):
    """A teacher to go on from."""

    pinned: Pinned
    config: dict[str, Any]
    weights: dict[str, Tensor]


def open_start(path: Path | None) -> Start | None:
    """The teacher in a pinned folder; None for {"model": "scratch"}, which is no teacher.

    Raises:
        SettingsError: a file that says something else.
        StoreError: a folder that is missing, damaged or not ours.
    """
    if path is None:
        return None
    if path.is_dir():
        return Start(*load_pinned(path))
    if (found := read_json(path)) != {"model": SCRATCH}:
        raise SettingsError(
            f"{path} holds {found!r}; a teacher starts from the folder of another one, or from "
            f'{{"model": "{SCRATCH}"}} (recipes/scratch.json)'
        )
    return None


def check_start(params: PretrainParams, start: Start | None) -> None:
    """Refuse settings that do not fit what is started from.

    Raises:
        SettingsError: something taken of no teacher or nothing of one, a shape too many or too few, another family, other
            convolutions, units of a layer that is not there.
    """
    if start is None and params.takes is not None:
        raise SettingsError(
            f"takes is {params.takes!r} and there is no teacher to start from; set it to null, or starts_from"
        )
    if start is not None and params.takes is None:
        raise SettingsError("takes is null and there is a teacher to start from; choose model or convolutions")
    if params.takes == "model" and params.shape is not None:
        raise SettingsError("shape: the model that is taken has one; set it to null")
    if params.takes != "model" and params.shape is None:
        raise SettingsError("shape is null and no whole model is taken; give a shape")
    if start is not None and params.takes == "model" and start.pinned.family != params.family:
        raise SettingsError(f"family is {params.family!r} and the teacher that it starts from is {start.pinned.family}")
    if start is not None and params.takes == "convolutions":
        check_convolutions(params, start)
    if isinstance(params.objective, MaskedUnits):
        whole = start if params.takes == "model" else None
        blocks = (
            params.shape.layers if params.shape is not None else whole.pinned.layers - 1 if whole is not None else 0
        )
        check_units(params.objective, blocks, whole)


def check_convolutions(params: PretrainParams, start: Start) -> None:
    """Refuse convolutions that are not those of a new model."""
    assert params.shape is not None
    wanted = {"conv_dim": list(params.shape.conv_channels), "conv_bias": False, "feat_extract_norm": "group"}
    found = {key: start.config.get(key) for key in wanted}
    if found != wanted:
        raise SettingsError(
            f"takes: the convolutions of the teacher to start from are {found} and these are {wanted}; set shape.conv_channels "
            "to its channels; those with bias or layer norm can be taken with the whole model alone"
        )


def check_units(objective: MaskedUnits, blocks: int, start: Start | None) -> None:
    """Refuse units of a layer that is not there, or that nothing has trained yet."""
    for number, iteration in enumerate(objective.iterations):
        where = f"objective.iterations[{number}].units"
        if not isinstance(iteration.units, LayerUnits):
            continue
        if number == 0 and start is None:
            raise SettingsError(f"{where}: no model has been trained yet; begin with {{kind: mfcc}}")
        if iteration.units.layer > blocks:
            raise SettingsError(f"{where}.layer is {iteration.units.layer} and the model has layers 0 to {blocks}")


def first_model(params: PretrainParams, start: Start | None) -> nn.Module:
    """The model before its first update: new weights from torch's generator, those of `start`, or new ones behind its front."""
    if start is not None and params.takes == "model":
        return continued_model(params, start)
    model: Any = new_model(params)
    if start is not None:
        name = "feature_extractor."
        front = {k.removeprefix(name): v for k, v in start.weights.items() if k.startswith(name)}
        model.feature_extractor.load_state_dict(front)
    whole: nn.Module = model
    return whole


def new_model(params: PretrainParams) -> nn.Module:
    """A model with fresh weights.

    Raises:
        SettingsError: a shape that transformers refuses.
    """
    shape = params.shape
    assert shape is not None  # check_start
    if shape.width % shape.heads or shape.width % shape.position_groups:
        raise SettingsError(
            f"shape.width {shape.width} must be a multiple of heads ({shape.heads}) and position_groups ({shape.position_groups})"
        )
    family = FAMILIES[params.family]
    model: nn.Module = family.model(
        family.config(
            conv_dim=list(shape.conv_channels),
            hidden_size=shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            intermediate_size=shape.ffn,
            num_conv_pos_embeddings=shape.position_kernel,
            num_conv_pos_embedding_groups=shape.position_groups,
            feat_extract_norm="group",
            do_stable_layer_norm=False,
            feat_proj_dropout=0.0,
            hidden_dropout=params.dropout,
            attention_dropout=params.dropout,
            activation_dropout=0.0,
            layerdrop=0.0,
            mask_time_prob=params.mask_prob,
            mask_time_length=params.mask_frames,
        )
    )
    return model


def continued_model(params: PretrainParams, start: Start) -> nn.Module:
    """The teacher to go on from, with the dropout of these settings and none of its own masking."""
    training = {
        "feat_proj_dropout": 0.0,
        "hidden_dropout": params.dropout,
        "attention_dropout": params.dropout,
        "activation_dropout": 0.0,
        "layerdrop": 0.0,
        "apply_spec_augment": True,  # or transformers leaves out the spans it is given
        "mask_feature_prob": 0.0,
    }
    model = build_model(start.config | training, "starts_from", "cpu")
    missing, unexpected = model.load_state_dict(start.weights, strict=False)
    # what stands for hidden frames begins anew where the published trunk comes without it
    assert set(missing) <= {"masked_spec_embed"}, missing
    assert not unexpected, unexpected  # pinning accounts for every tensor
    return model


def write_model(out: Path, model: Any, start: Start | None, normalise: bool) -> None:
    """A Hugging Face folder of the trained trunk; a continued one has the configuration it started with."""
    if start is None:
        transformers.utils.logging.disable_progress_bar()  # one file, nothing to watch
        model.save_pretrained(out)
        transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise, return_attention_mask=True).save_pretrained(out)
        return
    write_json(out / CONFIG, start.config)
    write_json(out / PREPROCESSOR, preprocessor(start.pinned.family, model.config, normalise))
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, out / WEIGHTS, metadata={"format": "pt"})


@torch.inference_mode()
def layer_of(model: Any, wave: Any, layer: int) -> Any:
    """Hidden state `layer` of one recording, as transformers counts them (in pre-norm models the last has its norm)."""
    return model(wave[None], output_hidden_states=True).hidden_states[layer][0].float().cpu().numpy()
