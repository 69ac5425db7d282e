"""What a person says about speech recognition: the settings of its head, its training and its beam search."""

from typing import Literal

from pydantic import Field

from pipeline.seeds import Seeds
from pipeline.tasks.beam import BeamParams
from pipeline.tasks.blstm import BlstmParams
from pipeline.tasks.masking import MaskParams


class AsrParams(BlstmParams, frozen=True, extra="forbid"):
    """How the head of speech recognition is made and trained; the same for every model."""

    normalise_layers: bool
    """LayerNorm without affine over every frame of every layer before the sum; SUPERB: false."""
    characters: Literal["superb", "corpus"]
    """A to Z, apostrophe and space, as in SUPERB, or all that the training texts have."""
    drop: str
    """Characters of the texts that are not spoken and are left out, such as `.,;:?!`; empty where there are none."""
    masks: MaskParams | None
    """SpecAugment on the weighted sum, while the head trains; SUPERB has it."""
    lrs: tuple[float, ...] = Field(min_length=1)
    """Learning rates to try with the first seed; the best on dev is trained with the others. SUPERB's default: 0.0001."""
    seeds: Seeds
    """Each seed starts the head and its dropout; the order of the examples is drawn from the first. The score is their mean."""
    steps: int = Field(ge=1)
    """Updates of every run; SUPERB: 200 000."""
    batch: int = Field(ge=1)
    """Utterances in an update; SUPERB: 32."""
    clip_norm: float | None = Field(gt=0)
    """Gradient norm above which an update is scaled down; SUPERB: 1."""
    validate_every: int = Field(ge=1)
    """Updates between two looks at the dev split; SUPERB: 2000."""
    patience: int | None = Field(ge=1)
    """Validations without a better one after which a run is over; null trains for all steps."""
    beam: BeamParams | None
    """A second score, of a beam search with a language model; null leaves it out, as SUPERB's ASR without LM."""
