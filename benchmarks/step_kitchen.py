"""What bench_step.py trains on: noise, three random teachers with stores of random frames, and the students' settings."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from bench_extract import TINY
from transformers import HubertConfig, HubertModel

from cache.frames import RATE_HZ
from cache.manifest import Manifest, Utterance
from cache.publish import write_json
from cache.ragged import Store
from cache.receipts import make_receipt, open_receipt, store_key
from cache.waves import WaveWriter
from cache.writer import open_writer
from pipeline.distill.plan import Full, plan_epoch
from pipeline.distill.settings import StudentParams
from pipeline.extraction.job import plan_job
from pipeline.extraction.settings import Calibration, ExtractParams, Fail, Keep
from pipeline.teachers.forward import Teacher
from pipeline.teachers.pinned import Pinned

ALONE, THREE, WHOLE = "DistilHuBERT, 1 teacher", "DistilHuBERT, 3 teachers", "DPHuBERT, 1 teacher"
GATES = {"conv": 0.01, "heads": 0.01, "ffn": 0.5}


class Size(NamedTuple):
    """What is trained on what."""

    teacher: dict[str, Any]
    """What differs from HuBERT Base."""
    layers: tuple[int, int, int]
    """That are kept of each teacher."""
    seconds: tuple[float, float]
    """Shortest and longest utterance."""
    batch_seconds: float
    batches: int
    """There are so many, and one turn takes each once."""


QUICK = Size(TINY, (2, 3, 4), (1.0, 1.2), 6.0, 4)
CPU = Size({}, (4, 8, 12), (2.2, 2.6), 8.0, 4)
CUDA = Size({}, (4, 8, 12), (4.0, 15.6), 160.0, 16)


class Kitchen:
    """A corpus of noise, three teachers and their stores."""

    def __init__(self, size: Size, root: Path, codec: str, device: str) -> None:
        self.size, self.root, self.device = size, root, device
        self.manifest, self.waves = self._corpus()
        config = HubertConfig(**size.teacher, attn_implementation="sdpa")
        self.config = config
        self.teachers = {name: self._teacher(name, config) for name in ("one", "two", "three")}
        for name, teacher in self.teachers.items():
            self._store(name, teacher, codec)

    def _corpus(self) -> tuple[Manifest, Store]:
        rng, size = np.random.default_rng(0), self.size
        utterances: list[Utterance] = []
        with WaveWriter(self.root / "store" / "waves") as writer:
            while len(utterances) < 2 or not self._enough(utterances):
                samples, name = int(rng.uniform(*size.seconds) * RATE_HZ), f"noise/{len(utterances):04d}"
                audio = writer.add(name, rng.normal(0, 3_000, samples).astype(np.int16))
                file = name, "noise", f"{name}.wav", samples, RATE_HZ, samples, 2 * samples
                utterances.append(Utterance(*file, audio, "train", {}))
            manifest = Manifest(tuple(utterances))
            fingerprint = {"audio": manifest.audio_digest}
            place = writer.finish(store_key("waves", fingerprint), fingerprint)
        return manifest, open_receipt(make_receipt(place, ["wave"]), verify=True)

    def _enough(self, utterances: list[Utterance]) -> bool:
        samples = np.array([u.samples for u in utterances])
        return len(plan_epoch(samples, Full(kind="full"), self.size.batch_seconds, 0, 0)) >= self.size.batches

    def _teacher(self, name: str, config: HubertConfig) -> Teacher:
        torch.manual_seed(len(name))
        model = HubertModel(config)
        sizes = config.num_hidden_layers + 1, config.hidden_size, sum(p.numel() for p in model.parameters())
        pinned = Pinned("hubert", name, {"kind": "random"}, False, *sizes)
        return Teacher(model, pinned, torch.device(self.device))

    def _store(self, name: str, teacher: Teacher, codec: str) -> None:
        """Random frames, where extraction would have put the teacher's."""
        params = ExtractParams(
            version=1,
            codec=codec,
            chunk_frames=64,
            shard_frames=65_536,
            batch_seconds=self.size.batch_seconds,
            long=Fail(kind="fail", max_sec=60.0),
            calibration=Calibration(seconds=10, seed=0),
        )
        kept: tuple[Any, ...] = ("projection", *self.size.layers)
        job = plan_job(teacher, self.manifest, params, Keep(layers=kept, select="all"), self.device)
        rng = np.random.default_rng(len(name))
        with open_writer(job.directory, job.header, [u.id for u in job.manifest], job.rows, job.arrays) as writer:
            for array in job.arrays:
                for shard in range(job.plan.num_shards):
                    rows = rng.standard_normal((job.plan.used_rows(shard), teacher.width), dtype=np.float32)
                    writer.write(array, shard, rows.astype(np.float16 if codec == "float16" else np.float32))
        write_json(self.root / "receipts" / f"{name}.json", make_receipt(job.directory, job.arrays))

    def student(self, method: str) -> StudentParams:
        """Settings of one of the three."""
        config, layers = self.config, self.size.layers
        whole = method == WHOLE
        blocks = config.num_hidden_layers if whole else 2
        shape = {
            "conv_channels": config.conv_dim,
            "conv_spans": None,
            "conv_bias": False,
            "front_norm": "group",
            "feature_norm": whole,
            "feature_norm_width": None,
            "feature_scale": False,
            "projection": True,
            "normalise": False,
            "width": config.hidden_size,
            "heads": [config.num_attention_heads] * blocks,
            "head_width": config.hidden_size // config.num_attention_heads,
            "ffn": [config.intermediate_size] * blocks,
            "position_bias": None,
            "kept_heads": None,
            "shares_attention": None,
            "position_kernel": config.num_conv_pos_embeddings,
            "position_groups": config.num_conv_pos_embedding_groups,
            "pre_norm": False,
            "dropout": {"features": 0.1, "hidden": 0.1, "attention": 0.1, "activation": 0.1},
        }
        single = {"kind": "single", "teacher": "one", "layers": layers, "normalise": None}
        ensemble, predict, prune = single, {"kind": "last"}, None
        if method == THREE:
            listed = [{"teacher": name, "layers": layers, "weight": 1.0} for name in self.teachers]
            ensemble = {"kind": "heads", "teachers": listed, "normalise": None}
        if whole:
            ensemble = {**single, "layers": ("projection", *layers)}
            predict = {"kind": "layers", "student": "same", "several": "mean", "linears": [[0], [1, 2, 3]]}
            final = {"steps": 0, "learning_rate": 1e-4, "warmup": 0.2}
            prune = {"units": ["conv", "heads", "ffn"], "sparsity": 0.75, "warmup_steps": 5_000, "gate_lr": 0.02}
            prune |= {"lambda_lr": 0.02, "drop": GATES, "rounding": "each", "final": final}
        train = {
            "steps": 50_000,
            "batch_seconds": self.size.batch_seconds,
            "accumulate": 1,
            "crop": {"kind": "full"},
            "shuffle": {"kind": "everywhere"},
            "learning_rate": 2e-4,
            "warmup": 0.3,
            "weight_decay": 0.0,
            "clip": 10.0,
            "feature_grad_mult": 0.1,
            "l1_weight": 1.0,
            "l2_weight": 0.0,
            "cosine_weight": 1.0,
            "cosine": "raw" if whole else "log_sigmoid",
            "target_weights": None,
            "precision": "bfloat16",  # on a GPU alone
            "compile_seconds": None,
            "log_every": 100,
            "validate_every": None,
            "checkpoint_every": 1_000,
            "keep": 0,
            "publish": "last",
        }
        settings = {"ensemble": ensemble, "init": {"kind": "random"}, "shape": shape, "predict": predict}
        return StudentParams.model_validate(settings | {"prune": prune, "augment": None, "train": train, "seed": 0})
