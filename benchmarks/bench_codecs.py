"""What each codec costs and loses: bytes, error on real features, speed, and what becomes of a student and its probe.

python benchmarks/bench_codecs.py PROJECT [--seeds 3] [--codecs float32,int8] [--json FILE] [--png FILE] [--quick]

PROJECT is a folder in which `dvc repro` has run: its waveforms, teacher, student settings and probe settings are used;
what is made here goes to a temporary folder. One table:

- bytes a frame, and GB for 960 h of one layer 768 wide, from the layout;
- error of the layers that the student predicts, over every frame of the corpus, against float32: `relative L2` of the
  raw numbers; `unexplained`, the squared error over the variance of the channels, which a large constant channel cannot
  flatter; mean cosine of raw frames;
- encoding and decoding of a batch 768 wide, in GB/s of the float16 it stands for, in torch, on this device;
- a student trained from it: dev loss terms **against the float32 targets**, at the end and on the way, and its score; mean
  and standard deviation over the seeds of the student. Students of one seed start alike and see the same batches with the
  same dropout, so a second table and `--png` have the differences to float32 seed by seed. `--quick` leaves students out.

No promise has a bar here: the page docs/codecs.md holds what was printed.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_store import machine
from codec_curves import Curve, draw_curves, print_curves

from cache.codecs import CODECS, FEATURE_CODECS
from cache.manifest import Manifest, read_manifest
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
from pipeline.distill.plan import Planned, plan_epoch
from pipeline.distill.settings import StudentParams
from pipeline.extract import extract
from pipeline.extraction.settings import ExtractParams, Keep
from pipeline.layers.choose import choose_targets
from pipeline.layers.targets import open_init, open_targets
from pipeline.student.checkpoint import save_student
from pipeline.student.upstream import load_student_upstream
from pipeline.tasks.features import pool
from pipeline.tasks.labels import labelled_splits, task_named
from pipeline.tasks.probe import ProbeParams, probe
from stages._params import read_params

WIDTH = 768  # of a Base model, for bytes and speed
HOURS_960 = 172.8e6  # frames
CHUNK = 64

Row = dict[str, Any]


def nothing(*_: Any, **__: Any) -> None:
    """Progress is not shown."""


class Project:
    """Everything of a finished project that is read here."""

    def __init__(self, root: Path, student: str, task: str | None, steps: int | None, device: str) -> None:
        self.root, self.task, self.device = root, task, device
        params = root / "params.yaml"
        self.manifest = read_manifest(root / "data" / "manifest.jsonl")
        self.waves = open_receipt(root / "receipts" / "waves.json")
        self.extract: ExtractParams = read_params("extract", ExtractParams, params)
        self.student: StudentParams = read_params(f"students.{student}", StudentParams, params)
        if steps is not None:
            shorter = self.student.train.model_copy(update={"steps": steps})
            self.student = self.student.model_copy(update={"train": shorter})
        self.probe = None if task is None else read_params(f"probes.{task}", ProbeParams, params)
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


def train(
    project: Project, receipts: Path, exact: Path, out: Path, seed: int, points: int, thin: int
) -> tuple[Row, Curve]:
    """A student from the receipts' store: its score, and its dev terms against the float32 store after every so many steps."""
    student, device = project.student.model_copy(update={"seed": seed}), project.device
    settings = student.train
    assert settings.accumulate == 1
    targets, truth = (choose_targets(student.ensemble, r, student.init, project.init) for r in (receipts, exact))
    stores, exact_stores = open_targets(targets), open_targets(truth)
    make, make_exact = (
        TargetMaker(student.ensemble, t, s, device) for t, s in ((targets, stores), (truth, exact_stores))
    )
    learner = first_learner(student, targets, open_init(targets, student.init, project.init), device, make)
    splits = [project.manifest.select(split=name) for name in ("train", "dev")]
    splits[1] = Manifest(splits[1].utterances[::thin])
    arrays = [list(targets.stores[0].arrays)]
    reader, judge = (
        BatchReader(m, project.waves, s, arrays) for m, s in zip(splits, (stores, exact_stores), strict=True)
    )
    names = target_names(student.ensemble, truth)
    curve: Curve = []

    def note(step: int) -> None:
        plan = plan_epoch(judge.samples, settings.crop, settings.batch_seconds, 0, 0)
        learner.make_targets = make_exact
        curve.append({"step": step, **learner.evaluate(map(judge.read_clean, plan), names)})
        learner.make_targets = make

    def planned() -> Iterator[Planned]:
        epochs = (plan_epoch(reader.samples, settings.crop, settings.batch_seconds, seed, n) for n in count())
        return (Planned(n, items) for n, items in enumerate(chain.from_iterable(epochs)))

    note(0)
    with reader.ahead(islice(planned(), settings.steps), settings.batch_seconds, 1, learner.device) as batches:
        for step, batch in enumerate(batches, 1):
            learner.update([batch], int(batch.frames.sum()), step)
            if step * points // settings.steps > (step - 1) * points // settings.steps:
                note(step)
    row = {"dev l1": curve[-1]["l1"], "dev cosine": curve[-1]["cosine"]}
    if project.task is not None:
        out.mkdir()
        save_student(out, learner.encoder, {})
        row[f"{project.task} %"] = score(project, out)
    return row, curve


