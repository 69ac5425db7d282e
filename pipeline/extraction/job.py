"""A model, a manifest and what to keep in; the store that has to be made out, planned to the last file.

Nothing is computed here: a job is a pure function of what the settings and the model say of themselves, so whoever makes it
again, in another process or on another machine, means the same store.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Int64
from numpy import ndarray

from cache.codecs import CODECS
from cache.errors import DataError, StoreError
from cache.frames import RATE_HZ, frames_of
from cache.manifest import Manifest
from cache.plan import StorePlan, plan_rows
from cache.ragged import Store
from cache.receipts import store_key, store_path
from cache.zarrshard import ArraySpec, Grid
from pipeline.devices import without_tf32
from pipeline.extraction.settings import Chunk, ExtractParams, Keep, kept_arrays
from pipeline.extraction.windows import allowed, longest_samples
from pipeline.upstream import Upstream


@dataclass(frozen=True)
class Job:
    """One extraction."""

    manifest: Manifest
    """The utterances that are kept, in the order of the store."""
    left_out: tuple[str, ...]
    """Ids of those that are too long, where they are to be skipped."""
    arrays: tuple[str, ...]
    header: dict[str, Any]
    """Kind, key, fingerprint, codec, width, chunk_rows, shard_rows: what `open_writer` takes."""
    params: ExtractParams
    device: str

    @property
    def directory(self) -> Path:
        """The folder of the store."""
        return store_path("features", self.header["key"])

    @cached_property
    def rows(self) -> Int64[ndarray, " U"]:
        """Frames of each utterance."""
        return frames_of(self.manifest.samples)

    @cached_property
    def plan(self) -> StorePlan:
        """Where each lies."""
        return plan_rows(self.rows, self.grid.shard_rows)

    @property
    def grid(self) -> Grid:
        """Rows of a chunk and of a shard."""
        return Grid(self.header["chunk_rows"], self.header["shard_rows"])

    @cached_property
    def specs(self) -> dict[str, ArraySpec]:
        """What each array is."""
        return {name: ArraySpec(name, self.header["width"], self.header["codec"]) for name in self.arrays}

    def seconds(self, shard: int) -> float:
        """Audio in a shard."""
        return float(self.manifest.samples[list(self.plan.utterances(shard))].sum()) / RATE_HZ


def plan_job(upstream: Upstream, manifest: Manifest, params: ExtractParams, keep: Keep, device: str) -> Job:
    """What has to be made.

    Args:
        upstream: the model, on `device`.
        manifest: all utterances.
        params: how features are stored.
        keep: what of the model, of which utterances.
        device: where the model is.

    Raises:
        SettingsError: a layer the model does not have, or an utterance larger than a shard.
        DataError: no utterance to keep, or one that is too long.
    """
    chosen = manifest if keep.select == "all" else manifest.labelled()
    if not len(chosen):
        raise DataError("no utterance of the manifest has a probe label; set select: all, or label the corpus")
    kept = allowed(chosen, params.long)
    fingerprint: dict[str, Any] = {
        "model": upstream.describe(),
        "audio": kept.audio_digest,
        "codec": params.codec,
        "chunk_frames": params.chunk_frames,
        "shard_frames": params.shard_frames,
        "precision": precision_of(device),
        "version": params.version,
    }
    if CODECS[params.codec].tables:
        fingerprint["calibration"] = params.calibration.model_dump()
    cut = isinstance(params.long, Chunk) and int(kept.samples.max()) > longest_samples(params.long)
    if cut or len(kept) < len(chosen):  # else the setting changes nothing, and a store stays what it is
        fingerprint["long"] = params.long.model_dump()
    header = {
        "kind": "features",
        "key": store_key("features", fingerprint),
        "fingerprint": fingerprint,
        "codec": params.codec,
        "width": upstream.width,
        "chunk_rows": params.chunk_frames,
        "shard_rows": params.shard_frames,
    }
    left_out = tuple(u.id for u in chosen if u.id not in kept.by_id) if len(kept) < len(chosen) else ()
    return Job(
        kept, left_out, tuple(kept_arrays(keep, upstream.num_layers, upstream.has_projection)), header, params, device
    )


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
    """The arithmetic of a forward on `device`; TF32 is switched off."""
    without_tf32()
    return {"device": device.split(":")[0], "compute": "float32", "tf32": False}
