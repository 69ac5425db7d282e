"""What it costs that cached targets are of whole utterances while a student hears a crop: on the teacher, and on students.

python benchmarks/crop_context.py PROJECT [--teacher hubert] [--student distil] [--params params.yaml] [--steps N] [--json FILE]

PROJECT is a folder in which `dvc repro` has prepared speech and made the teacher; the settings are those of --params.

Context: random crops of utterances of at least 6 s. The teacher's layers on the crop are held against the same frames of its
layers on the whole utterance, which is what a store has: relative L2 error, and mean cosine over frames. `edge` are
the frames within 0.25 s of a cut, `middle` all others. The mean over seeds, and the largest distance of a seed from it.

Students, as many updates of batches as long for each, three seeds: `full` hears whole utterances; `aligned` hears crops
and learns the frames of the whole utterances' targets there (`crop: {kind: aligned}`); `own` hears pieces of that length whose
targets the teacher made from the piece alone, as online distillation does. All are judged by the same: loss terms against
the targets of whole utterances of the dev split, heard whole; and against those of pieces, heard as pieces.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from bench_store import machine
from safetensors.torch import load_file

from cache.frames import RATE_HZ, FrameSpan, num_frames
from cache.manifest import Manifest, read_manifest
from cache.names import layer_name
from cache.publish import write_json
from cache.ragged import Store
from cache.receipts import make_receipt, open_receipt, store_key
from cache.waves import WaveWriter
from pipeline.distill.heads import PredictionHeads
from pipeline.distill.settings import StudentParams
from pipeline.distill.train import distil
from pipeline.extract import extract
from pipeline.extraction.settings import ExtractParams, Keep
from pipeline.layers.choose import choose_targets
from pipeline.layers.targets import open_init
from pipeline.padding import INT16_SCALE
from pipeline.student.adopt import adopt, read_shape, save_adopted
from pipeline.student.checkpoint import load_student
from pipeline.teachers.forward import Teacher, load_teacher

EDGE = 12  # frames: 0.24 s
SHORTEST_SEC = 6.0
CONTEXTS_SEC = (1.0, 2.0, 4.0)


def layers_of(teacher: Teacher, wave: np.ndarray) -> torch.Tensor:
    """All layers (L, T, D) of one waveform alone."""
    heard = torch.from_numpy(wave).float()[None] * INT16_SCALE
    with torch.inference_mode():
        return torch.cat(teacher.layers(heard, torch.tensor([len(wave)])))


def context(teacher: Teacher, waves: list[np.ndarray], seconds: float, seed: int) -> dict[str, np.ndarray]:
    """Of each layer: relative L2 error in all frames, near a cut and in the middle; mean cosine of all frames."""
    rng = np.random.default_rng(seed)
    frames = num_frames(int(seconds * RATE_HZ))
    wrong, right, likeness, where = [], [], [], []
    for wave in waves:
        start = int(rng.integers(num_frames(len(wave)) - frames + 1))
        span = FrameSpan(start, frames)
        whole, crop = layers_of(teacher, wave)[:, span.rows], layers_of(teacher, wave[span.samples])
        wrong.append((crop - whole).square().sum(2))  # (L, T)
        right.append(whole.square().sum(2))
        likeness.append(torch.cosine_similarity(crop, whole, dim=2))
        at = torch.arange(frames)
        where.append((at < EDGE) | (at >= frames - EDGE))
    error, energy, edge = torch.cat(wrong, 1).double(), torch.cat(right, 1).double(), torch.cat(where)

    def relative(chosen: torch.Tensor) -> np.ndarray:
        return (error[:, chosen].sum(1) / energy[:, chosen].sum(1)).sqrt().numpy()

    return {
        "all": relative(torch.ones_like(edge)),
        "edge": relative(edge),
        "middle": relative(~edge),
        "cosine": torch.cat(likeness, 1).double().mean(1).numpy(),
    }


def spread(values: list[Any]) -> dict[str, Any]:
    """The mean over seeds and the largest distance from it."""
    array = np.array(values)
    return {"mean": array.mean(0).tolist(), "off": np.abs(array - array.mean(0)).max(0).tolist()}


def pieces_of(manifest: Manifest, waves: Store, seconds: float) -> Iterator[tuple[Any, np.ndarray]]:
    """Every utterance cut on the frame grid into pieces of some seconds; what is left at its end is not used."""
    frames = num_frames(int(seconds * RATE_HZ))
    for u in manifest:
        wave = waves.read("wave", u.id)
        for k in range(u.num_frames // frames):
            piece = wave[FrameSpan(k * frames, frames).samples]
            yield (
                replace(u, id=f"{u.id}-{k}", samples=len(piece), file_samples=len(piece), tasks={}, phones=None),
                piece,
            )


def write_corpus(root: Path, rows: Any) -> tuple[Manifest, Store]:
    """A wave store of some waveforms, and its manifest."""
    utterances = []
    with WaveWriter(root / "waves") as writer:
        for u, wave in rows:
            utterances.append(replace(u, audio=writer.add(u.id, wave)))
        manifest = Manifest(tuple(utterances))
        fingerprint = {"audio": manifest.audio_digest}
        directory = writer.finish(store_key("waves", fingerprint), fingerprint)
    write_json(root / f"{manifest.audio_digest}.json", make_receipt(directory, ["wave"]))
    return manifest, open_receipt(root / f"{manifest.audio_digest}.json")


class Corpus:
    """A manifest, its waveforms, and the teacher's layers of them."""

    def __init__(self, root: Path, name: str, manifest: Manifest, waves: Store, teacher: Teacher, options: Any) -> None:
        self.manifest, self.waves, self.receipts = manifest, waves, root / name
        self.receipts.mkdir()
        params = ExtractParams.model_validate(options.settings["extract"])
        layers = tuple(options.settings["students"][options.student]["ensemble"]["layers"])
        keep = Keep.model_validate({"layers": layers, "select": "all"})
        receipt = extract(teacher, manifest, waves, params, keep, "cpu", lambda *_, **__: None)
        write_json(self.receipts / f"{options.teacher}.json", receipt)
        self.features = open_receipt(self.receipts / f"{options.teacher}.json")
        self.layers = [layer_name(layer) for layer in layers]


