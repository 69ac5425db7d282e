"""Extraction: a model and a wave store in, the model's layers in a feature store and their receipt out.

The unit of work is a shard, planned before the first forward: its utterances are sorted by length, run in padded batches,
encoded and written as whole files, one per layer. A shard is committed or it is not; a run that was killed makes only what is
missing, and layers asked for later are added to the same store.
"""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Shaped
from pydantic import BaseModel, Field

from cache.codecs import CODECS
from cache.errors import DataError, SettingsError, StoreError
from cache.frames import RATE_HZ, frames_of
from cache.manifest import Manifest
from cache.ragged import Store, layer_name, layer_of
from cache.receipts import make_receipt, store_key, store_path
from cache.writer import StoreWriter, open_writer
from cache.writers import ShardPool
from pipeline.calibrate import Calibration, fit_tables, sample_layers
from pipeline.codecs import can_hold, encode, to_device
from pipeline.forward import draw_utterances, forward_batches
from pipeline.upstream import Upstream


class ExtractParams(BaseModel, frozen=True, extra="forbid"):
    """How features are stored."""

    version: int
    """Raise it after a change of code that moves the features: the source files are no dependency of extraction."""
    codec: Literal["float32", "float16", "bfloat16", "int8", "mvq8", "mvq16", "mvq32"]
    """How a frame lies on disk: docs/codecs.md says what each costs and loses."""
    calibration: Calibration
    """What int8 and mvq are fitted to; the others need none."""
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
    writers: int = 1,
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
        writers: processes that write whole shards beside the computing; 0 writes in this one.

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
    if CODECS[params.codec].tables:
        fingerprint["calibration"] = params.calibration.model_dump()
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
        fit_layers(upstream, chosen, waves, writer, params, device)
        todo = writer.missing()
        seconds = [
            chosen.samples[list(writer.plan.utterances(s))].sum() / RATE_HZ for s in range(writer.plan.num_shards)
        ]
        tick(float(sum(seconds[s] for s in range(writer.plan.num_shards) if s not in todo)), found=True)
        left = {shard: len(arrays) for shard, arrays in todo.items()}

        def committed(_: str, shard: int) -> None:
            left[shard] -= 1
            if not left[shard]:
                tick(float(seconds[shard]))

        # shards are written while the next is computed; waiting for a buffer bounds memory to two shards
        with ShardPool(writer, writers, shard_buffers=2, committed=committed) as pool:
            for shard, arrays in todo.items():
                buffers = {array: pool.buffer(array, shard) for array in arrays}
                forward_shard(upstream, chosen, waves, writer, shard, buffers, params, device, pool.record)
                for array in arrays:
                    pool.commit(array, shard)
    return make_receipt(directory, names)


def fit_layers(
    upstream: Upstream, manifest: Manifest, waves: Store, writer: StoreWriter, params: ExtractParams, device: str
) -> None:
    """Fit the codec to those layers of the store that it is not fitted to yet, on drawn utterances."""
    names = [name for name in writer.specs if writer.tables(name) is None]
    if not names:
        return
    drawn = draw_utterances(manifest, params.calibration.seconds, params.calibration.seed)
    for name, frames in sample_layers(upstream, manifest, waves, drawn, names, params.batch_seconds, device):
        writer.write_tables(name, fit_tables(frames, CODECS[params.codec], params.calibration.seed))


def forward_shard(
    upstream: Upstream,
    manifest: Manifest,
    waves: Store,
    writer: StoreWriter,
    shard: int,
    out: dict[str, Shaped[np.ndarray, "R W"]],
    params: ExtractParams,
    device: str,
    meanwhile: Callable[[], None],
) -> None:
    """Fill `out`, per array, with the encoded rows of one shard; calls `meanwhile` after every batch.

    A pure function of the plan: restarts meet the same batches.
    """
    plan = writer.plan
    first_row = shard * plan.shard_rows
    specs = {a: writer.specs[a] for a in out}
    tables = {a: to_device(writer.tables(a) or {}, device) for a in out}
    for batch in forward_batches(upstream, manifest, waves, plan.utterances(shard), params.batch_seconds, device):
        for array, spec in specs.items():
            states = batch.layers[layer_of(array)].float()
            finite = can_hold(states, spec.coding, tables[array]).cpu()
            rows = encode(states, spec.coding, tables[array]).cpu().numpy()
            for b, (u, count) in enumerate(zip(batch.utterances, batch.counts, strict=True)):
                if not bool(finite[b, :count].all()):
                    raise DataError(
                        f"{manifest[u].id}: {array} has values that are not finite in {params.codec}; "
                        "look at the recording, or set extract.codec: float32"
                    )
                at = int(plan.start[u]) - first_row
                out[array][at : at + count] = rows[b, :count]
        meanwhile()


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


def precision_of(device: str) -> dict[str, Any]:
    """The arithmetic of a forward on `device`. TF32 is switched off: it changes features by 1e-3."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    return {"device": device.split(":")[0], "compute": "float32", "tf32": False}
