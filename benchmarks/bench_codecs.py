"""What each codec costs and loses: bytes, error on real features, speed, and what becomes of a student and its probe.

python benchmarks/bench_codecs.py PROJECT [--seeds 3] [--codecs float16,int8] [--json FILE] [--quick]

PROJECT is a folder in which `dvc repro` has run: its waveforms, teacher, student settings and probe settings are used;
what is made here goes to a temporary folder. One table:

- bytes a frame, and GB for 960 h of one layer 768 wide, from the layout;
- error of the layers that the student predicts, over every frame of the corpus, against float32: `relative L2` of the
  raw numbers; `unexplained`, the squared error over the variance of the channels, which a large constant channel cannot
  flatter; mean cosine of raw frames;
- encoding and decoding of a batch 768 wide, in GB/s of the float16 it stands for, in torch, on this device;
- a student trained from it: dev loss terms **against the float32 targets**, and its score; mean and standard deviation over
  the seeds of the student. `--quick` leaves the students out.

No promise has a bar here: the page docs/codecs.md holds what was printed.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_store import machine
from safetensors.torch import load_file

from cache.codecs import CODECS, FEATURE_CODECS
from cache.manifest import read_manifest
from cache.publish import write_json
from cache.ragged import Store
from cache.receipts import open_receipt
from cache.zarrshard import CRC_BYTES, ArraySpec
from pipeline.calibrate import fit_tables
from pipeline.codecs import Decoder, encode, to_device
from pipeline.devices import choose_device
from pipeline.distill.batches import BatchReader
from pipeline.distill.build import first_learner, target_names
from pipeline.distill.ensemble import TargetMaker
from pipeline.distill.plan import plan_epoch
from pipeline.distill.settings import StudentParams
from pipeline.distill.train import distil
from pipeline.extract import extract
from pipeline.extraction.settings import ExtractParams, Keep
from pipeline.layers.choose import choose_targets
from pipeline.layers.targets import open_init, open_targets
from pipeline.student.upstream import load_student_upstream
from pipeline.tasks.features import pool
from pipeline.tasks.labels import labelled_splits, task_named
from pipeline.tasks.probe import ProbeParams, probe
from stages._params import read_params

WIDTH = 768  # of a Base model, for bytes and speed
HOURS_960 = 172.8e6  # frames
CHUNK = 64


def nothing(*_: Any, **__: Any) -> None:
    """Progress is not shown."""


class Project:
    """Everything of a finished project that is read here."""

    def __init__(self, root: Path, student: str, task: str, steps: int | None, device: str) -> None:
        self.root, self.task, self.device = root, task, device
        params = root / "params.yaml"
        self.manifest = read_manifest(root / "data" / "manifest.jsonl")
        self.waves = open_receipt(root / "receipts" / "waves.json")
        self.extract: ExtractParams = read_params("extract", ExtractParams, params)
        self.student: StudentParams = read_params(f"students.{student}", StudentParams, params)
        if steps is not None:
            shorter = self.student.train.model_copy(update={"steps": steps})
            self.student = self.student.model_copy(update={"train": shorter})
        self.probe: ProbeParams = read_params(f"probes.{task}", ProbeParams, params)
        self.teacher = self.student.ensemble.teacher
        self.init = root / "data" / "init"

    def features(self, codec: str, receipts: Path) -> Store:
        """The teacher's target layers in a codec; the receipt goes where `choose_targets` looks."""
        from pipeline.teachers.forward import load_teacher

        params = self.extract.model_copy(update={"codec": codec})
        keep = Keep(layers=self.student.ensemble.layers, select="all")
        teacher = load_teacher(self.root / "data" / "teachers" / self.teacher, self.device)
        receipt = extract(teacher, self.manifest, self.waves, params, keep, self.device, nothing)
        write_json(receipts / f"{self.teacher}.json", receipt)
        return open_receipt(receipt)


def errors(kept: Store, exact: Store, device: str) -> dict[str, float]:
    """Relative L2, unexplained variance and mean cosine over every frame of all layers."""
    layers = list(exact.arrays)
    decode, reference = Decoder(kept, layers, device), Decoder(exact, layers, device)
    sums = dict.fromkeys(("error", "energy", "cosine", "frames"), 0.0)
    totals: Any = 0
    squares: Any = 0
    for u in range(len(exact.rows)):
        got, want = (
            d(torch.from_numpy(s.read_batch([u], layers)[0]).to(device))[0].double()
            for d, s in ((decode, kept), (reference, exact))
        )  # (N, T, D)
        sums["error"] += float((got - want).square().sum())
        sums["energy"] += float(want.square().sum())
        sums["cosine"] += float(torch.nn.functional.cosine_similarity(got, want, dim=2).sum())
        sums["frames"] += want.shape[0] * want.shape[1]
        totals, squares = totals + want.sum(1), squares + want.square().sum(1)  # (N, D)
    per_layer = sums["frames"] / len(layers)
    variance = float((squares - totals.square() / per_layer).sum())
    return {
        "relative L2": (sums["error"] / sums["energy"]) ** 0.5,
        "unexplained": sums["error"] / variance,
        "cosine": sums["cosine"] / sums["frames"],
    }


