"""Embeddings and who spoke in, the additive margin softmax loss out (Wang et al. 2018, "Additive margin softmax").

With cos_k the cosine between an embedding and the vector of speaker k, and y the speaker who spoke,

    L = - log( exp(s (cos_y - m)) / ( exp(s (cos_y - m)) + sum_{k != y} exp(s cos_k) ) )

The true speaker has to win by the margin m, so that voices never heard, which have no vector here, fall apart as well.
m = 0 is a softmax over cosines. SUPERB has s = 30 and m = 0.4.
"""

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


class AmSoftmax(nn.Module):
    """A vector for each of K speakers, learned with the embeddings and left behind with the training speakers."""

    def __init__(self, width: int, num_speakers: int, scale: float, margin: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale, self.margin = scale, margin
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_speakers, width), generator=generator))

    def cosines(self, embeddings: Float[Tensor, "B E"]) -> Float[Tensor, "B K"]:
        """How near each embedding is to each speaker, in [-1, 1]: lengths do not count."""
        return nn.functional.normalize(embeddings, dim=-1) @ nn.functional.normalize(self.weight, dim=-1).T

    def forward(self, embeddings: Float[Tensor, "B E"], speakers: Int64[Tensor, " B"]) -> Float[Tensor, ""]:
        """The mean loss over the batch."""
        cosines = self.cosines(embeddings)
        handicap = nn.functional.one_hot(speakers, cosines.shape[-1]).to(cosines) * self.margin
        return nn.functional.cross_entropy(self.scale * (cosines - handicap), speakers)
