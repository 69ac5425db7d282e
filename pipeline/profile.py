"""Models in, what each of them costs out: parameters, bytes on disk, multiply-accumulates, and seconds on this CPU.

Multiply-accumulates are counted, not measured: every matrix product and convolution of one forward over an utterance of a
stated length, attention among them, which grows with the square of that length. What no library counts is left out: the
Fourier transform of log-mel features, norms and activations.

Seconds are measured: one utterance at a time, in rounds in which every model has its turn, so that what else the machine
does falls on all of them alike. Figures of one file are of one run on one machine; those of two files are not.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from random import Random

import torch
from jaxtyping import Float, Int64
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cache.errors import SettingsError
from cache.frames import FIELD, RATE_HZ
from pipeline.models import open_model
from pipeline.upstream import Upstream

TURN_SECONDS = 0.05
"""A turn repeats what is over sooner, so that the clock and the scheduler weigh little."""
QUIET = 1000.0
"""What is heard is noise of this amplitude, of 32768: how loud it is changes no cost."""


class ProfileParams(BaseModel, frozen=True, extra="forbid"):
    """On what models are measured."""

    seconds: tuple[float, ...] = Field(min_length=1)
    """Lengths of the utterance; tables show the longest."""
    rounds: int = Field(ge=5)
    """Turns of every model at every length; what is told is their median and quartiles."""
    threads: int = Field(ge=1)
    """Of torch; 1 is what a small device has, and what is repeatable."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Of the rounds."""

    median: float
    low: float
    """First quartile."""
    high: float
    """Third quartile."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one utterance."""

    seconds: float
    macs: int
    """Multiply-accumulates of the utterance."""
    macs_per_second: float
    """Of audio."""
    rtf: Spread
    """Seconds of computing per second of audio."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Of one model."""

    kind: str
    digest: str
    """Of what it computes: that of the features it was probed by."""
    num_params: int
    weight_bytes: int
    """Of its safetensors files, heads apart; 0 where there are none."""
    costs: tuple[Cost, ...]
    """By length, the shortest first."""


def profile(
    models: Mapping[str, Path], params: ProfileParams, on_turn: Callable[[float], None] | None = None
) -> dict[str, Profile]:
    """Open every model on the CPU and measure it; `on_turn` hears of every turn.

    Raises:
        SettingsError: an utterance too short for a frame.
        StoreError: something that is no model.
    """
    lengths = sorted({round(seconds * RATE_HZ) for seconds in params.seconds})
    if lengths[0] < FIELD:
        raise SettingsError(
            f"profile.seconds has {lengths[0] / RATE_HZ:g}, and a frame needs {FIELD} samples: at least {FIELD / RATE_HZ:g}"
        )
    opened = {name: open_model(path, "cpu") for name, path in models.items()}
    turns = [(name, samples) for name in opened for samples in lengths]
    before = torch.get_num_threads()
    torch.set_num_threads(params.threads)
    try:
        macs = {turn: count_macs(opened[turn[0]], turn[1]) for turn in turns}
        times = _timed(opened, turns, params.rounds, on_turn or (lambda _: None))
    finally:
        torch.set_num_threads(before)
    found = {}
    for name, model in opened.items():
        described = model.describe()
        costs = tuple(_cost(samples, macs[name, samples], times[name, samples]) for samples in lengths)
        found[name] = Profile(
            described["kind"], described["digest"], described["num_params"], weight_bytes(models[name]), costs
        )
    return found


def count_macs(model: Upstream, samples: int) -> int:
    """Multiply-accumulates of one utterance of so many samples; a pure function of the model's shape."""
    # in its plain form attention is two matrix products, and the counter knows those on every device
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.layers(*_utterance(samples))
    return int(counter.get_total_flops()) // 2


def weight_bytes(path: Path) -> int:
    """What the weights of a model take on the disk: of a student without its heads, of a teacher all shards."""
    own = path / "weights.safetensors"
    files = [own] if own.exists() else path.glob("*.safetensors") if path.is_dir() else []
    return sum(file.stat().st_size for file in files)


def machine() -> dict[str, str | int]:
    """What decides the seconds, without a name or a path."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {"cpu": cpu, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__}


def _timed(
    opened: Mapping[str, Upstream],
    turns: list[tuple[str, int]],
    rounds: int,
    on_turn: Callable[[float], None],
) -> dict[tuple[str, int], list[float]]:
    """Seconds of one forward, by model and length: one figure a round. The order is drawn anew for each round."""
    repeats = {}
    for name, samples in turns:  # warms up, and tells how often a turn repeats it
        _seconds(opened[name], samples, 1)
        repeats[name, samples] = max(1, ceil(TURN_SECONDS / _seconds(opened[name], samples, 1)))
    times: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
    order, shuffled = Random(0), list(turns)
    for _ in range(rounds):
        order.shuffle(shuffled)
        for name, samples in shuffled:
            times[name, samples].append(_seconds(opened[name], samples, repeats[name, samples]))
            on_turn(1.0)
    return times


def _seconds(model: Upstream, samples: int, repeats: int) -> float:
    """Of one forward, the mean of some."""
    heard = _utterance(samples)
    start = time.perf_counter()
    for _ in range(repeats):
        model.layers(*heard)
    return (time.perf_counter() - start) / repeats


def _utterance(samples: int) -> tuple[Float[Tensor, "1 S"], Int64[Tensor, "1"]]:
    noise = torch.randn(1, samples, generator=torch.Generator().manual_seed(0))
    return noise * (QUIET / 32768), torch.tensor([samples])


def _cost(samples: int, macs: int, times: list[float]) -> Cost:
    audio = samples / RATE_HZ
    low, median, high = (quartile / audio for quartile in statistics.quantiles(times, n=4, method="inclusive"))
    return Cost(audio, macs, macs / audio, Spread(median, low, high))