def train(corpus: Corpus, root: Path, out: Path, crop: Any, seed: int, options: Any) -> Path:
    """A student of one corpus; the same updates for all."""
    settings = json.loads(json.dumps(options.settings["students"][options.student]))
    settings["seed"] = seed
    settings["train"].update(steps=options.steps, batch_seconds=options.batch_seconds, crop=crop, validate_every=None)
    settings["train"].update(keep=0, publish="last")
    params = StudentParams.model_validate(settings)
    targets = choose_targets(params.ensemble, corpus.receipts, params.init, root / "init")
    start = open_init(targets, params.init, root / "init")
    distil(params, targets, corpus.manifest, corpus.waves, start, out, "cpu", lambda *_, **__: None, print)
    return out


def judge(student: Path, corpus: Corpus) -> dict[str, float]:
    """Mean absolute difference and mean cosine over the frames of the dev split, each utterance alone."""
    encoder = load_student(student).eval()
    width = corpus.features.width
    assert width is not None
    heads = PredictionHeads(encoder.shape.width, len(corpus.layers), width)
    heads.load_state_dict(load_file(student / "heads.safetensors"))
    l1 = cosine = frames = 0.0
    for u in corpus.manifest.select(split="dev"):
        wave = torch.from_numpy(corpus.waves.read("wave", u.id)).float()[None] * INT16_SCALE
        with torch.inference_mode():
            predicted = heads(encoder.read_out(encoder(wave, torch.tensor([u.samples]))))[0]
        rows, _ = corpus.features.read_batch([u.id], corpus.layers)
        target = torch.from_numpy(rows[0].astype(np.float32))
        l1 += float((predicted - target).abs().mean((0, 2)).sum())
        cosine += float(torch.cosine_similarity(predicted, target, dim=2).mean(0).sum())
        frames += u.num_frames
    return {"l1": l1 / frames, "cosine": cosine / frames}


