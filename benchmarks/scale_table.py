"""Hours of speech in, the tables of docs/scale.md out: bytes, objects, requests and bandwidth, as Markdown.

python benchmarks/scale_table.py

The layout comes from the code, shards an hour from the full run of bench_plan.py, and what a medium gives from the lines
below; nothing here is measured when the script runs. A test holds the page to what is printed.
"""

import json
import math
from pathlib import Path

from cache.codecs import FEATURE_CODECS
from cache.frames import HOP, RATE_HZ
from cache.waves import WAVE_GRID
from cache.zarrshard import CRC_BYTES, ArraySpec, Grid

RESULT = Path(__file__).parent / "results" / "2026-11-21-plan-2cores.json"
HOURS = {"960 h": 960, "60 000 h": 60_000, "1 000 000 h": 1_000_000}
SPEEDS = (1_000, 5_000, 20_000)  # times real time at which a student reads
WIDTH = 768
GRID = Grid(chunk_rows=64, shard_rows=65_536)
LAYERS, TEACHERS = 4, 3
WAVE_BYTES = 2 * RATE_HZ  # a second

CODECS = {name: ArraySpec("", WIDTH, name).row_bytes for name in FEATURE_CODECS}  # bytes of one row
SHOWN = {"float16, bfloat16": "float16", **{name: name for name in ("float32", "int8", "mvq32", "mvq16", "mvq8")}}
ROW_BYTES = dict(sorted(((label, CODECS[name]) for label, name in SHOWN.items()), key=lambda row: -row[1]))

# Assumptions, as ranges a user should replace by his own: (bytes/s one reader gets, seconds to the first byte, seconds a stat)
MEDIA = {
    "NVMe, one drive": (3e9, 0.0001, 0.000016),  # stat: 4.28 - 1.56 s for 165 720 shards in bench_plan.py
    "NFS, 10 Gbit/s": (1e9, 0.001, 0.0005),
    "NFS, 1 Gbit/s": (0.1e9, 0.001, 0.0005),
    "object store, 32 connections": (32 * 0.1e9, 0.05, 0.02),
}
DRIVE_BYTES = 7.68e12


def frames(hours: float) -> float:
    """50 a second, less what the last partial frame of each utterance loses: (S - 400) // 320 + 1 is 50 s - 0.75."""
    return hours * 3600 * RATE_HZ / HOP - 0.75 * utterances(hours)


def plan() -> dict[str, dict[str, float]]:
    return json.loads(RESULT.read_text())["steps"]


def utterances(hours: float) -> float:
    return hours * plan()["draw"]["utterances"] / plan()["draw"]["hours"]


def mean_seconds() -> float:
    return 3600 / utterances(1)


def shards(hours: float, waves: bool = False) -> int:
    """Of one array."""
    return math.ceil(hours * plan()["plan-waves" if waves else "plan"]["shards"] / plan()["draw"]["hours"])


def layer_bytes(hours: float, row_bytes: float) -> float:
    """One array on the disk: rows, a checksum a chunk, and in each shard the index and half a chunk of fill."""
    checks = frames(hours) / GRID.chunk_rows * CRC_BYTES
    return (
        frames(hours) * row_bytes
        + checks
        + shards(hours) * (16 * GRID.chunks + CRC_BYTES + GRID.chunk_rows / 2 * row_bytes)
    )


def wave_bytes(hours: float) -> float:
    return hours * 3600 * WAVE_BYTES + shards(hours, waves=True) * 16 * WAVE_GRID.chunks


def rate(row_bytes: float, layers: int = LAYERS) -> float:
    """Bytes of a second of audio that a student reads: its layers and the waveform."""
    return layers * row_bytes * RATE_HZ / HOP + WAVE_BYTES


def size(num: float) -> str:
    for unit, scale in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if num >= scale:
            return f"{num / scale:.3g} {unit}"
    return f"{num / 1e6:.3g} MB"


def many(num: float) -> str:
    return f"{round(num):,}".replace(",", " ")


