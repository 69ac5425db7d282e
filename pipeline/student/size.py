"""The size of an encoder: a shape and how many units each layer has in, its number of parameters out.

The counts may be expectations: then so is the size, and it has a gradient. For whole numbers it is exactly what
`count_parameters` says of the encoder that `compact` builds.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.student.gates import UNITS, Counts, Gates, Unit, sizes_of
from pipeline.student.shape import EncoderShape


def parameters(shape: EncoderShape, counts: Counts, scaled: bool) -> Float[Tensor, ""]:
    """Parameters of an encoder of this shape, but with other numbers of units.

    Products of two counts (a convolution's channels in and out) are right in expectation too, because gates of different
    layers are independent.

    Args:
        shape: everything else.
        counts: channels, heads and units.
        scaled: whether the features are scaled before their norm, as they are after channels were pruned.
    """
    width, blocks = shape.width, shape.num_blocks
    conv, heads, ffn, attends = counts
    kernels = conv.new_tensor([kernel for kernel, _ in shape.spans])
    size = (torch.cat([conv.new_ones(1), conv[:-1]]) * conv * kernels).sum()
    size = size + shape.conv_bias * conv.sum()
    size = size + 2 * (conv.sum() if shape.front_norm == "layer" else conv[0])
    size = size + conv[-1] * (2 * shape.feature_norm + scaled) + shape.projection * (conv[-1] + 1) * width
    size = (
        size + shape.position_kernel * (width * (width // shape.position_groups) + 1) + width
    )  # positional convolution
    size = size + 2 * width + blocks * 4 * width  # norms
    inner = heads * shape.head_width
    own = conv.new_tensor([not shape.shares(block) for block in range(blocks)])  # has query and key, and a gate
    size = size + (inner * (width + 1) * (1 + 2 * own) + (inner + 1) * width).sum()
    if (bias := shape.position_bias) is not None:
        gate = 8 * (width // bias.heads + 1)  # the linear layer; every head has a scale beside it
        size = size + bias.buckets * bias.heads + (own * (attends * gate + heads)).sum()
    return size + (ffn * (width + 1) + (ffn + 1) * width).sum()


def full_parameters(shape: EncoderShape) -> int:
    """Parameters of an encoder of this shape."""
    return int(parameters(shape, _full_counts(shape), shape.feature_scale))


def smallest_parameters(shape: EncoderShape, units: Sequence[Unit]) -> int:
    """What is left without any units of these kinds, but for one channel of each convolution."""
    full = _full_counts(shape)
    counts = Counts(
        conv=torch.ones_like(full.conv) if "conv" in units else full.conv,
        heads=torch.zeros_like(full.heads) if "heads" in units else full.heads,
        ffn=torch.zeros_like(full.ffn) if "ffn" in units else full.ffn,
        attends=torch.zeros_like(full.attends) if "heads" in units else full.attends,
    )
    return int(parameters(shape, counts, scale_follows(shape, units)))


def expected_parameters(shape: EncoderShape, gates: Gates) -> Float[Tensor, ""]:
    """Parameters that the gates leave on average; differentiable."""
    return parameters(shape, gates.counts(gates.keep()), scale_follows(shape, gates.units))


def expected_sparsity(shape: EncoderShape, gates: Gates) -> Float[Tensor, ""]:
    """s = 1 - E[parameters] / parameters: the share that goes; differentiable."""
    return 1 - expected_parameters(shape, gates) / full_parameters(shape)


def scale_follows(shape: EncoderShape, units: Sequence[Unit]) -> bool:
    """Whether an encoder in which these kinds were pruned scales its features before their norm.

    The soft gates of the last convolution's channels can go into no weights when a LayerNorm comes next.
    """
    return shape.feature_scale or ("conv" in units and shape.feature_norm)


@torch.no_grad()
def fit(shape: EncoderShape, gates: Gates, size: int) -> Bool[Tensor, " N"]:
    """Which units stay so that the encoder has as nearly `size` parameters as it can have.

    DPHuBERT rounds layer by layer, and in a small model one head is more than a percent. Here all gates move together
    until this is the size to expect (not at all, if training has led it there), are rounded layer by layer, and then the
    finest kind settles the rest: the least likely of its units go, or the likeliest come back. Where there are too few of
    them, those of the next kind follow.
    """
    kept = gates.kept(_shift(shape, gates, size))
    scaled = scale_follows(shape, gates.units)

    def size_of(mask: Bool[Tensor, " N"]) -> int:
        return int(parameters(shape, gates.counts(mask.to(gates.log_alpha.dtype)), scaled))

    too_big = size_of(kept) > size
    likely = (gates.log_alpha if too_big else -gates.log_alpha).argsort(stable=True)
    finest_first = []
    for unit in (unit for unit in ("ffn", "conv", "heads") if unit in gates.units):
        movable = torch.cat([part for kind in gates.units for part in _movable(gates, kind, kind == unit)])
        finest_first.append(likely[(movable & (kept == too_big))[likely]])
    order = torch.cat(finest_first)

    def after(moves: int) -> Bool[Tensor, " N"]:
        mask = kept.clone()
        mask[order[:moves]] = not too_big
        return mask

    few, many = 0, len(order)  # the size is monotone in the moves: bisect for the last one that does not overshoot
    while few < many:
        middle = (few + many + 1) // 2
        reached = size_of(after(middle))
        few, many = (middle, many) if (reached >= size if too_big else reached <= size) else (few, middle - 1)
    candidates = [after(few), after(min(few + 1, len(order)))]
    return min(candidates, key=lambda mask: abs(size_of(mask) - size))


def _shift(shape: EncoderShape, gates: Gates, size: int) -> float:
    """What to add to every log_alpha so that `size` parameters are expected; the size grows with it."""
    scaled, low, high = scale_follows(shape, gates.units), -64.0, 64.0
    for _ in range(60):
        middle = (low + high) / 2
        too_small = parameters(shape, gates.counts(gates.keep(middle)), scaled) < size
        low, high = (middle, high) if too_small else (low, middle)
    return (low + high) / 2


def _movable(gates: Gates, unit: Unit, chosen: bool) -> list[Bool[Tensor, " _"]]:
    """Per layer: which units of a kind may go or come back. The likeliest channel of a convolution never goes."""
    parts = getattr(gates.values(gates.log_alpha), unit)
    movable = [torch.full_like(part, chosen, dtype=torch.bool) for part in parts]
    if unit == "conv":
        for mask, part in zip(movable, parts, strict=True):
            mask[part.argmax()] = False
    return movable


def _full_counts(shape: EncoderShape) -> Counts:
    conv, heads, ffn = (torch.tensor(sizes_of(shape, unit), dtype=torch.float64) for unit in UNITS)
    return Counts(conv, heads, ffn, (heads > 0).double())
