"""Extraction: a model and a wave store in, the model's layers in a feature store and their receipt out.

The unit of work is a shard, planned before the first forward: its utterances are sorted by length, run in padded batches,
encoded and written as whole files, one per layer. A shard is committed or it is not; a run that was killed makes only what is
missing, and layers asked for later are added to the same store.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Shaped
from pydantic import BaseModel, Field

from cache.errors import DataError, SettingsError, StoreError
from cache.frames import RATE_HZ, frames_of
from cache.manifest import Manifest
from cache.ragged import Store, layer_name, layer_of
from cache.receipts import make_receipt, store_key, store_path
from cache.writer import StoreWriter, open_writer
from pipeline.padding import pad_waves
from pipeline.upstream import Upstream


class ExtractParams(BaseModel, frozen=True, extra="forbid"):
    """How features are stored."""

    version: int
    """Raise it after a change of code that moves the features: the source files are no dependency of extraction."""
    codec: Literal["float16", "float32"]
    """Type on disk."""
    chunk_frames: int = Field(gt=0)
    """Frames per checksummed chunk."""
    shard_frames: int = Field(gt=0)
    """Frames per shard file: 65 536 are about 100 MB of a 768-wide layer in float16."""
    batch_seconds: float = Field(gt=0)
    """Padded audio in one forward. Changes speed and memory, not what is computed."""


class Keep(BaseModel, frozen=True, extra="forbid"):
    """What of a model is kept."""

    layers: Literal["all"] | tuple[int, ...]
    """Layer indices (0 is the input of the first block), or all."""
    select: Literal["all", "labelled"]
    """All utterances, or those with a probe label."""


Tick = Callable[..., None]


def extract(
    upstream: Upstream,
    manifest: Manifest,
    waves: Store,
    params: ExtractParams,
    keep: Keep,
    device: str,
    tick: Tick,
) -> dict[str, Any]:
    """Bring a store up to date with a model and give its receipt.

    Args:
        upstream: the model, on `device`.
        manifest: the utterances, in the order of the store.
        waves: their waveforms.
        params: how features are stored.
        keep: which layers of which utterances.
        device: where the model is.
        tick: told the audio-seconds of each shard as it is committed, and with found=True of those found committed.

    Raises:
        SettingsError: a layer the model does not have, or an utterance larger than a shard.
        DataError: features that are not finite in the codec; the utterance and the layer are named.
        ResourceError: another writer, or not enough space.
    """
    chosen = manifest if keep.select == "all" else manifest.labelled()
    if not len(chosen):
        raise DataError("no utterance of the manifest has a probe label; set select: all, or label the corpus")
    names = [layer_name(i) for i in kept_layers(keep, upstream)]
    rows = frames_of(chosen.samples)
    fingerprint = {
        "model": upstream.describe(),
        "audio": chosen.audio_digest,
        "codec": params.codec,
        "chunk_frames": params.chunk_frames,
        "shard_frames": params.shard_frames,
        "precision": precision_of(device),
        "version": params.version,
    }
    key = store_key("features", fingerprint)
    directory = store_path("features", key)
    header = {
        "kind": "features",
        "key": key,
        "fingerprint": fingerprint,
        "codec": params.codec,
        "width": upstream.width,
        "chunk_rows": params.chunk_frames,
        "shard_rows": params.shard_frames,
    }
    check_waves(chosen, waves)
    with open_writer(directory, header, [u.id for u in chosen], rows, names) as writer:
        writer.check_space()
        todo = writer.missing()
        seconds = [
            chosen.samples[list(writer.plan.utterances(s))].sum() / RATE_HZ for s in range(writer.plan.num_shards)
        ]
        tick(float(sum(seconds[s] for s in range(writer.plan.num_shards) if s not in todo)), found=True)
        # One shard is written while the next is computed; waiting for it bounds memory to two shards.
        with ThreadPoolExecutor(1) as behind:
            pending: Future[None] | None = None
            for shard, arrays in todo.items():
                buffers = forward_shard(upstream, chosen, waves, writer, shard, arrays, params, device)
                if pending is not None:
                    pending.result()
                pending = behind.submit(_commit, writer, shard, buffers, tick, float(seconds[shard]))
            if pending is not None:
                pending.result()
    return make_receipt(directory, names)


def _commit(
    writer: StoreWriter, shard: int, buffers: dict[str, Shaped[np.ndarray, "R D"]], tick: Tick, seconds: float
) -> None:
    for array, rows in buffers.items():
        writer.write(array, shard, rows)
    tick(seconds)


def forward_shard(
    upstream: Upstream,
    manifest: Manifest,
    waves: Store,
    writer: StoreWriter,
    shard: int,
    arrays: Sequence[str],
    params: ExtractParams,
    device: str,
) -> dict[str, Shaped[np.ndarray, "R D"]]:
    """The encoded rows of one shard, per array. A pure function of the plan: restarts meet the same batches."""
    plan = writer.plan
    first_row = shard * plan.shard_rows
    out = {a: np.empty((plan.used_rows(shard), upstream.width), dtype=params.codec) for a in arrays}
    for batch in length_batches(manifest, plan.utterances(shard), params.batch_seconds):
        padded, samples = pad_waves([waves.read("wave", manifest[u].id) for u in batch])
        with torch.inference_mode():
            layers = upstream.layers(padded.to(device), samples.to(device))
            for array in arrays:
                states = layers[layer_of(array)]
                encoded = states.to(getattr(torch, params.codec)).cpu().numpy()
                for row, u in enumerate(batch):
                    count = manifest[u].num_frames
                    check_frames(encoded[row], count, manifest[u].id, array, params.codec)
                    at = int(plan.start[u]) - first_row
                    out[array][at : at + count] = encoded[row, :count]
    return out


def length_batches(manifest: Manifest, utterances: range, batch_seconds: float) -> Iterator[list[int]]:
    """Utterances of a shard by length, longest first, in batches of at most `batch_seconds` of padded audio."""
    budget = batch_seconds * RATE_HZ
    batch: list[int] = []
    for u in sorted(utterances, key=lambda u: (-manifest[u].samples, u)):
        if batch and (len(batch) + 1) * manifest[batch[0]].samples > budget:
            yield batch
            batch = []
        batch.append(u)
    yield batch


def kept_layers(keep: Keep, upstream: Upstream) -> list[int]:
    """The layers to keep, in order.

    Raises:
        SettingsError: one the model does not have.
    """
    if keep.layers == "all":
        return list(range(upstream.num_layers))
    for layer in keep.layers:
        if not 0 <= layer < upstream.num_layers:
            raise SettingsError(
                f"layer {layer} is not one of the model's layers 0 to {upstream.num_layers - 1}; change keep.layers"
            )
    return sorted(set(keep.layers))


def check_waves(manifest: Manifest, waves: Store) -> None:
    """Refuse a wave store that is not this manifest's.

    Raises:
        StoreError: an utterance is absent or has another length.
    """
    for u in manifest:
        at = waves.index.get(u.id)
        if at is None or int(waves.rows[at]) != u.samples:
            found = "is absent" if at is None else f"has {waves.rows[at]} samples"
            raise StoreError(
                f"{u.id} {found} in {waves.directory}, the manifest says {u.samples}; run `decant prepare` again"
            )


def check_frames(encoded: Shaped[np.ndarray, "T D"], count: int, utterance: str, array: str, codec: str) -> None:
    """Refuse a frame count that is not the formula's, and values that the codec cannot hold.

    Raises:
        DataError: too few frames, or values that are not finite.
    """
    if len(encoded) < count:
        raise DataError(
            f"{utterance}: the model gave {len(encoded)} frames and the manifest says {count}; is its hop 320 samples?"
        )
    if not np.isfinite(encoded[:count]).all():
        raise DataError(
            f"{utterance}: {array} has values that are not finite in {codec}; look at the recording, or set extract.codec: float32"
        )


def precision_of(device: str) -> dict[str, Any]:
    """The arithmetic of a forward on `device`. TF32 is switched off: it changes features by 1e-3."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return {"device": device.split(":")[0], "compute": "float32", "tf32": False}
