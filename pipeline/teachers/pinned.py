"""A pinned teacher: a trunk's configuration and weights in, one small Hugging Face folder out, and back, checked.

The folder holds config.json and model.safetensors under the names `AutoModel` expects, preprocessor_config.json, and our
teacher.json, whose digest covers all that decides a feature. Every tensor of the source is accounted for by name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cache.errors import SettingsError, StoreError
from cache.publish import digest_file, digest_json, read_json, write_json
from pipeline.teachers.families import FAMILIES, build_model, family_of
from pipeline.teachers.grid import STORE, Align

CONFIG, WEIGHTS, PREPROCESSOR, TEACHER = (
    "config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "teacher.json",
)

# What a fine-tuned or pretraining checkpoint has beside its trunk ("hubert.", "wavlm.", "wav2vec2.").
HEADS = re.compile(
    r"(lm_head|classifier|projector|layer_weights|quantizer|project_q|project_hid|tdnn|objective|final_proj)\b"
)
# Written out even where the source relies on its library's defaults, so that config.json can be read as a plain file.
ARCHITECTURE = (
    *("conv_dim", "conv_kernel", "conv_stride", "conv_bias", "feat_extract_norm", "feat_extract_activation"),
    *("feat_proj_layer_norm", "feat_proj_dropout", "hidden_size", "num_hidden_layers", "num_attention_heads"),
    *("intermediate_size", "hidden_act", "hidden_dropout", "attention_dropout", "activation_dropout", "layer_norm_eps"),
    *("num_conv_pos_embeddings", "num_conv_pos_embedding_groups", "do_stable_layer_norm"),
    *("num_buckets", "max_bucket_distance"),  # of WavLM
)
# Where the folder was made and for which library version: no part of the model.
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "auto_map", "architectures", "torch_dtype", "dtype")


@dataclass(frozen=True, slots=True)
class Pinned:
    """teacher.json: what a pinned folder holds."""

    family: str
    """A key of `families.FAMILIES`."""
    digest: str
    """SHA-256 of configuration, weights and normalisation."""
    source: dict[str, Any]
    """Where it came from, without paths of this machine."""
    normalise: bool
    """Whether each waveform is brought to zero mean and unit variance before the model."""
    layers: int
    """Layers it gives: the input of the first block, and the output of each."""
    width: int
    num_params: int
    align: Align | None = None
    """How its frames are brought to the store's; absent where they lie there already."""


def pin(
    out: Path,
    config: dict[str, Any],
    weights: Mapping[str, Tensor],
    normalise: bool,
    source: dict[str, Any],
    where: str,
    align: Align | None = None,
) -> Pinned:
    """Write the folder; `where` names the source in errors.

    Raises:
        SettingsError: a family or an option that cannot be a teacher, or frames that lie elsewhere than the store's and no
            word of how to bring them there.
        StoreError: tensors that are missing, unexpected or of another shape, by name.
    """
    family = family_of(config, where)
    check_settings(family, normalise, align, where)
    model = build_model(config, where)
    settings: Any = model.config
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    trunk = trunk_weights(weights, family, wanted, where)
    kept = {k: v for k, v in config.items() if k not in NOT_THE_MODEL}
    # what students can start from, in a few words; of other families everything, whatever the library's defaults become
    plain = family in ("hubert", "wav2vec2", "wavlm")
    spelled_out = (
        {k: getattr(settings, k) for k in ARCHITECTURE if hasattr(settings, k)}
        if plain
        else {k: v for k, v in settings.to_dict().items() if k not in NOT_THE_MODEL}
    )
    write_json(out / CONFIG, kept | spelled_out | {"architectures": [type(model).__name__]})
    save_file(trunk, out / WEIGHTS, metadata={"format": "pt"})
    write_json(out / PREPROCESSOR, preprocessor(family, settings, normalise))
    pinned = Pinned(
        family=family,
        digest=content_digest(out, normalise, align),
        source=source,
        normalise=normalise,
        layers=settings.num_hidden_layers + 1,
        width=settings.hidden_size,
        num_params=sum(tensor.numel() for name, tensor in trunk.items() if name != "masked_spec_embed"),
        align=align,
    )
    write_json(out / TEACHER, {k: v for k, v in asdict(pinned).items() if k != "align" or align is not None})
    return pinned


def check_settings(family: str, normalise: bool, align: Align | None, where: str) -> None:
    """Refuse what a family cannot be asked for.

    Raises:
        SettingsError: frames on another grid than the store's without `align`, or the reverse; normalised waveforms for a
            model that hears spectra.
    """
    grid = FAMILIES[family].grid
    if grid != STORE and align is None:
        raise SettingsError(
            f"{where}: frames of {family} lie {grid}, those of a store {STORE}: they do not pair; say how to bring them there "
            "with the source's align: linear (between the two neighbours) or nearest"
        )
    if grid == STORE and align is not None:
        raise SettingsError(f"{where}: frames of {family} are the store's already; leave out align: {align}")
    if normalise and grid != STORE:
        raise SettingsError(f"{where}: {family} hears spectra scaled its own way; set the teacher's normalise: false")


