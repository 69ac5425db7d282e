"""A little feature store with given frames: what the tests of probes read."""

from pathlib import Path

import numpy as np

from cache.manifest import Manifest, Utterance
from cache.names import layer_name
from cache.ragged import Store
from cache.receipts import store_key
from cache.writer import open_writer


def utterance(name: str, num_frames: int, tasks: dict[str, str], **labels) -> Utterance:
    """An utterance of so many frames."""
    return Utterance(
        id=f"toy/{name}",
        corpus="toy",
        path=f"{name}.wav",
        samples=400 + 320 * (num_frames - 1),
        rate_hz=16_000,
        file_samples=1,
        file_bytes=1,
        audio=f"samples of {name}",
        split="train" if set(tasks.values()) <= {"train"} else "test",  # pretraining hears nothing that is held back
        tasks=tasks,
        **labels,
    )


def write_store(directory: Path, manifest: Manifest, frames: list[np.ndarray], codec: str = "float16"):
    """A store of the (L, T, D) frames of each utterance, in several shards, as extraction writes it; and its layers."""
    fingerprint = {"model": {"kind": "hubert"}}
    num_layers, _, width = frames[0].shape
    header = {
        "kind": "features",
        "key": store_key("features", fingerprint),
        "fingerprint": fingerprint,
        "codec": codec,
        "width": width,
        "chunk_rows": 8,
        "shard_rows": 256,
    }
    rows = np.array([u.num_frames for u in manifest], dtype=np.int64)
    layers = [layer_name(layer) for layer in range(num_layers)]
    with open_writer(directory, header, [u.id for u in manifest], rows, layers) as writer:
        for shard, names in writer.missing().items():
            for name in names:
                parts = [frames[u][layers.index(name)] for u in writer.plan.utterances(shard)]
                writer.write(name, shard, np.concatenate(parts))
    return Store(directory), layers
