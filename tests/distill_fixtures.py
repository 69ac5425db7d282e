"""A small world in a folder: noise of eleven lengths, a random encoder as the teacher, its layers in a store."""

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from cache.manifest import Manifest, Utterance, write_manifest
from cache.publish import write_json
from cache.receipts import make_receipt, open_receipt, store_key, store_path
from cache.waves import WaveWriter
from pipeline.distill.curves import Log
from pipeline.distill.settings import StudentParams
from pipeline.distill.train import distil
from pipeline.extract import extract
from pipeline.extraction.settings import Calibration, ExtractParams, Fail, Keep
from pipeline.layers.choose import choose_targets
from pipeline.layers.ensembles import SingleTeacher
from pipeline.layers.targets import Adopted, Targets, targets_json
from pipeline.student.adopt import save_adopted
from pipeline.student.checkpoint import save_student
from pipeline.student.encoder import Encoder, initialise
from pipeline.student.shape import EncoderShape
from pipeline.student.upstream import load_student_upstream
from stages._params import read_params

SHAPE: dict[str, Any] = {
    "conv_channels": [4, 4, 4, 4, 4, 4, 8],
    "conv_spans": None,
    "conv_bias": False,
    "front_norm": "group",
    "feature_norm": True,
    "feature_norm_width": None,
    "feature_scale": False,
    "projection": True,
    "normalise": False,
    "width": 16,
    "heads": [2, 2, 2],
    "head_width": 8,
    "ffn": [24, 24, 24],
    "position_bias": None,
    "kept_heads": None,
    "shares_attention": None,
    "position_kernel": 8,
    "position_groups": 2,
    "pre_norm": False,
    "dropout": {"features": 0.1, "hidden": 0.1, "attention": 0.1, "activation": 0.1},
}
STUDENT: dict[str, Any] = {
    "ensemble": {"kind": "single", "teacher": "hubert", "layers": [3, 1], "normalise": None},
    "init": {"kind": "adopted", "teacher": "hubert", "final_norm": False},
    "shape": {**SHAPE, "feature_norm": False, "heads": [2, 2], "ffn": [24, 24]},
    "predict": {"kind": "last"},
    "prune": None,
    "augment": None,
    "train": {
        "steps": 12,
        "batch_seconds": 2.0,
        "accumulate": 1,
        "crop": {"kind": "aligned", "max_seconds": 0.7},
        "shuffle": {"kind": "everywhere"},
        "learning_rate": 0.002,
        "warmup": 0.1,
        "weight_decay": 0.01,
        "clip": 5.0,
        "feature_grad_mult": 0.1,
        "l1_weight": 1.0,
        "l2_weight": 0.0,
        "cosine_weight": 1.0,
        "cosine": "log_sigmoid",
        "target_weights": None,
        "precision": "float32",
        "compile_seconds": None,
        "log_every": 3,
        "validate_every": 5,
        "checkpoint_every": 2,
        "keep": 0,
        "publish": "last",
    },
    "seed": 3,
}
SAMPLE = Calibration(seconds=60, seed=0)
PRUNE = {
    "units": ["conv", "heads", "ffn"],
    "sparsity": 0.4,
    "warmup_steps": 2,
    "gate_lr": 0.02,
    "lambda_lr": 0.02,
    "drop": {"conv": 0.01, "heads": 0.01, "ffn": 0.5},
    "rounding": "size",
    "final": {"steps": 6, "learning_rate": 0.001, "warmup": 0.1},
}
EXTRACT = ExtractParams(
    version=1,
    codec="float16",
    chunk_frames=16,
    shard_frames=256,
    batch_seconds=4.0,
    long=Fail(kind="fail", max_sec=60.0),
    calibration=SAMPLE,
)


@dataclass(frozen=True)
class World:
    """Paths of everything a distillation reads."""

    root: Path
    manifest: Manifest

    def command(self) -> list[str]:
        """`decant distill` on this world, as a process."""
        return [
            *(sys.executable, "-m", "stages", "distill", "distil", "--device", "cpu"),
            *("--targets", str(self.root / "targets.json"), "--manifest", str(self.root / "manifest.jsonl")),
            *("--waves", str(self.root / "receipts/waves.json"), "--init", str(self.root / "init")),
            *("--out", str(self.root / "models/distil"), "--params", str(self.root / "params.yaml")),
        ]

    def environment(self, **more: str) -> dict[str, str]:
        """Where the process finds the code and the stores."""
        code = str(Path(__file__).parent.parent)
        path = os.pathsep.join([*more.pop("first_on_path", "").split(), code])
        return {
            **os.environ,
            "PYTHONPATH": path,
            "DECANT_STORE": str(self.root / "store"),
            "OMP_NUM_THREADS": "1",
            **more,
        }


STOP_BEFORE = """
import signal, sys
import pipeline.distill.loop as module
from stages.distill import app
save = module.save_state
def stopping(directory, progress, *rest):
    if progress.step >= int(sys.argv[1]):
        signal.alarm(300)  # not for ever, should the test itself be killed
        signal.pause()  # alive until it is killed, on a machine of any speed
    save(directory, progress, *rest)
module.save_state = stopping
app(sys.argv[2:])
"""
"""`decant distill` that waits to be killed before it saves the state after a step."""


