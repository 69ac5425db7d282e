"""A model, a manifest and what to keep in; bytes, files and hours of the whole extraction out, before any of it is run.

Bytes and files are exact: the plan is a pure function of the manifest. Hours come from a short sample that is forwarded
and encoded as extraction does it.
"""

import time
from dataclasses import dataclass

import numpy as np
import torch

from cache.frames import RATE_HZ, frames_of
from cache.manifest import Manifest
from cache.plan import plan_rows
from cache.ragged import Store
from cache.zarrshard import ArraySpec, Grid, shard_bytes
from pipeline.extract import ExtractParams, Keep, kept_layers, length_batches
from pipeline.padding import pad_waves
from pipeline.upstream import Upstream

CODECS = ("float16", "float32")


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to keep a model's layers, and what it takes on the disk."""

    layers: tuple[int, ...]
    codec: str
    bytes: int
    files: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What an extraction takes."""

    chosen: Choice
    alternatives: tuple[Choice, ...]
    utterances: int
    hours_of_audio: float
    rate: float
    """Audio-seconds per second, measured on the sample."""
    sample_seconds: float
    """Audio in the sample."""

    @property
    def hours(self) -> float:
        """Hours of computing; GPU-hours on a GPU."""
        return self.hours_of_audio / self.rate


def cost_of(
    upstream: Upstream,
    manifest: Manifest,
    waves: Store,
    params: ExtractParams,
    keep: Keep,
    device: str,
    sample_seconds: float,
    seed: int,
) -> Cost:
    """Plan an extraction and time a sample of it.

    Args:
        upstream: the model, on `device`.
        manifest: the utterances.
        waves: their waveforms.
        params: how features are to be stored.
        keep: which layers of which utterances.
        device: where the model is.
        sample_seconds: audio to time, drawn over all utterances; a first batch of it warms up and is not counted.
        seed: of the draw.
    """
    chosen = manifest if keep.select == "all" else manifest.labelled()
    plan = plan_rows(frames_of(chosen.samples), params.shard_frames)
    grid = Grid(params.chunk_frames, params.shard_frames)
    layers, every = tuple(kept_layers(keep, upstream)), tuple(range(upstream.num_layers))

    def choice(kept: tuple[int, ...], codec: str) -> Choice:
        spec = ArraySpec("layer", upstream.width, codec)
        one = sum(shard_bytes(plan.used_rows(shard), spec, grid) for shard in range(plan.num_shards))
        return Choice(kept, codec, len(kept) * one, len(kept) * plan.num_shards)

    others = {(kept, codec) for kept in (layers, every, every[-1:]) for codec in CODECS} - {(layers, params.codec)}
    sample, rate = timed_sample(upstream, chosen, waves, params, layers, device, sample_seconds, seed)
    return Cost(
        chosen=choice(layers, params.codec),
        alternatives=tuple(choice(*other) for other in sorted(others, key=lambda o: (len(o[0]), o[1]))),
        utterances=len(chosen),
        hours_of_audio=float(chosen.samples.sum()) / RATE_HZ / 3600,
        rate=rate,
        sample_seconds=sample,
    )


def timed_sample(
    upstream: Upstream,
    manifest: Manifest,
    waves: Store,
    params: ExtractParams,
    layers: tuple[int, ...],
    device: str,
    sample_seconds: float,
    seed: int,
) -> tuple[float, float]:
    """Seconds of audio drawn, and audio-seconds per second of forward and encoding over them."""
    drawn: list[int] = []
    for u in np.random.default_rng(seed).permutation(len(manifest)).tolist():
        drawn.append(u)
        if manifest.samples[drawn].sum() >= sample_seconds * RATE_HZ:
            break
    sample = Manifest(tuple(manifest[u] for u in drawn))
    batches = list(length_batches(sample, range(len(sample)), params.batch_seconds))
    for number, batch in enumerate([batches[-1], *batches]):  # the last one twice: first as a warm-up
        if number == 1:
            start = time.perf_counter()
        padded, samples = pad_waves([waves.read("wave", sample[u].id) for u in batch])
        with torch.inference_mode():
            states = upstream.layers(padded.to(device), samples.to(device))
            for layer in layers:  # the copy to the host waits for the device
                states[layer].to(getattr(torch, params.codec)).cpu()
    seconds = float(sample.samples.sum()) / RATE_HZ
    return seconds, seconds / (time.perf_counter() - start)
