"""A small world with two teachers and a similarity, and students of every method: what differs between the papers."""

from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cache.publish import read_json, write_json
from tests.distill_fixtures import SHAPE, STUDENT, World, make_world, write_receipt

KEPT = ("projection", 0, 1, 2, 3)
FULL = {"shape": SHAPE, "init": {"kind": "adopted", "teacher": "hubert", "final_norm": True}}
THIN = {  # FitHuBERT's stack of convolutions, and narrower than its teacher
    **SHAPE,
    "conv_spans": [[10, 5], [1, 1], [3, 2], [3, 2], [3, 2], [3, 2], [1, 1], [2, 2], [2, 2]],
    "conv_channels": [3, 4, 4, 4, 4, 4, 8, 8, 8],
    "width": 12,
    "head_width": 6,
}
SAME = {"kind": "layers", "student": "same", "several": "mean", "linears": "one"}
ALIKE = [[1, 0.1, 0.1, 0.1], [0.1, 1, 0.2, 0.9], [0.1, 0.2, 1, 0.3], [0.1, 0.9, 0.3, 1]]  # layers 1 and 3
GROUPS = {"num_groups": 2, "linkage": "average", "contiguous": False, "leave_out": [0]}


def of(*layers: Any, teacher: str = "hubert") -> dict[str, Any]:
    """One teacher."""
    return {"kind": "single", "teacher": teacher, "layers": list(layers), "normalise": None}


def together(kind: str) -> dict[str, Any]:
    """Both teachers."""
    weights = {} if kind == "concat" else {"weight": 1.0}
    teachers = [{"teacher": t, "layers": [1, 3], **weights} for t in ("hubert", "wavlm")]
    return {"kind": kind, "teachers": teachers, "normalise": None}


PRUNED = {
    "units": ["conv", "heads", "ffn"],
    "sparsity": 0.4,
    "warmup_steps": 3,
    "gate_lr": 0.2,
    "lambda_lr": 0.2,
    "drop": {"conv": 0.01, "heads": 0.01, "ffn": 0.5},
    "rounding": "size",
    "final": {"steps": 3, "learning_rate": 0.001, "warmup": 0.2},
}
METHODS: dict[str, dict[str, Any]] = {
    "distilhubert": {"ensemble": of(3, 1)},
    "ekd-heads": {"ensemble": together("heads")},
    "ekd-average": {"ensemble": together("average")},
    "ekd-concat": {"ensemble": together("concat")},
    "dphubert": {
        **FULL,
        "ensemble": of("projection", 1, 2, 3),
        "predict": {**SAME, "linears": [[0], [1, 2, 3]]},
        "prune": PRUNED,
        "train": {"cosine": "raw", "weight_decay": 0.0},
    },
    "skill": {
        **FULL,
        "ensemble": {"kind": "groups", "teacher": "hubert", "groups": GROUPS, "normalise": None},
        "predict": SAME,
        "prune": PRUNED,
        "train": {"cosine": "raw", "weight_decay": 0.0},
    },
    "fithubert": {
        "shape": THIN,
        "init": {"kind": "random"},
        "ensemble": of(1, 2, 3),
        "predict": {**SAME, "linears": "each"},
        "train": {"l1_weight": 0.0, "l2_weight": 1.0, "cosine_weight": 0.0, "target_weights": [0.1, 0.1, 1.0]},
    },
}


def student_of(method: str, **train: Any) -> dict[str, Any]:
    """Settings of one student, as they stand below students.NAME."""
    changes = METHODS[method]
    settings = {**STUDENT, **changes}
    settings["train"] = {**STUDENT["train"], **changes.get("train", {}), **train}
    return settings


def make_methods(root: Path, **train: Any) -> World:
    """hubert and wavlm with all their layers in stores, a similarity of hubert's, and a params file with all students."""
    world = make_world(root)
    write_receipt(world, "hubert", seed=0, layers=KEPT)
    write_receipt(world, "wavlm", seed=9, layers=KEPT)
    receipt = read_json(root / "receipts/hubert.json")
    described = {"format": 1, "kind": "similarity", "teacher": "hubert", "key": receipt["key"], "frames": 100}
    described["arrays"] = {name: array["digest"] for name, array in receipt["arrays"].items()}
    described |= {"settings": {"measure": "cka"}, "layers": [0, 1, 2, 3], "matrix": np.array(ALIKE).tolist()}
    write_json(root / "similarity/hubert.json", described)
    students = {method: student_of(method, **train) for method in METHODS}
    (root / "params.yaml").write_text(yaml.safe_dump({"students": students}))
    return world
