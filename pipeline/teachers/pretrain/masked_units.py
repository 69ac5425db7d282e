"""HuBERT's objective: waveforms, hidden frames and units in, the loss of naming the units of hidden frames out."""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pipeline.teachers.objective import Prediction
from pipeline.teachers.pretrain.settings import MaskedUnits


class MaskedPrediction(nn.Module):
    """A HuBERT or a WavLM, and the head that names the unit of each frame; the head is left behind after training."""

    def __init__(self, model: Any, params: MaskedUnits, clusters: int) -> None:
        super().__init__()
        self.model, self.params = model, params
        self.projection = nn.Linear(model.config.hidden_size, params.codeword_width)
        self.codewords = nn.Parameter(torch.randn(clusters, params.codeword_width))

    def forward(
        self, waves: Float[Tensor, "B S"], hidden: Bool[Tensor, "B T"], units: Int64[Tensor, "B T"]
    ) -> Prediction:
        """Predict the units of the hidden frames (eq. 3: cosine to each codeword over the temperature)."""
        states = self.model(waves, mask_time_indices=hidden).last_hidden_state
        with torch.autocast(waves.device.type, enabled=False):  # the loss is float32 whatever the model computed in
            states = states.float()
            logits, wanted = self.score(states[hidden]), units[hidden]
            loss = nn.functional.cross_entropy(logits, wanted)
            if self.params.unmasked_weight and not bool(hidden.all()):
                seen = nn.functional.cross_entropy(self.score(states[~hidden]), units[~hidden])
                loss = loss + self.params.unmasked_weight * seen
        return Prediction(loss, (logits.argmax(1) == wanted).float().mean())

    def score(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N K"]:
        """Logits of every unit."""
        projected, codewords = (
            nn.functional.normalize(self.projection(states), dim=1),
            nn.functional.normalize(self.codewords, dim=1),
        )
        return projected @ codewords.T / self.params.temperature
