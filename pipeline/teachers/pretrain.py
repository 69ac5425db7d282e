"""HuBERT pretraining at any size: the training recordings of a wave store in, a Hugging Face folder out.

Spans of frames are hidden and the k-means units of what they held are predicted from the rest (Hsu et al. 2021, arXiv
2106.07447). What differs from fairseq: batches are cropped to their shortest recording instead of padded, and there are
no LayerDrop and no penalty on the convolutions' output. A tiny teacher takes minutes, so there is no checkpoint: a killed
run starts again.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import transformers
from jaxtyping import Bool, Float, Int16, Int64
from pydantic import BaseModel, Field
from torch import Tensor, nn

from cache.errors import DataError, SettingsError
from cache.frames import FrameSpan, frames_of
from cache.manifest import Manifest
from cache.ragged import Store
from pipeline.padding import INT16_SCALE
from pipeline.teachers.objective import Prediction
from pipeline.teachers.units import LayerUnits, Units, cluster, mfcc

LOG_STEPS = 25


class PretrainShape(BaseModel, frozen=True, extra="forbid"):
    """Size of the model; kernels and strides are those of HuBERT Base."""

    conv_channels: tuple[int, int, int, int, int, int, int]
    """Channels of the seven convolutions (512 in Base). The first two run at 3200 and 1600 frames per second: keep them few."""
    width: int
    layers: int
    """Transformer blocks."""
    heads: int
    ffn: int
    position_kernel: int
    position_groups: int


class Iteration(BaseModel, frozen=True, extra="forbid"):
    """One round: units, then steps of masked prediction of them."""

    units: Units
    clusters: int = Field(ge=2)
    """Number of units (paper: 100, then 500)."""
    steps: int = Field(ge=1)
    restart: bool
    """Start from new weights as the paper does, or go on with those of the round before, which costs fewer steps."""


class PretrainParams(BaseModel, frozen=True, extra="forbid"):
    """A teacher of our own."""

    kind: Literal["pretrain"]
    shape: PretrainShape
    iterations: tuple[Iteration, ...] = Field(min_length=1)
    fit_frames: int
    """Frames that k-means is fitted on."""
    batch_seconds: float = Field(gt=0)
    """Audio in a batch."""
    crop_seconds: float = Field(gt=0)
    """Longer recordings are cropped at random to this."""
    lr: float
    warmup: float = Field(ge=0, lt=1)
    """Part of the steps in which the learning rate rises; after it, it falls to zero, both linearly (paper: 0.08)."""
    weight_decay: float
    clip: float
    """Largest norm of the gradient."""
    dropout: float = Field(ge=0, lt=1)
    mask_prob: float = Field(gt=0)
    """Spans x length / frames; spans overlap, so 0.8 hides about half (paper: 0.8)."""
    mask_frames: int = Field(ge=1)
    """Frames of a span (paper: 10)."""
    unmasked_weight: float = Field(ge=0)
    """Weight of the frames that were not hidden (paper: 0)."""
    codeword_width: int
    temperature: float = Field(gt=0)
    """Of the cosine between projection and codeword (paper: 0.1)."""
    seed: int


class Batch(NamedTuple):
    """Recordings of one batch, and the frames each is cropped to."""

    utterances: Int64[np.ndarray, " B"]
    frames: int


class Recordings(Sequence[Int16[np.ndarray, " _"]]):
    """The training recordings, read from the store when asked for."""

    def __init__(self, manifest: Manifest, waves: Store) -> None:
        self.waves = waves
        chosen = manifest.select(split="train")
        if not len(chosen):
            raise DataError(
                "no utterance has split train, so there is nothing to pretrain on; check prepare in params.yaml"
            )
        self.ids = [u.id for u in chosen]
        self.frames = frames_of(chosen.samples)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, u: Any) -> Any:
        return self.waves.read("wave", self.ids[u])

    def crop(self, u: int, span: FrameSpan) -> Float[Tensor, " S"]:
        """The samples of some frames, in [-1, 1)."""
        return torch.from_numpy(self.waves.read("wave", self.ids[u], span)).float() * INT16_SCALE


class MaskedPrediction(nn.Module):
    """A HuBERT, and the head that names the unit of each hidden frame; the head is left behind after training."""

    def __init__(self, model: transformers.HubertModel, params: PretrainParams, clusters: int) -> None:
        super().__init__()
        self.model, self.params = model, params
        self.projection = nn.Linear(model.config.hidden_size, params.codeword_width)
        self.codewords = nn.Parameter(torch.randn(clusters, params.codeword_width))

    def forward(
        self, waves: Float[Tensor, "B S"], hidden: Bool[Tensor, "B T"], units: Int64[Tensor, "B T"]
    ) -> Prediction:
        """Predict the units of the hidden frames (eq. 3: cosine to each codeword over the temperature)."""
        states = self.model(waves, mask_time_indices=hidden).last_hidden_state
        logits, wanted = self.score(states[hidden]), units[hidden]
        loss = nn.functional.cross_entropy(logits, wanted)
        if self.params.unmasked_weight:
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


def pretrain(
    params: PretrainParams,
    manifest: Manifest,
    waves: Store,
    out: Path,
    on_progress: Callable[[float, str], None] = lambda seconds, note: None,
) -> None:
    """Train on split train and write the model to the folder `out`; the same seed, threads and machine give the same bytes.

    Args:
        params: the settings.
        manifest: which recordings there are.
        waves: their samples.
        out: an existing folder.
        on_progress: called with the seconds of audio trained on since the last call, and a note.

    Raises:
        DataError: no training recording.
        SettingsError: settings that do not fit each other.
    """
    check_iterations(params)
    recordings = Recordings(manifest, waves)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(params.seed)
        model = new_model(params)
        for number, iteration in enumerate(params.iterations):
            on_progress(0.0, f"round {number + 1}: {iteration.clusters} units of {describe_units(iteration)}")
            units = make_units(params, iteration, recordings, model)
            if iteration.restart and number:
                model = new_model(params)
            for seconds, note in train_round(params, iteration, recordings, units, model, number):
                on_progress(seconds, f"round {number + 1}: {note}")
    transformers.utils.logging.disable_progress_bar()  # one file, nothing to watch
    model.save_pretrained(out)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=False, return_attention_mask=True).save_pretrained(out)


def audio_seconds(params: PretrainParams) -> float:
    """About how much audio the rounds train on: what progress is counted in."""
    return params.batch_seconds * sum(iteration.steps for iteration in params.iterations)


def check_iterations(params: PretrainParams) -> None:
    """Refuse rounds that cluster a layer which is not there."""
    for number, iteration in enumerate(params.iterations):
        if not isinstance(iteration.units, LayerUnits):
            continue
        if number == 0:
            raise SettingsError("iterations[0].units: no model has been trained yet; begin with {kind: mfcc}")
        if iteration.units.layer > params.shape.layers:
            raise SettingsError(
                f"iterations[{number}].units.layer is {iteration.units.layer} and the model has layers 0 to {params.shape.layers}"
            )


def describe_units(iteration: Iteration) -> str:
    """What is clustered, in words."""
    return f"layer {iteration.units.layer}" if isinstance(iteration.units, LayerUnits) else "MFCCs"


def new_model(params: PretrainParams) -> transformers.HubertModel:
    """A HuBERT with fresh weights.

    Raises:
        SettingsError: a shape that transformers refuses.
    """
    shape = params.shape
    if shape.width % shape.heads or shape.width % shape.position_groups:
        raise SettingsError(
            f"shape.width {shape.width} must be a multiple of heads ({shape.heads}) and position_groups ({shape.position_groups})"
        )
    config = transformers.HubertConfig(
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
    return transformers.HubertModel(config)


def make_units(
    params: PretrainParams, iteration: Iteration, recordings: Recordings, model: transformers.HubertModel
) -> list[Int64[np.ndarray, " _"]]:
    """The unit of every frame that this round predicts."""

    @torch.inference_mode()
    def layer(wave: Int16[np.ndarray, " _"]) -> Any:
        assert isinstance(iteration.units, LayerUnits)
        states = model(torch.from_numpy(wave).float()[None] * INT16_SCALE, output_hidden_states=True).hidden_states
        return states[iteration.units.layer][0].numpy()

    model.eval()
    featurise = layer if isinstance(iteration.units, LayerUnits) else mfcc
    return cluster(recordings, featurise, iteration.units.centre, iteration.clusters, params.fit_frames, params.seed)


def train_round(
    params: PretrainParams,
    iteration: Iteration,
    recordings: Recordings,
    units: Sequence[Int64[np.ndarray, " _"]],
    model: transformers.HubertModel,
    number: int,
) -> Iterator[tuple[float, str]]:
    """Train in place; yields seconds of audio and a note every few steps."""
    rng = np.random.default_rng([params.seed, number])
    task = MaskedPrediction(model, params, iteration.clusters).train()
    # The norms and biases are spared the decay, as everywhere
    decayed = [p for p in task.parameters() if p.ndim > 1]
    spared = [p for p in task.parameters() if p.ndim <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": params.weight_decay}, {"params": spared, "weight_decay": 0.0}],
        lr=params.lr,
        betas=(0.9, 0.98),
        eps=1e-6,
    )
    warmup = max(1, round(params.warmup * iteration.steps))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda step: min((step + 1) / warmup, (iteration.steps - step) / max(1, iteration.steps - warmup))
    )
    seconds, losses, hits = 0.0, 0.0, 0.0
    for step, batch in zip(
        range(1, iteration.steps + 1), endless_batches(params, recordings.frames, rng), strict=False
    ):
        starts = [int(rng.integers(recordings.frames[u] - batch.frames + 1)) for u in batch.utterances]
        spans = [FrameSpan(start, batch.frames) for start in starts]
        waves = torch.stack([recordings.crop(u, s) for u, s in zip(batch.utterances.tolist(), spans, strict=True)])
        wanted = np.stack([units[u][s.rows] for u, s in zip(batch.utterances.tolist(), spans, strict=True)])
        hidden = mask_spans(len(spans), batch.frames, params.mask_prob, params.mask_frames, rng)
        prediction = task(waves, torch.from_numpy(hidden), torch.from_numpy(wanted))
        optimiser.zero_grad()
        prediction.loss.backward()
        nn.utils.clip_grad_norm_(task.parameters(), params.clip)
        optimiser.step()
        rate.step()
        seconds += waves.numel() / 16_000
        losses, hits = losses + prediction.loss.item(), hits + prediction.accuracy.item()
        if step % LOG_STEPS == 0 or step == iteration.steps:
            n = (step - 1) % LOG_STEPS + 1
            yield seconds, f"step {step}, loss {losses / n:.3f}, accuracy {100 * hits / n:.1f} %"
            seconds, losses, hits = 0.0, 0.0, 0.0


def endless_batches(
    params: PretrainParams, frames: Int64[np.ndarray, " U"], rng: np.random.Generator
) -> Iterator[Batch]:
    """Epoch after epoch of `plan_epoch`, each drawn anew."""
    while True:
        yield from plan_epoch(frames, round(params.batch_seconds * 50), max(1, round(params.crop_seconds * 50)), rng)


def plan_epoch(
    frames: Int64[np.ndarray, " U"], batch_frames: int, crop_frames: int, rng: np.random.Generator
) -> list[Batch]:
    """Every recording once, in batches of about `batch_frames` frames of nearly equal length, shuffled."""
    lengths = np.minimum(frames, crop_frames)
    order = np.argsort(lengths * rng.uniform(1.0, 1.1, len(lengths)))  # the noise mixes neighbours anew every epoch
    batches, at = [], 0
    while at < len(order):
        size, shortest = 0, math.inf
        while at + size < len(order):
            shorter = min(shortest, int(lengths[order[at + size]]))
            if size and (size + 1) * shorter > batch_frames:
                break
            size, shortest = size + 1, shorter
        batches.append(Batch(order[at : at + size].astype(np.int64), int(shortest)))
        at += size
    return [batches[i] for i in rng.permutation(len(batches))]


def mask_spans(
    num: int, frames: int, mask_prob: float, mask_frames: int, rng: np.random.Generator
) -> Bool[np.ndarray, "B T"]:
    """Hide about mask_prob x frames / mask_frames spans of each row, which may overlap; every row gets as many."""
    length = min(mask_frames, frames)
    spans = min(max(1, int(mask_prob * frames / mask_frames + rng.random())), frames - length + 1)
    hidden = np.zeros((num, frames), dtype=bool)
    for row in hidden:
        for start in rng.choice(frames - length + 1, spans, replace=False):
            row[start : start + length] = True
    return hidden
