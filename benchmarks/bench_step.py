"""Steps of training a second: from the cache, with everything in memory, and with the teachers in the loop, one paired run.

python benchmarks/bench_step.py [--quick] [--rounds 5] [--threads N] [--readers 1] [--codec float16] [--json FILE]

Three students: DistilHuBERT (two blocks of 768) of one teacher and of three (EKD: heads for layers 4, 8 and 12 of each), and
a whole copy that learns to be pruned (DPHuBERT: projection, 4, 8 and 12 of one teacher). Teachers are HuBERT Base with random
weights. The feature stores hold random float16 frames in the layout that extraction gives them (chunks of 64 frames); what a
step costs does not depend on what the numbers are. They lie in the page cache.

The same batches, whole utterances, go through the same learner three ways:

- cached: `BatchReader.ahead`, as `decant distill` reads, every checksum compared;
- in memory: waveforms and rows are there already, on a GPU in its memory;
- online: waveforms are there, and each teacher is run on them without gradients, in float32, as s3prl does.

A turn is a few steps of one of them; a round has one turn of each, in an order drawn anew; a ratio is the median over the
rounds of the ratios within them. Before a turn its first batch has been read, so a turn of N steps reads N batches.

Beside cached / online stands the ceiling that operation counts allow: 1 + teachers / student, in multiply-accumulates of
the forwards, the student's backward counted as two more. What both sides pay besides (the optimiser, which on short batches
is not small) keeps a run below it. On a CPU batches are short, so that a run ends within minutes. A student on a GPU computes
in bfloat16 where it can.

Bars: cached / in memory 0.95 for all; on a CPU cached / online 2.5 for three teachers. `--quick`: a tiny model, no bars.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_store import machine
from step_kitchen import ALONE, CPU, CUDA, QUICK, THREE, WHOLE, Kitchen
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cache.frames import RATE_HZ
from pipeline.devices import choose_device
from pipeline.distill.batches import Batch, BatchReader
from pipeline.distill.build import first_learner
from pipeline.distill.ensemble import TargetMaker
from pipeline.distill.learner import Learner
from pipeline.distill.plan import Planned, plan_epoch
from pipeline.layers.choose import choose_targets
from pipeline.layers.ensembles import AnyEnsemble, members
from pipeline.layers.targets import open_targets
from pipeline.padding import INT16_SCALE
from pipeline.student.encoder import count_parameters
from pipeline.teachers.forward import Teacher

BAR_MEMORY, BAR_ONLINE = 0.95, 2.5
WAYS = ("cached", "in memory", "online")


class Online(TargetMaker):
    """Targets from the teachers themselves, which hear the batch that is being learned from."""

    def __init__(self, ensemble: AnyEnsemble, teachers: dict[str, Teacher]) -> None:
        self.members, self.teachers = members(ensemble), teachers
        self.batch: Batch

    def __call__(self, rows: Sequence[Tensor]) -> list[Tensor]:
        made = []
        for member in self.members:
            teacher = self.teachers[member.teacher]
            waves = self.batch.waves.to(teacher.device).float() * INT16_SCALE
            outputs = teacher.outputs(waves, self.batch.samples)
            chosen = [outputs.projection if n == "projection" else outputs.layers[n] for n in member.layers]
            made.append(torch.stack([layer for layer in chosen if layer is not None], dim=1))
        return made


class Contest:
    """One student, trained in the three ways."""

    def __init__(self, kitchen: Kitchen, method: str) -> None:
        params = kitchen.student(method)
        self.kitchen, self.params = kitchen, params
        targets = choose_targets(params.ensemble, kitchen.root / "receipts", params.init, kitchen.root)
        stores = open_targets(targets, verify=1.0)
        self.cached = TargetMaker(params.ensemble, targets, stores, kitchen.device)
        self.online = Online(params.ensemble, kitchen.teachers)
        self.learner: Learner = first_learner(params, targets, [], kitchen.device, self.cached)
        arrays = [list(store.arrays) for store in targets.stores]
        self.reader = BatchReader(kitchen.manifest, kitchen.waves, stores, arrays)
        plan = plan_epoch(self.reader.samples, params.train.crop, params.train.batch_seconds, 0, 0)
        self.plan = list(plan)[: kitchen.size.batches]
        self.memory = [self._kept(self.reader.read(Planned(n, items))) for n, items in enumerate(self.plan)]
        self.step = 0

    def _kept(self, batch: Batch) -> Batch:
        device = torch.device(self.kitchen.device)
        return batch._replace(waves=batch.waves.to(device), targets=[rows.to(device) for rows in batch.targets])

    def update(self, batch: Batch, make_targets: TargetMaker) -> None:
        """One step; it waits for the device."""
        self.step += 1
        self.learner.make_targets = make_targets
        self.learner.update([batch], int(batch.frames.sum()), self.step)

    def turn(self, way: str, ahead: Iterator[Batch]) -> float:
        """Seconds of one step on each batch."""
        began = time.perf_counter()
        for batch in self.memory:
            if way == "cached":
                self.update(next(ahead), self.cached)
            elif way == "in memory":
                self.update(batch, self.cached)
            else:
                self.online.batch = batch
                self.update(batch._replace(targets=[]), self.online)
        return time.perf_counter() - began

    def rounds(self, number: int, readers: int) -> dict[str, list[float]]:
        """Steps a second of each way."""
        rates: dict[str, list[float]] = {way: [] for way in WAYS}
        rng = np.random.default_rng(1)
        endless = (Planned(n, items) for n, items in enumerate(cycle(self.plan)))
        batch_seconds = self.params.train.batch_seconds
        with self.reader.ahead(endless, batch_seconds, readers, self.learner.device) as ahead:
            self.update(next(ahead), self.cached)  # warms up the optimiser
            if self.kitchen.device != "cpu":  # kernels are chosen, memory is found
                for way in WAYS:
                    self.turn(way, ahead)
            for _ in range(number):
                for place in rng.permutation(len(WAYS)):
                    way = WAYS[place]
                    rates[way].append(len(self.plan) / self.turn(way, ahead))
                if sys.stderr.isatty():
                    print(".", end="", file=sys.stderr, flush=True)
        return rates

    @torch.no_grad()
    def operations(self) -> tuple[int, int]:
        """Multiply-accumulates of one batch: of the student's forward with all that predicts, and of the teachers'."""
        batch = self.memory[0]
        self.online.batch = batch
        self.learner.train()

        def counted(work: Callable[[], Any]) -> int:
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                work()
            return int(counter.get_total_flops()) // 2

        self.learner.make_targets = self.cached
        return counted(lambda: self.learner(batch)), counted(lambda: self.online([]))

    @property
    def audio(self) -> float:
        """Mean seconds of a batch, padding left out."""
        return sum(int(batch.samples.sum()) for batch in self.memory) / RATE_HZ / len(self.memory)

    @property
    def read(self) -> float:
        """Mean bytes of a batch that the reader brings: waveforms and rows, padding left out."""
        rows = sum(t.shape[1] * t.shape[3] * t.element_size() for t in self.memory[0].targets)
        frames = sum(int(batch.frames.sum()) for batch in self.memory)
        return (frames * rows + 2 * sum(int(batch.samples.sum()) for batch in self.memory)) / len(self.memory)


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the ratios within the rounds."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def measure(contest: Contest, rounds: int, readers: int) -> dict[str, Any]:
    """Figures of one student."""
    student, teachers = contest.operations()
    rates = contest.rounds(rounds, readers)
    cached = statistics.median(rates["cached"])
    return {
        "steps per second": {way: [round(rate, 4) for rate in rates[way]] for way in WAYS},
        "cached / in memory": ratio(rates["cached"], rates["in memory"]),
        "cached / online": ratio(rates["cached"], rates["online"]),
        "ceiling": 1 + teachers / (3 * student),
        "GMAC of a step": {"student": round(3 * student / 1e9, 2), "teachers": round(teachers / 1e9, 2)},
        "audio seconds of a batch": round(contest.audio, 2),
        "audio-s/s cached": cached * contest.audio,
        "read MB/s cached": cached * contest.read / 1e6,
        "parameters": count_parameters(contest.learner.encoder) + count_parameters(contest.learner.predictor),
    }


def told(method: str, found: dict[str, Any], bar_online: float | None, bar_memory: float | None) -> bool:
    """Print what was found; gives whether a bar was missed."""
    rates = {way: statistics.median(r) for way, r in found["steps per second"].items()}
    print(f"{method}: " + ", ".join(f"{way} {rate:.3f}" for way, rate in rates.items()) + " steps/s")
    short = False
    for name, bar, more in (
        ("cached / in memory", bar_memory, ""),
        ("cached / online", bar_online, f" of at most {found['ceiling']:.2f} by operation counts"),
    ):
        missed = bar is not None and found[name] < bar
        verdict = "" if bar is None else f" (bar: {bar}) {'FALLS SHORT' if missed else 'ok'}"
        print(f"  {name}: {found[name]:.3f}{more}{verdict}")
        short |= missed
    print(f"  {found['audio-s/s cached']:,.1f} audio-s/s, {found['read MB/s cached']:,.1f} MB/s read", flush=True)
    return short


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, no bars")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of the trainer on a CPU")
    parser.add_argument("--readers", type=int, default=1, help="processes that read ahead")
    parser.add_argument("--codec", choices=("float16", "float32"), default="float16")
    parser.add_argument("--only", help="of the students, those whose name has this in it")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device("auto")
    size = QUICK if options.quick else CPU if device == "cpu" else CUDA
    bars = not options.quick
    print(f"{machine()['cpu']}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device}")
    found: dict[str, Any] = {}
    short = False
    with tempfile.TemporaryDirectory(prefix="bench-step-") as folder:
        os.environ["DECANT_STORE"] = f"{folder}/store"
        kitchen = Kitchen(size, Path(folder), options.codec, device)
        for method in (ALONE, THREE, WHOLE):
            if options.only is None or options.only in method:
                found[method] = measure(Contest(kitchen, method), options.rounds, options.readers)
                bar = BAR_ONLINE if bars and device == "cpu" and method == THREE else None
                short |= told(method, found[method], bar, BAR_MEMORY if bars else None)
    if options.json:
        described = {"machine": machine(), "device": device, "threads": torch.get_num_threads(), "codec": options.codec}
        options.json.write_text(json.dumps(described | {"students": found}, indent=1) + "\n")
    sys.exit(short)


if __name__ == "__main__":
    main()