def duration(seconds: float) -> str:
    for unit, scale in (("h", 3600), ("min", 60), ("s", 1)):
        if seconds >= scale:
            return f"{seconds / scale:.{0 if seconds >= 10 * scale else 1}f} {unit}"
    return f"{seconds * 1e3:.3g} ms"


def table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return f"### {title}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def bytes_table() -> str:
    rows = [["waveforms, int16", "", *(size(wave_bytes(h)) for h in HOURS.values())]]
    for what, arrays in (("1 layer, or 1 average of teachers", 1), ("4 layers of 3 teachers", LAYERS * TEACHERS)):
        for codec, row in ROW_BYTES.items():
            rows.append([what, codec, *(size(arrays * layer_bytes(h, row)) for h in HOURS.values())])
    return table("Bytes", ["what", "codec", *HOURS], rows)


def drives_table() -> str:
    rows = []
    for codec, row in ROW_BYTES.items():
        counts = [math.ceil((LAYERS * layer_bytes(h, row) + wave_bytes(h)) / DRIVE_BYTES) for h in HOURS.values()]
        rows.append([codec, *map(many, counts)])
    title = f"Drives of {DRIVE_BYTES / 1e12:.2f} TB for the waveforms and 4 layers of one teacher"
    return table(title, ["codec", *HOURS], rows)


def objects_table() -> str:
    rows = [
        ["utterances", *(many(utterances(h)) for h in HOURS.values())],
        ["shards of a layer", *(many(shards(h)) for h in HOURS.values())],
        ["shards of 4 layers of 3 teachers", *(many(LAYERS * TEACHERS * shards(h)) for h in HOURS.values())],
        ["shards of the waveforms", *(many(shards(h, waves=True)) for h in HOURS.values())],
    ]
    for medium, (_, _, stat) in MEDIA.items():
        if medium != "NFS, 1 Gbit/s":
            what = f"opening 4 layers, one stat a shard after another: {medium.split(',')[0]}, {duration(stat)} each"
            rows.append([what, *(duration(LAYERS * shards(h) * stat) for h in HOURS.values())])
    return table("Objects", ["", *HOURS], rows)


def bandwidth_table() -> str:
    rows = []
    for codec, row in ROW_BYTES.items():
        rows.append(
            [
                codec,
                f"{rate(row) / 1e3:.0f} kB",
                *(f"{rate(row) * x / 1e9:.2f} GB/s" for x in SPEEDS),
                many(3e9 / rate(row)),
            ]
        )
    columns = ["codec", "a second of audio", *(f"{many(x)} x" for x in SPEEDS), "x real time from 3 GB/s"]
    return table("Bandwidth of a student that reads 4 layers and the waveform", columns, rows)


def requests_table() -> str:
    rows = []
    for speed in SPEEDS:
        ranges = speed / mean_seconds() * (LAYERS + 1)
        shard_seconds = GRID.shard_rows * HOP / RATE_HZ
        wholes = speed * (LAYERS / shard_seconds + RATE_HZ / WAVE_GRID.shard_rows)
        flying = []
        for name in ("float16", "int8"):
            mean = rate(CODECS[name]) * mean_seconds() / (LAYERS + 1)
            flying.append(many(math.ceil(ranges * (0.05 + mean / 0.1e9))))
        rows.append([f"{many(speed)} x", many(ranges), f"{wholes:.0f}", *flying])
    columns = [
        "",
        "ranges a second, one an utterance and array",
        "whole shards a second, shuffled inside",
        "ranges in flight, object store, float16",
        "the same, int8",
    ]
    return table("Requests", columns, rows)


def media_table() -> str:
    rows = [
        [medium, size(speed) + "/s", *(many(speed / rate(row)) + " x" for row in ROW_BYTES.values())]
        for medium, (speed, _, _) in MEDIA.items()
    ]
    return table("How fast each medium feeds a student (4 layers and the waveform)", ["", "gives", *ROW_BYTES], rows)


def page() -> str:
    return "\n".join(
        [bytes_table(), drives_table(), objects_table(), bandwidth_table(), requests_table(), media_table()]
    )


if __name__ == "__main__":
    print(page(), end="")
