"""Losses over the steps of students of several codecs and seeds in; a table and a picture of them out, float32 as the measure.

Students of one seed start alike and see the same batches with the same dropout, so they are compared seed by seed.
"""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot

Curve = list[dict[str, float]]
"""The dev terms against the float32 targets after some steps."""


def differences(curves: dict[str, list[Curve]], term: str) -> dict[str, Any]:
    """Of each codec but float32, the term minus that of float32 at the same step of the same seed: (seeds, points)."""
    exact = np.array([[point[term] for point in curve] for curve in curves["float32"]])
    return {
        codec: np.array([[point[term] for point in curve] for curve in of_codec]) - exact
        for codec, of_codec in curves.items()
        if codec != "float32"
    }


def print_curves(curves: dict[str, list[Curve]]) -> None:
    """Markdown: the loss of float32 over the steps, and how much higher those of the others are, seed by seed."""
    steps = [int(point["step"]) for point in curves["float32"][0]]
    print("\n| dev loss after steps | " + " | ".join(map(str, steps)) + " |")
    print("|---" * (len(steps) + 1) + "|")
    exact = np.array([[point["total"] for point in curve] for curve in curves["float32"]])
    rows = {"float32": exact} | {f"{codec} - float32": d for codec, d in differences(curves, "total").items()}
    for name, values in rows.items():
        spread = values.std(0, ddof=1) if len(values) > 1 else np.zeros(len(steps))
        cells = [
            f"{m:.4f} ± {sd:.4f}" if name == "float32" else f"{m:+.5f} ± {sd:.5f}"
            for m, sd in zip(values.mean(0), spread, strict=True)
        ]
        print(f"| {name} | " + " | ".join(cells) + " |")


def draw_curves(curves: dict[str, list[Curve]], path: Path) -> None:
    """Left: dev loss against float32 targets over the steps. Right: how far from float32's, seed by seed."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    steps = [point["step"] for point in curves["float32"][0]]
    for codec, of_codec in curves.items():
        values = np.array([[point["total"] for point in curve] for curve in of_codec])
        left.plot(steps, values.mean(0), label=codec)
        left.fill_between(steps, values.min(0), values.max(0), alpha=0.2)
    for codec, values in differences(curves, "total").items():
        (line,) = right.plot(steps, np.abs(values).mean(0), label=codec)
        right.fill_between(steps, np.abs(values).min(0), np.abs(values).max(0), alpha=0.2, color=line.get_color())
    left.set(xlabel="step", ylabel="dev loss against float32 targets")
    right.set(xlabel="step", ylabel="|difference to float32|, same seed", yscale="log")
    left.legend()
    right.legend()
    figure.savefig(path, dpi=120)
