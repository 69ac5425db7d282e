"""Waveforms of one task in, what its head makes of them out: one encoder that both tasks share, a head for each.

The keyword head is SUPERB's (`pipeline.tasks.heads.ProbeHead`), applied to the mean of every layer, which is the same
function. The speaker head gives an embedding; the vectors of training speakers, which its loss needs, are left behind.
"""

from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int64
from safetensors.torch import load_file
from torch import Tensor, nn

from cache.publish import read_json
from pipeline.finetune.settings import FinetuneParams, KeywordParams, SpeakerParams, XVectorPooling
from pipeline.padding import frame_mask, frames_of_samples
from pipeline.student.checkpoint import load_student
from pipeline.student.encoder import Encoder, Hidden
from pipeline.tasks.heads import ProbeHead
from pipeline.tasks.margin import AmSoftmax
from pipeline.tasks.xvector import XVector, start, statistics


class KeywordHead(nn.Module):
    """Hidden states to one score for each keyword."""

    def __init__(self, params: KeywordParams, states: int, width: int, classes: int, generator: torch.Generator):
        super().__init__()
        self.layers, self.width = params.layers, classes
        self.head = ProbeHead(
            states if params.layers == "weighted" else 1, width, params.head_width, classes, generator
        )

    def forward(self, states: list[Float[Tensor, "B T D"]], counts: Int64[Tensor, " B"]) -> Float[Tensor, "B K"]:
        """Scores of each utterance, whose first `counts` frames are its own."""
        valid = frame_mask(counts, states[0].shape[1])
        return self.head.pooled(torch.stack([_mean(state, valid) for state in states], dim=1))

    def loss(self, scores: Float[Tensor, "B K"], classes: Int64[Tensor, " B"]) -> Float[Tensor, ""]:
        """Mean cross entropy."""
        return nn.functional.cross_entropy(scores, classes)


class SpeakerHead(nn.Module):
    """Hidden states to the embedding of a voice."""

    def __init__(self, params: SpeakerParams, states: int, width: int, speakers: int, generator: torch.Generator):
        super().__init__()
        self.layers, self.width = params.layers, params.embedding
        self.layer_scores = nn.Parameter(torch.zeros(states if params.layers == "weighted" else 1))
        self.project = nn.Linear(width, params.head_width)
        start(self.project, 1.0, generator)
        self.xvector: XVector | None = None
        self.embed: nn.Linear | None = None
        if isinstance(params.pooling, XVectorPooling):
            pooling = params.pooling
            self.xvector = XVector(
                params.head_width, pooling.channels, pooling.pooled_width, params.embedding, generator
            )
        else:
            self.embed = nn.Linear(2 * params.head_width, params.embedding)
            start(self.embed, 1.0, generator)
        self.margin = AmSoftmax(params.embedding, speakers, params.scale, params.margin, generator)

    def forward(self, states: list[Float[Tensor, "B T D"]], counts: Int64[Tensor, " B"]) -> Float[Tensor, "B E"]:
        """The embedding of each utterance, whose first `counts` frames are its own."""
        weights = self.layer_scores.softmax(0)
        mixed = sum((w * state for w, state in zip(weights[1:], states[1:], strict=True)), weights[0] * states[0])
        frames = self.project(mixed)
        if self.xvector is not None:
            embeddings: Tensor = self.xvector(frames, counts)
            return embeddings
        assert self.embed is not None
        return self.embed(statistics(frames.relu().mT, counts))

    def loss(self, embeddings: Float[Tensor, "B E"], classes: Int64[Tensor, " B"]) -> Float[Tensor, ""]:
        """Mean additive margin softmax over training speakers."""
        vectors = embeddings if self.xvector is None else self.xvector.training_vectors(embeddings)
        loss: Tensor = self.margin(vectors, classes)
        return loss


class Model(nn.Module):
    """An encoder and the heads of the tasks that are learned."""

    def __init__(
        self, params: FinetuneParams, encoder: Encoder, classes: dict[str, int], generator: torch.Generator
    ) -> None:
        """Draw new heads.

        Args:
            params: the settings.
            encoder: whose hidden states heads read.
            classes: of each task that is learned, how many keywords or speakers.
            generator: draws the heads.
        """
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleDict()
        states, width = encoder.shape.num_blocks + 1, encoder.shape.width
        if params.tasks.kws is not None:
            self.heads["kws"] = KeywordHead(params.tasks.kws, states, width, classes["kws"], generator)
        if params.tasks.sv is not None:
            self.heads["sv"] = SpeakerHead(params.tasks.sv, states, width, classes["sv"], generator)

    def forward(
        self,
        task: str,
        waves: Float[Tensor, "B S"],
        samples: Int64[Tensor, " B"],
        hide: Hidden | None = None,
        moves: bool = True,
    ) -> Float[Tensor, "B _"]:
        """Scores of keywords (B, K), or embeddings of voices (B, E).

        Args:
            task: kws or sv.
            waves: padded, in [-1, 1).
            samples: of each.
            hide: what of the projected features is set to zero.
            moves: whether gradients reach the encoder.
        """
        with torch.set_grad_enabled(moves and torch.is_grad_enabled()):
            states = self.encoder(waves, samples, None, hide)
        head = self.head(task)
        read = [self.encoder.read_out(states)] if head.layers == "last" else states.hidden
        with torch.autocast(waves.device.type, enabled=False):
            made: Tensor = head([state.float() for state in read], frames_of_samples(samples))
        return made

    def head(self, task: str) -> KeywordHead | SpeakerHead:
        """Of a task."""
        head = self.heads[task]
        assert isinstance(head, KeywordHead | SpeakerHead)
        return head

    @property
    def left_behind(self) -> list[nn.Module]:
        """Parts of heads that training alone needs: what tells its speakers apart."""
        parts: list[nn.Module] = []
        for head in self.heads.values():
            if isinstance(head, SpeakerHead):
                parts += [head.margin, *([] if head.xvector is None else [head.xvector.tell_apart])]
        return parts


def load_tuned(folder: Path) -> Model:
    """A fine-tuned model with its heads, in evaluation mode, out of the folder that `decant finetune` wrote.

    Raises:
        StoreError: a file is missing or has changed.
    """
    encoder, described = load_student(folder), read_json(folder / "shape.json")
    params = FinetuneParams.model_validate(described["settings"])
    classes = {task: len(names) for task, names in described["classes"].items()}
    model = Model(params, encoder, classes, torch.Generator())
    model.heads.load_state_dict(load_file(folder / "heads.safetensors"))
    return model.eval()


def _mean(state: Float[Tensor, "B T D"], valid: Bool[Tensor, "B T"]) -> Float[Tensor, "B D"]:
    """Of the valid frames; what stands in the padding is never looked at."""
    kept = torch.where(valid[..., None], state, 0.0)
    return kept.sum(1) / valid.sum(1).to(state.dtype)[:, None]