def score(project: Project, student: Path) -> float:
    """Of the probe, in percent."""
    assert project.task is not None
    assert project.probe is not None
    splits = labelled_splits(project.manifest, task_named(project.task))
    params = project.extract.model_copy(update={"codec": "float32"})
    keep = Keep(layers="all", select="labelled")
    upstream = load_student_upstream(student, project.device)
    receipt = extract(upstream, project.manifest, project.waves, params, keep, project.device, nothing)
    pooled = pool(open_receipt(receipt), sorted(receipt["arrays"]), project.manifest, splits.ids, False)
    return 100 * probe(pooled, splits, project.probe, torch.device(project.device)).mean


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--student", default="distil", help="whose layers are kept and which is trained")
    parser.add_argument("--task", default="kws", help="the probe that judges, or none")
    parser.add_argument("--codecs", default=",".join(FEATURE_CODECS))
    parser.add_argument("--seeds", type=int, default=3, help="students a codec")
    parser.add_argument("--points", type=int, default=6, help="of a curve, evenly over the steps")
    parser.add_argument("--thin", type=int, default=1, help="every so many-th utterance of dev judges a student")
    parser.add_argument("--steps", type=int, help="of each student; as in its settings unless given")
    parser.add_argument("--quick", action="store_true", help="no students")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--png", type=Path, help="draw the curves here; they need float32 among the codecs")
    options = parser.parse_args()
    device, task = choose_device("auto"), None if options.task == "none" else options.task
    os.environ.setdefault("DECANT_STORE", str(options.project / "store"))
    waves = Path(os.environ["DECANT_STORE"]).resolve() / "waves"
    table: dict[str, Row] = {}
    curves: dict[str, list[Curve]] = {}
    with tempfile.TemporaryDirectory(prefix="bench-codecs-") as folder:
        place = Path(folder)
        os.environ["DECANT_STORE"] = str(place / "store")
        (place / "store").mkdir()
        (place / "store" / "waves").symlink_to(waves)
        project = Project(options.project, options.student, task, options.steps, device)
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
                    train(
                        project,
                        receipts,
                        place / "float32",
                        place / f"{name}-{seed}",
                        seed,
                        options.points,
                        options.thin,
                    )
                    for seed in range(options.seeds)
                ]
                row |= {what: [run[what] for run, _ in runs] for what in runs[0][0]}
                curves[name] = [curve for _, curve in runs]
            table[name] = row
            print(name, {k: np.round(v, 6).tolist() for k, v in row.items()}, file=sys.stderr, flush=True)
    print_table(table)
    if "float32" in curves:
        print_curves(curves)
        if options.png:
            draw_curves(curves, options.png)
    if options.json:
        described = {"machine": machine(), "device": device, "width": exact.width, "frames": int(exact.rows.sum())}
        options.json.write_text(json.dumps(described | {"codecs": table, "curves": curves}, indent=1) + "\n")


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
