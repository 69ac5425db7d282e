"""Nothing in, the golden stores of format 1 in the codecs bfloat16, int8 and mvq8 out: three utterances of one layer each.

python -m tests.golden.make_store_v1_codecs [FOLDER]

They were made once and are kept: `tests/test_cache_golden_codecs.py` reads them for ever.
"""

import os
import sys
from pathlib import Path

import numpy as np

from cache.codecs import CODECS, Tables, encode
from cache.publish import write_json
from cache.receipts import make_receipt, store_key, store_path
from cache.writer import open_writer

FRAMES = (5, 30, 40)  # 35 rows, then a second shard
WIDTH = 6


def frames(utterance: int) -> np.ndarray:
    """(T, 6) float32: sixteenths of whole numbers."""
    t, c = np.mgrid[: FRAMES[utterance], :WIDTH]
    return (((37 * utterance + 11 * t + 5 * c) % 2039 - 1019) / 16).astype(np.float32)


def tables(codec: str) -> Tables:
    """Powers of two and whole numbers, so that every reader computes the same."""
    channels = np.arange(WIDTH)
    m, k, c = np.mgrid[:8, :256, :WIDTH]
    made = {
        "mean": (channels - 2).astype(np.float32),
        "std": (2.0 ** (channels % 3)).astype(np.float32),
        "codebooks": (((31 * m + 17 * k + 13 * c) % 255 - 127) / 2.0**m).astype(np.float32),
    }
    return {name: made[name] for name in CODECS[codec].tables}


def rows(codec: str, utterance: int) -> np.ndarray:
    """Encoded frames; of mvq any codewords, because which are nearest may hang on a processor's last bit."""
    if codec != "mvq8":
        return encode(frames(utterance), CODECS[codec], tables(codec))
    t, m = np.mgrid[: FRAMES[utterance], :8]
    return ((61 * utterance + 29 * t + 83 * m) % 256).astype(np.uint8)


def write_store(codec: str) -> None:
    fingerprint = {"golden": "store-v1-codecs", "codec": codec}
    header = {"kind": "features", "key": store_key("features", fingerprint), "fingerprint": fingerprint}
    header |= {"codec": codec, "width": WIDTH, "chunk_rows": 8, "shard_rows": 64}
    place = store_path("features", str(header["key"]))
    ids = [f"golden/{u} é" for u in range(len(FRAMES))]
    with open_writer(place, header, ids, np.array(FRAMES, dtype=np.int64), ["layer-07"]) as writer:
        if CODECS[codec].tables:
            writer.write_tables("layer-07", tables(codec))
        for shard in writer.missing():
            writer.write("layer-07", shard, np.concatenate([rows(codec, u) for u in writer.plan.utterances(shard)]))
    (place / "writer.lock").unlink()
    write_json(Path(os.environ["DECANT_STORE"]) / "receipts" / f"{codec}.json", make_receipt(place, ["layer-07"]))


def make(folder: Path) -> None:
    """Write the stores and their receipts under `folder`, through the environment variable that users set."""
    before = os.environ.get("DECANT_STORE")
    os.environ["DECANT_STORE"] = str(folder)
    try:
        for codec in ("bfloat16", "int8", "mvq8"):
            write_store(codec)
    finally:
        if before is None:
            del os.environ["DECANT_STORE"]
        else:
            os.environ["DECANT_STORE"] = before


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "store-v1-codecs")