def speeds(name: str, device: str, rounds: int) -> dict[str, float]:
    """GB/s of float16 frames: 4 096 frames encoded, a batch of 8 x 512 frames decoded; medians."""
    codec = CODECS[name]
    frames = torch.randn(4_096, WIDTH, generator=torch.Generator().manual_seed(0)).to(device)
    fitted = fit_tables(frames[:2_048], codec, seed=0)
    tables = to_device(fitted, device)
    decoder = object.__new__(Decoder)  # without a store
    decoder.codec, decoder.tables = codec, {k: t[None] for k, t in tables.items()}
    rows = encode(frames, codec, tables).reshape(8, 1, 512, -1)
    spent: dict[str, list[float]] = {"encode": [], "decode": []}
    for _ in range(rounds + 1):
        for what, work in (("encode", lambda: encode(frames, codec, tables)), ("decode", lambda: decoder(rows))):
            began = time.perf_counter()
            work()
            if device != "cpu":
                torch.cuda.synchronize()
            spent[what].append(time.perf_counter() - began)
    size = frames.numel() * 2 / 1e9
    return {f"{what} GB/s": size / statistics.median(s[1:]) for what, s in spent.items()}


def train(project: Project, receipts: Path, exact: Path, out: Path, seed: int) -> dict[str, float]:
    """A student from the receipts' store: its dev terms against the float32 store, and its score."""
    student, device = project.student.model_copy(update={"seed": seed}), project.device
    targets, truth = (choose_targets(student.ensemble, r, student.init, project.init) for r in (receipts, exact))
    start = open_init(targets, student.init, project.init)
    distil(student, targets, project.manifest, project.waves, start, out, device, nothing, nothing)
    stores, dev = open_targets(truth), project.manifest.select(split="dev")
    learner = first_learner(student, truth, start, device, TargetMaker(student.ensemble, truth, stores, device))
    learner.encoder.load_state_dict(load_file(out / "weights.safetensors"))
    learner.predictor.groups[0].load_state_dict(load_file(out / "heads.safetensors"))
    reader = BatchReader(dev, project.waves, stores, [list(truth.stores[0].arrays)])
    plan = plan_epoch(dev.samples, student.train.crop, student.train.batch_seconds, seed, 0)
    terms = learner.evaluate(map(reader.read_clean, plan), target_names(student.ensemble, truth))
    splits = labelled_splits(project.manifest, task_named(project.task))
    params = project.extract.model_copy(update={"codec": "float32"})
    keep = Keep(layers="all", select="labelled")
    upstream = load_student_upstream(out, device)
    receipt = extract(upstream, project.manifest, project.waves, params, keep, device, nothing)
    pooled = pool(open_receipt(receipt), sorted(receipt["arrays"]), project.manifest, splits.ids, False)
    score = probe(pooled, splits, project.probe, torch.device(device))
    return {"dev l1": terms["l1"], "dev cosine": terms["cosine"], f"{project.task} %": 100 * score.mean}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--student", default="distil", help="whose layers are kept and which is trained")
    parser.add_argument("--task", default="kws", help="the probe that judges")
    parser.add_argument("--codecs", default=",".join(FEATURE_CODECS))
    parser.add_argument("--seeds", type=int, default=3, help="students a codec")
    parser.add_argument("--steps", type=int, help="of each student; as in its settings unless given")
    parser.add_argument("--quick", action="store_true", help="no students")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    device = choose_device("auto")
    os.environ.setdefault("DECANT_STORE", str(options.project / "store"))
    waves = Path(os.environ["DECANT_STORE"]).resolve() / "waves"
    table: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-codecs-") as folder:
        place = Path(folder)
        os.environ["DECANT_STORE"] = str(place / "store")
        (place / "store").mkdir()
        (place / "store" / "waves").symlink_to(waves)
        project = Project(options.project, options.student, options.task, options.steps, device)
        (place / "float32").mkdir()
        exact = project.features("float32", place / "float32")
        for name in options.codecs.split(","):
            size = ArraySpec("", WIDTH, name).row_bytes + CRC_BYTES / CHUNK
            row: dict[str, Any] = {"bytes": ArraySpec("", WIDTH, name).row_bytes, "GB": size * HOURS_960 / 1e9}
            receipts = place / name
            receipts.mkdir(exist_ok=True)
            row |= errors(project.features(name, receipts), exact, device) | speeds(name, device, 5)
            if not options.quick:
                runs = [
                    train(project, receipts, place / "float32", place / f"{name}-{s}", s) for s in range(options.seeds)
                ]
                for what in runs[0]:
                    row[what] = [run[what] for run in runs]
            table[name] = row
            print(name, {k: np.round(v, 6).tolist() for k, v in row.items()}, file=sys.stderr, flush=True)
    print_table(table)
    if options.json:
        described = {"machine": machine(), "device": device, "width": exact.width, "frames": int(exact.rows.sum())}
        options.json.write_text(json.dumps(described | {"codecs": table}, indent=1) + "\n")


def print_table(table: dict[str, dict[str, Any]]) -> None:
    """Markdown."""
    formats = {"bytes": "{:d}", "GB": "{:.1f}", "relative L2": "{:.5f}", "unexplained": "{:.6f}", "cosine": "{:.6f}"}
    formats |= {"encode GB/s": "{:.2f}", "decode GB/s": "{:.2f}"}
    columns = list(next(iter(table.values())))
    print("| codec | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, row in table.items():
        cells = []
        for column, value in row.items():
            if isinstance(value, list):
                spread = statistics.stdev(value) if len(value) > 1 else 0.0
                digits = 1 if column.endswith("%") else 4
                cells.append(f"{statistics.mean(value):.{digits}f} ± {spread:.{digits}f}")
            elif name == "float32" and column.endswith("GB/s"):
                cells.append("–")  # nothing is done
            else:
                cells.append(formats[column].format(value))
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
