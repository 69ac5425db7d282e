"""The baseline every model must beat: waveforms in, log-mel filter bank energies out, on the models' own frame grid.

A frame is the 400 samples that a frame of the models sees, every 320 samples, so log-mel features have exactly the frame
count of the models and every probe reads both the same way.
"""

from pathlib import Path
from typing import Any

import torch
import torchaudio
from jaxtyping import Float, Int64
from pydantic import BaseModel
from torch import Tensor

from cache.frames import FIELD, HOP, RATE_HZ
from cache.publish import digest_json
from pipeline.upstream import LayersAlone


class LogMelParams(BaseModel, frozen=True, extra="forbid"):
    """What the baseline's file holds."""

    model: str
    """Always "log-mel": says what kind of model the file describes."""
    num_mels: int
    """Mel bands from 0 to 8 kHz (SUPERB's FBANK baseline has 80)."""
    floor: float
    """Added to the energies before the logarithm."""


class LogMel(LayersAlone):
    """Log-mel energies as a model of one layer."""

    def __init__(self, params: LogMelParams) -> None:
        self.params = params
        self.num_layers = 1
        self.width = params.num_mels
        # A Hann window of the field; center=False keeps frame f at samples [320 f, 320 f + 400).
        self.mel = torchaudio.transforms.MelSpectrogram(
            sample_rate=RATE_HZ, n_fft=512, win_length=FIELD, hop_length=HOP, n_mels=params.num_mels, center=False
        )

    def describe(self) -> dict[str, Any]:
        """See `Upstream`."""
        settings = self.params.model_dump()
        return {"kind": "log-mel", "digest": digest_json(settings), "layers": 1, "width": self.width, "num_params": 0}

    def layers(self, waves: Float[Tensor, "B S"], samples: Int64[Tensor, " B"]) -> list[Float[Tensor, "B T D"]]:
        """One layer (B, T, num_mels). Each frame sees its own 400 samples, so padding cannot change it."""
        # torch's STFT centres the 400-sample window in 512 points: 56 zeros on each side put it back on the grid
        framed = torch.nn.functional.pad(waves, (56, 56))
        return [torch.log(self.mel(framed).transpose(1, 2) + self.params.floor)]


def load_logmel(path: Path, device: str = "cpu") -> LogMel:
    """The baseline described by a JSON file such as recipes/logmel.json."""
    model = LogMel(LogMelParams.model_validate_json(path.read_text()))
    model.mel.to(device)
    return model
