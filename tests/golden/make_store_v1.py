"""Nothing in, the golden store of format 1 out: five utterances of two layers, three waveforms, and their receipts.

python -m tests.golden.make_store_v1 [FOLDER]

The store was made once and is kept: `tests/test_cache_golden.py` reads it for ever. Never make it anew when the writer
changes; a new format gets a golden store of its own.
"""

import os
import sys
from pathlib import Path

import numpy as np

from cache.publish import write_json
from cache.receipts import make_receipt, store_key, store_path
from cache.writer import open_writer

FRAMES = (5, 30, 40, 1, 20)  # 35 rows, then 61: the third utterance starts the second shard
SAMPLES = (400, 2_000, 3_000)
WIDTH = 6
SPECIAL = np.array([-0.0, 65_504, 2.0**-24, np.inf, -np.inf, np.nan], dtype=np.float16)  # utterance 3, its one frame


def layer_rows(layer: int, utterance: int) -> np.ndarray:
    """(T, 6) float16: sixteenths of whole numbers, which float16 holds exactly."""
    t, c = np.mgrid[: FRAMES[utterance], :WIDTH]
    rows = ((37 * utterance + 11 * t + 5 * c + 101 * layer) % 2039 - 1019) / 16
    return SPECIAL[None] if utterance == 3 else rows.astype(np.float16)


def wave_rows(utterance: int) -> np.ndarray:
    """(S,) int16 over its whole range."""
    s = np.arange(SAMPLES[utterance])
    return ((7_919 * utterance + 104_729 * s) % 65_536 - 32_768).astype(np.int16)


def write_store(kind, header, ids, rows, values) -> None:
    """One store through the real writer, and its receipt; `values` gives the rows of (array, utterance)."""
    fingerprint = {"golden": "store-v1"}
    header = {"kind": kind, "key": store_key(kind, fingerprint), "fingerprint": fingerprint, **header}
    place = store_path(kind, header["key"])
    arrays = ["wave"] if kind == "waves" else ["layer-00", "layer-04"]
    with open_writer(place, header, ids, np.array(rows, dtype=np.int64), arrays) as writer:
        for shard, names in writer.missing().items():
            for name in names:
                writer.write(name, shard, np.concatenate([values(name, u) for u in writer.plan.utterances(shard)]))
    (place / "writer.lock").unlink()
    write_json(Path(os.environ["DECANT_STORE"]) / "receipts" / f"{kind}.json", make_receipt(place, arrays))


def make(folder: Path) -> None:
    """Write both stores and both receipts under `folder`, through the environment variable that users set."""
    before = os.environ.get("DECANT_STORE")
    os.environ["DECANT_STORE"] = str(folder)
    try:
        features = {"codec": "float16", "width": WIDTH, "chunk_rows": 8, "shard_rows": 64}
        ids = [f"golden/{u} é" for u in range(len(FRAMES))]
        write_store("features", features, ids, FRAMES, lambda name, u: layer_rows(int(name[-2:]), u))
        waves = {"codec": "int16", "width": None, "chunk_rows": 512, "shard_rows": 4_096}
        write_store("waves", waves, ids[: len(SAMPLES)], SAMPLES, lambda name, u: wave_rows(u))
    finally:
        os.environ.pop("DECANT_STORE")
        if before is not None:
            os.environ["DECANT_STORE"] = before


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "store-v1")
