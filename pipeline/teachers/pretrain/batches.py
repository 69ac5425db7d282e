"""Batches: recordings of a wave store in, waveforms of one length, the frames to hide and their units out.

What a batch is drawn from is one generator whose place is kept with every batch, so that a killed run draws on from there.
Making a batch of what was drawn is a pure function, and may be done ahead of the training. Batches are cropped to their
shortest recording, not padded: no norm and no attention sees padding.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int16, Int64
from torch import Tensor

from cache.errors import DataError
from cache.frames import FrameSpan, frames_of
from cache.manifest import Manifest
from cache.publish import digest_json
from cache.ragged import Store
from pipeline.distortion.distort import Distorter
from pipeline.distortion.mixing import Mixer
from pipeline.padding import INT16_SCALE
from pipeline.teachers.pretrain.settings import PretrainParams
from pipeline.teachers.units import UnitFile


class Group(NamedTuple):
    """Recordings of one batch, and the frames each is cropped to."""

    utterances: Int64[np.ndarray, " B"]
    frames: int


class Draw(NamedTuple):
    """What was drawn for one batch."""

    step: int
    """From 1."""
    utterances: Int64[np.ndarray, " B"]
    spans: list[FrameSpan]
    hidden: Bool[np.ndarray, "B T"]
    place: dict[str, Any]
    """Where the generator stands after it."""


class Batch(NamedTuple):
    """What the model hears and is asked."""

    waves: Float[Tensor, "B S"]
    hidden: Bool[Tensor, "B T"]
    units: Int64[Tensor, "B T"] | None
    """None where the objective has none."""
    draw: Draw


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
        self.digest = digest_json([[u.id, u.audio] for u in chosen])

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, u: Any) -> Any:
        return self.waves.read("wave", self.ids[u])

    def crop(self, u: int, span: FrameSpan) -> Float[Tensor, " S"]:
        """The samples of some frames, in [-1, 1)."""
        return torch.from_numpy(self.waves.read("wave", self.ids[u], span)).float() * INT16_SCALE

    def samples_of(self, u: int) -> int:
        """Samples of the whole frames of a recording: what `read` can give."""
        return FrameSpan(0, int(self.frames[u])).samples.stop

    def read(self, u: int, start: int, count: int) -> Float32[np.ndarray, " S"]:
        """Some of its samples, in [-1, 1)."""
        return (self[u][start : start + count] * np.float32(INT16_SCALE)).astype(np.float32)


class BatchMaker:
    """Makes batches of what was drawn; another process or thread would make the same."""

    def __init__(self, params: PretrainParams, recordings: Recordings, units: UnitFile | None, number: int) -> None:
        self.recordings, self.units, self.seed = recordings, units, [params.seed, number]
        self.distort = None if params.distort is None else Distorter(params.distort, recordings)
        self.mix = None if params.mix is None else Mixer(params.mix, recordings)

    def __call__(self, draw: Draw) -> Batch:
        """Read, distort and mix."""
        pairs = list(zip(draw.utterances.tolist(), draw.spans, strict=True))
        crops = [self.recordings.crop(u, span) for u, span in pairs]
        # of its own generator: distortion moves neither crops nor hidden frames
        rng = np.random.default_rng([*self.seed, draw.step, 1])
        if self.distort is not None:
            crops = [self.distort(crop, u, rng) for crop, (u, _) in zip(crops, pairs, strict=True)]
        waves = torch.stack(crops)
        if self.mix is not None:
            waves = self.mix(waves, draw.utterances, rng)
        units = None
        if self.units is not None:
            units = torch.from_numpy(np.stack([self.units[u][span.rows] for u, span in pairs]).astype(np.int64))
        return Batch(waves, torch.from_numpy(draw.hidden), units, draw)


def draws(
    params: PretrainParams, frames: Int64[np.ndarray, " U"], number: int, done: int, place: dict[str, Any] | None
) -> Iterator[Draw]:
    """Epoch after epoch of `plan_epoch`, each drawn anew, with crops and hidden frames.

    Args:
        params: the settings.
        frames: of each recording.
        number: of the round.
        done: steps of the round that are made already.
        place: of the last of them; None before the first.
    """
    rng = np.random.default_rng([params.seed, number])
    position = 0
    if place is not None:
        rng.bit_generator.state = place["epoch"]
    epoch = rng.bit_generator.state
    plan = plan_epoch(frames, round(params.batch_seconds * 50), max(1, round(params.crop_seconds * 50)), rng)
    if place is not None:
        position, rng.bit_generator.state = place["position"], place["now"]
    while True:
        for group in plan[position:]:
            done, position = done + 1, position + 1
            starts = [int(rng.integers(frames[u] - group.frames + 1)) for u in group.utterances]
            hidden = mask_spans(len(starts), group.frames, params.mask_prob, params.mask_frames, rng)
            after = {"epoch": epoch, "position": position, "now": rng.bit_generator.state}
            yield Draw(done, group.utterances, [FrameSpan(start, group.frames) for start in starts], hidden, after)
        position, epoch = 0, rng.bit_generator.state
        plan = plan_epoch(frames, round(params.batch_seconds * 50), max(1, round(params.crop_seconds * 50)), rng)


def plan_epoch(
    frames: Int64[np.ndarray, " U"], batch_frames: int, crop_frames: int, rng: np.random.Generator
) -> list[Group]:
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
        batches.append(Group(order[at : at + size].astype(np.int64), int(shortest)))
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
