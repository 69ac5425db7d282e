"""A model, a manifest and what to keep in; bytes, files and hours of the whole extraction out, before any of it is run.

Bytes and files are exact: the plan is a pure function of the manifest. Hours come from a short sample that is forwarded
and encoded as extraction does it.
"""

import time
from dataclasses import dataclass

import torch

from cache.codecs import CODECS
from cache.frames import RATE_HZ, frames_of
from cache.manifest import Manifest
from cache.plan import plan_rows
from cache.ragged import Store
from cache.tables import tables_bytes
from cache.zarrshard import ArraySpec, Grid, shard_bytes
from pipeline.codecs import encode
from pipeline.extract import ExtractParams, Keep, kept_layers
from pipeline.forward import draw_utterances, forward_batches
from pipeline.upstream import Upstream

OTHERS = ("float32", "float16", "int8", "mvq16")  # shown beside the codec that is set


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
        return Choice(kept, codec, len(kept) * (one + tables_bytes(spec)), len(kept) * plan.num_shards)

    others = {(kept, codec) for kept in (layers, every, every[-1:]) for codec in OTHERS} - {(layers, params.codec)}
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
    drawn = draw_utterances(manifest, sample_seconds, seed)
    sample = Manifest(tuple(manifest[u] for u in drawn))
    codec = CODECS[params.codec]
    generator = torch.Generator().manual_seed(seed)
    tables = {t: torch.randn(codec.table_shape(t, upstream.width), generator=generator) for t in codec.tables}
    tables = {name: table.abs().to(device) for name, table in tables.items()}  # cost the same as fitted ones
    for _ in forward_batches(upstream, sample, waves, [int(sample.samples.argmin())], params.batch_seconds, device):
        pass  # warms up
    start = time.perf_counter()
    for batch in forward_batches(upstream, sample, waves, range(len(sample)), params.batch_seconds, device):
        for layer in layers:  # the copy to the host waits for the device
            encode(batch.layers[layer], codec, tables).cpu()
    seconds = float(sample.samples.sum()) / RATE_HZ
    return seconds, seconds / (time.perf_counter() - start)