def preprocessor(family: str, settings: Any, normalise: bool) -> dict[str, Any]:
    """What transformers' own feature extractor of a family is made from."""
    described: dict[str, Any] = {"sampling_rate": 16_000, "padding_value": 0.0, "padding_side": "right"}
    if family == "whisper":
        return described | {
            "feature_extractor_type": "WhisperFeatureExtractor",
            "feature_size": settings.num_mel_bins,
            "chunk_length": settings.max_source_positions * FAMILIES[family].grid.hop // 16_000,
            "hop_length": 160,
            "n_fft": 400,
            "return_attention_mask": False,
        }
    if family == "wav2vec2-bert":
        bins = {"feature_size": 80, "num_mel_bins": 80, "stride": 2, "return_attention_mask": True}
        return described | {"feature_extractor_type": "SeamlessM4TFeatureExtractor"} | bins
    return described | {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",
        "feature_size": 1,
        "do_normalize": normalise,
        "return_attention_mask": True,
    }


def load_pinned(directory: Path) -> tuple[Pinned, dict[str, Any], dict[str, Tensor]]:
    """teacher.json, the configuration and the weights of a pinned folder.

    Raises:
        StoreError: a file is missing, or is not what was pinned.
    """
    described = read_json(directory / TEACHER)
    try:
        pinned = Pinned(**described)
    except TypeError as error:
        raise StoreError(f"{directory / TEACHER} is not ours ({error}); run `decant teacher` again") from error
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).exists():
            raise StoreError(f"{directory / name} is missing; run `decant teacher` again")
    if (found := content_digest(directory, pinned.normalise, pinned.align)) != pinned.digest:
        raise StoreError(
            f"{directory}: {CONFIG} and {WEIGHTS} have digest {found[:12]} and {pinned.digest[:12]} was pinned: "
            "one of them is damaged or was changed; run `decant teacher` again"
        )
    return pinned, read_json(directory / CONFIG), read_safetensors(directory / WEIGHTS)


def content_digest(directory: Path, normalise: bool, align: Align | None) -> str:
    """SHA-256 of all that decides a feature."""
    weights, config = digest_file(directory / WEIGHTS), digest_file(directory / CONFIG)
    aligned = {} if align is None else {"align": align}
    return digest_json({"config": config, "weights": weights, "normalise": normalise} | aligned)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of one file.

    Raises:
        StoreError: not a safetensors file, or cut short.
    """
    try:
        return load_file(path)
    except SafetensorError as error:
        raise StoreError(f"{path} is damaged ({error}); fetch it again") from error


def trunk_weights(
    weights: Mapping[str, Tensor], family: str, wanted: Mapping[str, torch.Size], where: str
) -> dict[str, Tensor]:
    """The trunk's tensors in float32 under the model's own names: heads are left out, nothing else is.

    Raises:
        StoreError: a tensor is missing, unexpected or of another shape.
    """
    known = FAMILIES[family]
    prefix = next((p for p in known.prefixes if any(key.startswith(p) for key in weights)), "")
    trunk: dict[str, Tensor] = {}
    unexpected = []
    for key, tensor in weights.items():
        name = modern_name(key.removeprefix(prefix))
        if key.startswith(prefix) and name in wanted:
            trunk[name] = tensor.float().contiguous()
        elif not HEADS.match(key) and not re.match(known.heads, key):
            unexpected.append(key)
    missing = sorted(set(wanted) - set(trunk) - {"masked_spec_embed"})  # used in pretraining alone
    shapes = [f"{n} is {tuple(trunk[n].shape)}, not {tuple(wanted[n])}" for n in trunk if trunk[n].shape != wanted[n]]
    problems = [
        f"{problem}: {listed(names)}"
        for problem, names in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes))
        if names
    ]
    if problems:
        raise StoreError(
            f"{where}: the weights are not the {family} that its configuration describes; {'; '.join(problems)}"
        )
    return dict(sorted(trunk.items()))


def modern_name(key: str) -> str:
    """Weight norm was stored as weight_g and weight_v before transformers 4.31."""
    key = re.sub(r"pos_conv_embed\.conv\.weight_g$", "pos_conv_embed.conv.parametrizations.weight.original0", key)
    return re.sub(r"pos_conv_embed\.conv\.weight_v$", "pos_conv_embed.conv.parametrizations.weight.original1", key)


def listed(names: Iterable[str]) -> str:
    """The first names, and how many more."""
    names = list(names)
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
