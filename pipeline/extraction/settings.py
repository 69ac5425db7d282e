"""Settings of extraction: how features are stored, what of a model is kept, and what becomes of long recordings."""

from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from cache.errors import SettingsError
from cache.frames import HOP, RATE_HZ, num_frames
from cache.names import array_name, in_order


class Calibration(BaseModel, frozen=True, extra="forbid"):
    """The sample that a codec is fitted to."""

    seconds: float = Field(gt=0)
    """Audio: 800 s are 40 000 frames."""
    seed: int = Field(ge=0)
    """Of the draw of utterances, and of codebooks."""


class Fail(BaseModel, frozen=True, extra="forbid"):
    """A recording that is too long ends the run before its first forward."""

    kind: Literal["fail"]
    """fail: name it."""
    max_sec: float = Field(gt=0)
    """Longest recording."""


class Skip(BaseModel, frozen=True, extra="forbid"):
    """Recordings that are too long are left out of the store, and counted."""

    kind: Literal["skip"]
    """skip: leave it out."""
    max_sec: float = Field(gt=0)
    """Longest recording."""


class Chunk(BaseModel, frozen=True, extra="forbid"):
    """Recordings that are too long go through the model in overlapping windows.

    A frame is then what the model gives for its window, not for the recording: the store's fingerprint says so.
    """

    kind: Literal["chunk"]
    """chunk: cut into windows."""
    max_sec: float = Field(gt=0)
    """Longest window."""
    overlap_sec: float = Field(ge=0)
    """What a window hears before and after the frames that are kept of it; recordings begin and end without."""

    @property
    def window(self) -> int:
        """Frames of a window; the last one's odd samples fit, too."""
        return num_frames(int(self.max_sec * RATE_HZ) - HOP + 1)

    @property
    def overlap(self) -> int:
        """Frames that a window hears and does not keep, at each inner edge."""
        return round(self.overlap_sec * RATE_HZ / HOP)

    @model_validator(mode="after")
    def _has_a_middle(self) -> "Chunk":
        if self.window - 2 * self.overlap < 1:
            raise ValueError(
                f"max_sec {self.max_sec:g} leaves nothing between two overlaps of {self.overlap_sec:g} s; overlap less"
            )
        return self


Long = Annotated[Fail | Skip | Chunk, Field(discriminator="kind")]


class ExtractParams(BaseModel, frozen=True, extra="forbid"):
    """How features are stored."""

    version: int
    """Raise it after a change of code that moves the features: the source files are no dependency of extraction."""
    codec: Literal["float32", "float16", "bfloat16", "int8", "mvq8", "mvq16", "mvq32"]
    """How a frame lies on disk: docs/codecs.md says what each costs and loses."""
    calibration: Calibration
    """What int8 and mvq are fitted to; the others need none."""
    chunk_frames: int = Field(gt=0)
    """Frames per checksummed chunk."""
    shard_frames: int = Field(gt=0)
    """Frames per shard file: 65 536 are about 100 MB of a 768-wide layer in float16."""
    batch_seconds: float = Field(gt=0)
    """Padded audio in one forward. Changes speed and memory, not what is computed."""
    long: Long
    """Recordings that are too long for one forward."""

    @model_validator(mode="after")
    def _whole_chunks(self) -> "ExtractParams":
        if self.shard_frames % self.chunk_frames:
            raise ValueError(
                f"shard_frames {self.shard_frames} is no multiple of chunk_frames {self.chunk_frames}; "
                f"take {-(-self.shard_frames // self.chunk_frames) * self.chunk_frames}"
            )
        return self


def _several(layers: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(layers)) < max(2, len(layers)):
        raise ValueError(f"{list(layers)} is no mean: name two layers or more, each once")
    return tuple(sorted(layers))


LayerMean = Annotated[tuple[int, ...], AfterValidator(_several)]
"""Layers whose mean is kept, or predicted, in their place."""

Layer = int | Literal["projection"] | LayerMean
"""What an array keeps: a layer (0 is the input of the first block), the projected features before positions are added to
them, or a mean of layers."""


class Keep(BaseModel, frozen=True, extra="forbid"):
    """What of a model is kept."""

    layers: Literal["all"] | tuple[Layer, ...]
    """Layer indices (0 is the input of the first block), lists of them for the mean of each list, `projection`; or all
    layers, 0 to L: the projection is none of them and is named where it is wanted."""
    select: Literal["all", "labelled"]
    """All utterances, or those with a probe label."""


def kept_arrays(keep: Keep, num_layers: int, has_projection: bool) -> list[str]:
    """The names of the arrays to keep, in order.

    Raises:
        SettingsError: a layer, or a projection, that the model does not have.
    """
    if keep.layers == "all":
        return [array_name(layer) for layer in range(num_layers)]
    for kept in keep.layers:
        if isinstance(kept, str):
            if not has_projection:
                raise SettingsError(
                    "the model has no projection before its positions; take layer 0, the input of its first block, or "
                    "leave projection out of keep.layers"
                )
            continue
        for layer in (kept,) if isinstance(kept, int) else kept:
            if not 0 <= layer < num_layers:
                raise SettingsError(
                    f"layer {layer} is not one of the model's layers 0 to {num_layers - 1}; change keep.layers"
                )
    return in_order(list({array_name(kept) for kept in keep.layers}))