def students(root: Path, manifest: Manifest, waves: Store, teacher: Teacher, options: Any) -> dict[str, Any]:
    """Three ways to train, each seen whole and in pieces."""
    os.environ["DECANT_STORE"] = str(root)
    most = {"train": options.utterances, "dev": options.utterances // 6}
    kept = Manifest(
        tuple(u for split, n in most.items() for u in [v for v in manifest.select(split=split) if long(v)][:n])
    )
    whole = Corpus(root, "whole", *write_corpus(root, ((u, waves.read("wave", u.id)) for u in kept)), teacher, options)
    cut = write_corpus(root, pieces_of(kept, waves, options.crop_seconds))
    pieces = Corpus(root, "pieces", *cut, teacher, options)
    (root / "init").mkdir()
    folder = options.project / "data/teachers" / options.teacher
    shape, digest = read_shape(folder, teacher.pinned.normalise), teacher.pinned.digest
    save_adopted(root / f"init/{options.teacher}.safetensors", adopt(folder), shape, digest)
    aligned = {"kind": "aligned", "max_seconds": options.crop_seconds}
    ways = {"full": (whole, {"kind": "full"}), "aligned": (whole, aligned), "own": (pieces, {"kind": "full"})}
    found: dict[str, Any] = {}
    for name, (corpus, crop) in ways.items():
        judged = []
        for seed in range(options.seeds):
            out = train(corpus, root, root / f"{name}-{seed}", crop, seed, options)
            judged.append([*judge(out, whole).values(), *judge(out, pieces).values()])
        found[name] = spread(judged)
        mean, off = found[name]["mean"], found[name]["off"]
        cells = [f"{m:.4f} ± {o:.4f}" for m, o in zip(mean, off, strict=True)]
        print(
            f"{name:8} heard whole: l1 {cells[0]}, cosine {cells[1]}; as pieces: l1 {cells[2]}, cosine {cells[3]}",
            flush=True,
        )
    return found


def long(utterance: Any) -> bool:
    return bool(utterance.samples >= SHORTEST_SEC * RATE_HZ)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("project", type=Path)
    parser.add_argument("--teacher", default="hubert")
    parser.add_argument("--student", default="distil")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--crops", type=int, default=60, help="of each seed")
    parser.add_argument("--crop-seconds", type=float, default=2.0, help="what the students hear")
    parser.add_argument("--utterances", type=int, default=240, help="that students learn from; a sixth of it judges")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-seconds", type=float, default=16.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.project, options.settings = options.project.resolve(), yaml.safe_load(options.params.read_text())
    os.environ["DECANT_STORE"] = str(options.project / "store")
    begun = time.monotonic()
    manifest = read_manifest(options.project / "data/manifest.jsonl")
    waves = open_receipt(options.project / "receipts/waves.json")
    teacher = load_teacher(options.project / "data/teachers" / options.teacher)
    spoken = [u for u in manifest if long(u)]
    results: dict[str, Any] = {"machine": machine(), "context": {}}
    for seconds in CONTEXTS_SEC:
        found = []
        for seed in range(options.seeds):
            chosen = np.random.default_rng(seed).permutation(len(spoken))[: options.crops]
            found.append(context(teacher, [waves.read("wave", spoken[i].id) for i in chosen.tolist()], seconds, seed))
        table = {name: spread([one[name] for one in found]) for name in found[0]}
        results["context"][f"{seconds:g}"] = table
        for layer in range(teacher.num_layers):
            cells = [f"{name} {of['mean'][layer]:.3f} ± {of['off'][layer]:.3f}" for name, of in table.items()]
            print(f"crop of {seconds:g} s, layer {layer}: {', '.join(cells)}", flush=True)
    if options.steps:
        with tempfile.TemporaryDirectory() as folder:
            results["students"] = students(Path(folder), manifest, waves, teacher, options)
    print(f"{time.monotonic() - begun:.0f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