def without_teachers(world: World) -> dict[str, str]:
    """Delete every teacher; gives an environment in which nothing that loads one can be imported."""
    shutil.rmtree(world.root / "teachers")
    blocker = world.root / "blocker"
    blocker.mkdir()
    (blocker / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('transformers', 'huggingface_hub') or name == 'pipeline.teachers':\n"
        "            raise ImportError(f'{name} is not installed here')\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    return world.environment(first_on_path=str(blocker))


def write_params(world: World, **changes: Any) -> None:
    """params.yaml with one student; changes are given per section ({"train": {"steps": 3}})."""
    student = {k: {**v, **changes.get(k, {})} if isinstance(v, dict) else changes.get(k, v) for k, v in STUDENT.items()}
    student["init"] = changes.get("init", STUDENT["init"])
    if "kind" in changes.get("ensemble", {}):
        student["ensemble"] = changes["ensemble"]
    (world.root / "params.yaml").write_text(yaml.safe_dump({"students": {"distil": student}}))


def make_world(root: Path, teacher_seed: int = 0) -> World:
    """Write a corpus, its wave store, a teacher's receipts and init, and a params file; needs DECANT_STORE set."""
    generator = np.random.default_rng(7)
    lengths = generator.integers(3_000, 19_000, size=11)
    waves = [(generator.standard_normal(n) * 3_000).astype(np.int16) for n in lengths]
    utterances = []
    with WaveWriter(root / "store/waves") as writer:
        for i, wave in enumerate(waves):
            audio = writer.add(f"utt-{i:02d}", wave)
            split = "dev" if i in (2, 5) else "train"
            length = len(wave)
            utterances.append(
                Utterance(f"utt-{i:02d}", "noise", f"{i}.wav", length, 16_000, length, 2 * length, audio, split, {})
            )
        manifest = Manifest(tuple(utterances))
        fingerprint = {"audio": manifest.audio_digest}
        key = store_key("waves", fingerprint)
        directory = writer.finish(key, fingerprint)
    write_json(root / "receipts/waves.json", make_receipt(directory, ["wave"]))
    write_manifest(root / "manifest.jsonl", manifest)
    world = World(root, manifest)
    write_receipt(world, "hubert", teacher_seed)
    write_params(world)
    assert store_path("waves", key) == directory
    return world


def make_world_and_targets(root: Path) -> World:
    """The same with the targets of the default student."""
    world = make_world(root)
    write_json(root / "targets.json", targets_json(targets_of(world)))
    return world


def write_receipt(
    world: World,
    teacher: str,
    seed: int,
    layers: tuple[Any, ...] = (0, 1, 3),
    params: ExtractParams = EXTRACT,
    **shape: Any,
) -> None:
    """Run a random encoder over the corpus; leave its receipt, and its weights as an init."""
    encoder = Encoder(EncoderShape.model_validate({**SHAPE, **shape}))
    initialise(encoder, torch.Generator().manual_seed(seed))
    folder = world.root / "teachers" / teacher
    folder.mkdir(parents=True, exist_ok=True)
    save_student(folder, encoder, {})
    (world.root / "init").mkdir(exist_ok=True)
    save_adopted(world.root / "init" / f"{teacher}.safetensors", encoder.state_dict(), encoder.shape, teacher)
    store = open_receipt(world.root / "receipts/waves.json")
    keep = Keep(layers=layers, select="all")
    receipt = extract(load_student_upstream(folder), world.manifest, store, params, keep, "cpu", lambda *_, **__: None)
    write_json(world.root / "receipts" / f"{teacher}.json", receipt)


def targets_of(world: World) -> Targets:
    """Layers 3 and 1 of the teacher."""
    ensemble = SingleTeacher(kind="single", teacher="hubert", layers=(3, 1), normalise=None)
    init = Adopted(kind="adopted", teacher="hubert", final_norm=False)
    return choose_targets(ensemble, world.root / "receipts", init, world.root / "init")


def train_student(
    world: World,
    out: str = "models/distil",
    manifest: Manifest | None = None,
    init: str | None = "init/hubert.safetensors",
    said: list[str] | None = None,
    device: str = "cpu",
    tick: Callable[..., None] = lambda *_, **__: None,
    logs: Sequence[Log] = (),
) -> dict[str, Any]:
    """`distil` in this process, with the settings of params.yaml; gives its metrics."""
    return distil(
        read_params("students.distil", StudentParams, world.root / "params.yaml"),
        targets_of(world),
        manifest or world.manifest,
        open_receipt(world.root / "receipts/waves.json"),
        [] if init is None else [world.root / init],
        world.root / out,
        device,
        tick,
        (lambda _: None) if said is None else said.append,
        logs=logs,
    )


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a product, by their names in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def relabelled(manifest: Manifest, **changes: Any) -> Manifest:
    """A manifest whose utterances have other labels."""
    return Manifest(tuple(replace(u, **changes) for u in manifest))
