"""A model, a manifest and what to keep in; bytes, files and hours of the whole extraction out, before any of it is run.

Bytes and files are exact: the plan is a pure function of the manifest. Hours come from a short sample that is forwarded
and encoded batch after batch; on a CPU extraction runs batches side by side, which takes a fourth less.
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

from cache.codecs import CODECS
from cache.frames import RATE_HZ
from cache.manifest import Manifest
from cache.names import array_name
from cache.ragged import Store
from cache.tables import tables_bytes
from cache.zarrshard import ArraySpec, shard_bytes
from pipeline.codecs import encode
from pipeline.extraction.job import Job, plan_job
from pipeline.extraction.settings import ExtractParams, Keep
from pipeline.forward import Forwarded, draw_utterances, forward_batches, mean_of
from pipeline.upstream import Upstream

OTHERS = ("float32", "float16", "int8", "mvq16")  # shown beside the codec that is set


@dataclass(frozen=True, slots=True)
class Choice:
    """One way to keep a model's layers, and what it takes on the disk."""

    arrays: tuple[str, ...]
    """Names of what is kept: layers, or means of layers."""
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
    job = plan_job(upstream, manifest, params, keep, device)
    plan, every = job.plan, tuple(array_name(layer) for layer in range(upstream.num_layers))

    def choice(kept: tuple[str, ...], codec: str) -> Choice:
        spec = ArraySpec("layer", upstream.width, codec)
        one = sum(shard_bytes(plan.used_rows(shard), spec, job.grid) for shard in range(plan.num_shards))
        return Choice(kept, codec, len(kept) * (one + tables_bytes(spec)), len(kept) * plan.num_shards)

    others = {(kept, codec) for kept in (job.arrays, every, every[-1:]) for codec in OTHERS}
    others.discard((job.arrays, params.codec))
    sample, rate = timed_sample(upstream, job, waves, sample_seconds, seed)
    return Cost(
        chosen=choice(job.arrays, params.codec),
        alternatives=tuple(choice(*other) for other in sorted(others, key=lambda o: (len(o[0]), o[1]))),
        utterances=len(job.manifest),
        hours_of_audio=float(job.manifest.samples.sum()) / RATE_HZ / 3600,
        rate=rate,
        sample_seconds=sample,
    )


def timed_sample(upstream: Upstream, job: Job, waves: Store, sample_seconds: float, seed: int) -> tuple[float, float]:
    """Seconds of audio drawn, and audio-seconds per second of forward and encoding over them."""
    params, codec = job.params, CODECS[job.params.codec]
    drawn = draw_utterances(job.manifest, sample_seconds, seed)
    sample = Manifest(tuple(job.manifest[u] for u in drawn))
    generator = torch.Generator().manual_seed(seed)
    tables = {t: torch.randn(codec.table_shape(t, upstream.width), generator=generator) for t in codec.tables}
    tables = {name: table.abs().to(job.device) for name, table in tables.items()}  # cost the same as fitted ones

    def forward(utterances: Iterable[int]) -> Iterator[Forwarded]:
        return forward_batches(upstream, sample, waves, utterances, params.long, params.batch_seconds, job.device)

    for _ in forward([int(sample.samples.argmin())]):
        pass  # warms up
    start = time.perf_counter()
    for batch in forward(range(len(sample))):
        for array in job.arrays:  # the copy to the host waits for the device
            encode(mean_of(batch.outputs, array), codec, tables).cpu()
    seconds = float(sample.samples.sum()) / RATE_HZ
    return seconds, seconds / (time.perf_counter() - start)
