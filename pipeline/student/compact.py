"""Hard pruning: an encoder and what its gates let through in, a smaller encoder that computes the same out.

A unit whose gate is 0 is removed. What the others' gates let through goes into the weights that come next: of channels
into the next convolution, of heads into `out`, of feed-forward units into `ffn_down`. After the last convolution a
LayerNorm may come next, which would undo a scale of its input: there it becomes `feature_scale`, and the norm goes on
counting the channels that are gone as zeros (`feature_norm_width`).
"""

import torch
from jaxtyping import Int64
from torch import Tensor

from cache.errors import SettingsError
from pipeline.student.encoder import Encoder, GateValues
from pipeline.student.shape import EncoderShape


@torch.no_grad()
def compact(encoder: Encoder, gates: GateValues) -> Encoder:
    """The same function with fewer parameters: `compact(e, g)(x)` is `e(x, gates=g)`.

    The smaller encoder stands where the larger one did (device, training mode) and shares no memory with it.

    Args:
        encoder: stays as it is.
        gates: 0 removes a unit.

    Raises:
        SettingsError: a convolution would have no channel, or the removal would change what is computed.
    """
    _check(encoder.shape, gates)
    shape = encoder.shape
    conv, heads, ffn = ([values.detach().nonzero()[:, 0] for values in kind] for kind in gates)
    softened = shape.feature_norm and bool((gates.conv[-1] != 1).any())
    changes = {
        "conv_channels": tuple(len(index) for index in conv),
        "feature_norm_width": (shape.feature_norm_width or len(gates.conv[-1]))
        if softened
        else shape.feature_norm_width,
        "feature_scale": shape.feature_scale or softened,
        "heads": tuple(len(index) for index in heads),
        "kept_heads": _kept_heads(shape, heads),
        "ffn": tuple(len(index) for index in ffn),
    }
    smaller = EncoderShape.model_validate({**shape.model_dump(), **changes})
    weights = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    _remove_channels(weights, conv, gates.conv, smaller)
    for number, (head, unit) in enumerate(zip(heads, ffn, strict=True)):
        _remove_heads(weights, f"blocks.{number}.attention.", head, gates.heads[number], shape.head_width)
        _remove_units(weights, f"blocks.{number}.ffn_", unit, gates.ffn[number])
    parameter = encoder.norm.weight
    built = Encoder(smaller, encoder.feature_grad_mult).to(parameter.device, parameter.dtype)
    built.load_state_dict(weights)
    return built.train(encoder.training)


def _check(shape: EncoderShape, gates: GateValues) -> None:
    for number, values in enumerate(gates.conv):
        if not bool((values != 0).any()):
            raise SettingsError(
                f"pruning would leave convolution {number} without a channel; lower prune.sparsity, or leave conv out of"
                " prune.units"
            )
    if shape.front_norm == "layer" and any(bool((values != 1).any()) for values in gates.conv):
        raise SettingsError(
            "channels cannot be removed where front_norm is layer: a LayerNorm over the channels sees which are gone;"
            " leave conv out of prune.units"
        )
    if not shape.projection and bool((gates.conv[-1] != 1).any()):
        raise SettingsError(
            "channels of the last convolution cannot be removed where there is no projection: they are the width;"
            " leave conv out of prune.units"
        )
    shared = any(shape.shares_attention or ())
    if shared and any(bool((values != 1).any()) for values in gates.heads):
        raise SettingsError(
            "heads cannot be removed where blocks share attention maps (shares_attention), head by head;"
            " leave heads out of prune.units"
        )


def _kept_heads(shape: EncoderShape, heads: list[Int64[Tensor, " _"]]) -> tuple[tuple[int, ...], ...] | None:
    """Numbers of the surviving heads in WavLM's table; only its bias tells one head from another."""
    if shape.position_bias is None or (
        shape.kept_heads is None and shape.heads == tuple(len(index) for index in heads)
    ):
        return None
    before = shape.kept_heads or tuple(tuple(range(count)) for count in shape.heads)
    return tuple(tuple(numbers[i] for i in index.tolist()) for numbers, index in zip(before, heads, strict=True))


def _remove_channels(
    weights: dict[str, Tensor], kept: list[Int64[Tensor, " _"]], gates: list[Tensor], smaller: EncoderShape
) -> None:
    """Rows of each convolution and of its norm, columns of what follows."""
    for number, (index, gate) in enumerate(zip(kept, gates, strict=True)):
        for name in (f"front.{number}.{part}" for part in ("conv.weight", "conv.bias", "norm.weight", "norm.bias")):
            if name in weights:
                weights[name] = weights[name][index]
        if number + 1 < len(kept):
            follows = f"front.{number + 1}.conv.weight"
            weights[follows] = weights[follows][:, index] * gate[index, None]
    index, gate = kept[-1], gates[-1]
    weights["projection.weight"] = weights["projection.weight"][:, index]
    if smaller.feature_norm:
        for name in ("feature_norm.weight", "feature_norm.bias"):
            weights[name] = weights[name][index]
    if smaller.feature_scale:
        weights["feature_scale"] = weights.get("feature_scale", torch.ones_like(gate))[index] * gate[index]
    else:
        weights["projection.weight"] = weights["projection.weight"] * gate[index]  # all 1 if a norm comes before


def _remove_heads(
    weights: dict[str, Tensor], prefix: str, kept: Int64[Tensor, " _"], gate: Tensor, head_width: int
) -> None:
    """Rows of query, key and value, columns of `out`; without a head only the bias of `out` is left."""
    if not len(kept):
        for name in [name for name in weights if name.startswith(prefix) and name != f"{prefix}out.bias"]:
            del weights[name]
        return
    rows = (kept[:, None] * head_width + torch.arange(head_width, device=kept.device)).flatten()
    for part in ("query", "key", "value"):
        for name in (f"{prefix}{part}.weight", f"{prefix}{part}.bias"):
            if name in weights:
                weights[name] = weights[name][rows]
    weights[f"{prefix}out.weight"] = weights[f"{prefix}out.weight"][:, rows] * gate.repeat_interleave(head_width)[rows]
    if f"{prefix}gate_scale" in weights:
        weights[f"{prefix}gate_scale"] = weights[f"{prefix}gate_scale"][kept]


def _remove_units(weights: dict[str, Tensor], prefix: str, kept: Int64[Tensor, " _"], gate: Tensor) -> None:
    """Rows of `ffn_up`, columns of `ffn_down`; without a unit only the bias of `ffn_down` is left."""
    if not len(kept):
        for part in ("up.weight", "up.bias", "down.weight"):
            weights.pop(f"{prefix}{part}", None)
        return
    for name in (f"{prefix}up.weight", f"{prefix}up.bias"):
        weights[name] = weights[name][kept]
    weights[f"{prefix}down.weight"] = weights[f"{prefix}down.weight"][:, kept] * gate[kept]
