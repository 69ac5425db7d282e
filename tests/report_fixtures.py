"""A small made-up run, as the stages leave it: what the tests of the report read."""

import hashlib
import math
from pathlib import Path

from cache.manifest import Manifest, Utterance, write_manifest
from cache.publish import read_json, write_json

WORDS = ("down", "go", "left", "no", "off", "on", "right", "stop", "up", "yes")
PROBE = {
    "head_width": 256,
    "normalise_layers": False,
    "lrs": [0.0001, 0.001, 0.01, 0.1],
    "seeds": [0, 1, 2],
    "steps": 600,
    "batch": 32,
    "class_balanced": True,
    "clip_norm": 1.0,
    "validate_every": 50,
    "patience": None,
}
MODELS = {  # kind, layers, width, parameters, accuracy on kws and sid
    "hubert": ("hubert", 6, 192, 2_513_408, 0.9312, 0.8742),
    "distil": ("student", 3, 192, 1_212_960, 0.8875, 0.8283),
    "small": ("student", 3, 96, 412_300, 0.8421, 0.7642),
    "untrained": ("student", 3, 192, 1_212_960, 0.6104, 0.5921),
    "log-mel": ("log-mel", 1, 80, 0, 0.5833, 0.4983),
}


def utterance(number: int) -> Utterance:
    split = ("train", "train", "train", "dev", "test")[number % 5]
    return Utterance(
        id=f"espeak/{number:04d}",
        corpus="espeak",
        path=f"{number}.wav",
        samples=16_000 + 40 * number,
        rate_hz=22_050,
        file_samples=1,
        file_bytes=1,
        audio="0" * 32,
        split=split,
        tasks={"kws": split, "sid": split} if number % 2 else {"sid": split},
        speaker=f"spk{number % 36:02d}",
        keyword=WORDS[number % 10],
    )


def receipt(kind: str, model: dict, layers: list[str], width: int | None, codec: str) -> dict:
    value_bytes = {"float16": 2, "int16": 2}[codec]
    rows = 204_812 if kind == "features" else 66_101_344
    shards = [[rows * (width or 1) * value_bytes // 4, f"{n:032x}"] for n in range(4)]
    return {
        "format": 1,
        "kind": kind,
        "key": hashlib.sha256(f"{kind} {model}".encode()).hexdigest()[:20],
        "fingerprint": {"model": model, "codec": codec} if model else {},
        "arrays": {name: {"width": width, "codec": codec, "digest": "0" * 64, "shards": shards} for name in layers},
        "utterances": 600,
        "rows": rows,
    }


def write_curve(path: Path, steps: int, floor: float) -> None:
    lines = ["step,rate,l1,cosine,total,grad_norm,dev_l1,dev_cosine,dev_total", "0,,,,,,2.1,0.69,2.79"]
    for step in range(10, steps + 1, 10):
        loss = floor + 0.5 * math.exp(-step / (steps / 6)) + 0.02 * math.sin(step * 1.7) + 1.2 * math.exp(-step / 6)
        dev = f"{loss * 0.6:.5f},{loss * 0.4:.5f},{floor + 0.01 + 0.5 * math.exp(-step / (steps / 6)):.5f}"
        lines.append(f"{step},0.001,{loss * 0.6:.5f},{loss * 0.4:.5f},{loss:.5f},1.0,{dev if step % 50 == 0 else ',,'}")
    path.write_text("\n".join(lines) + "\n")


def write_score(run: Path, model: str, task: str, mean: float) -> None:
    kind, layers, width, num_params, *_ = MODELS[model]
    weights = [math.exp(-abs(layer - 0.6 * layers) * (1.2 if task == "kws" else 0.5)) for layer in range(layers)]
    described = read_json(run / "features" / f"{model}.json")
    write_json(
        run / "reports" / "probe" / f"{model}-{task}.json",
        {
            "format": 1,
            "model": model,
            "task": task,
            "description": {"kind": kind, "width": width, "num_params": num_params, "store": described["key"]},
            "metric": "accuracy",
            "mean": mean,
            "sd": 0.0061,
            "interval": [mean - 0.031, min(1.0, mean + 0.027)],
            "chance": 0.1 if task == "kws" else 1 / 36,
            "majority": 0.1 if task == "kws" else 0.0333,
            "lr": 0.01 if task == "kws" else 0.1,
            "lr_at_edge": task == "sid",
            "layers": [f"layer-{layer:02d}" for layer in range(layers)],
            "layer_weights": [weight / sum(weights) for weight in weights],
            "classes": list(WORDS) if task == "kws" else [f"spk{n:02d}" for n in range(36)],
            "counts": {"train": 1240, "dev": 240, "test": 480},
            "misses": [[["espeak/0004"], "up", "off", 0.91], [["espeak/0009"], "yes", "<go>", 0.4]],
            "params": PROBE,
        },
    )


def write_profile(path: Path) -> Path:
    """What every model of the run costs: a thousand times its parameters, half a millisecond and more."""
    models = {}
    for number, (name, (kind, _, _, num_params, *_)) in enumerate(MODELS.items()):
        costs = []
        for seconds in (1.0, 10.0):
            rtf = {"median": 0.0005 * (number + 1), "low": 0.0004 * (number + 1), "high": 0.0007 * (number + 1)}
            macs = 1000.0 * num_params * (1 + 0.01 * seconds)
            costs.append({"seconds": seconds, "macs": int(macs * seconds), "macs_per_second": macs, "rtf": rtf})
        size = 4 * num_params + 4000 if num_params else 0
        models[name] = {"kind": kind, "digest": name, "num_params": num_params, "weight_bytes": size, "costs": costs}
    machine = {"cpu": "Toy CPU @ 1 GHz", "cores": 2, "torch": "2.0"}
    params = {"seconds": [1.0, 10.0], "rounds": 5, "threads": 1}
    write_json(path, {"format": 1, "kind": "profile", "machine": machine, "params": params, "models": models})
    return path


def write_tuned(models: Path, name: str, start: tuple[str, str], frozen: bool, scores: dict[str, float]) -> None:
    """A fine-tuned model, as `decant finetune` leaves it."""
    tasks = {
        task: {"metric": "-", "mean": mean, "sd": 0.01, "min_dcf": 0.5 if task == "sv" else None}
        for task, mean in scores.items()
    }
    begins = {"kind": start[0], "name": start[1], "digest": "0"}
    write_json(models / name / "shape.json", {"format": 1, "kind": "finetuned", "shape": {}, "settings": {}})
    write_json(
        models / name / "metrics.json",
        {"tasks": tasks, "parameters": {"encoder": 412_300, "heads": 9_000}, "frozen": frozen, "starts_from": begins},
    )


def write_run(run: Path) -> dict[str, Path]:
    """A run as the stages leave it: one teacher, three students (one untrained), a log-mel baseline, two tasks."""
    write_manifest(run / "data" / "manifest.jsonl", Manifest(tuple(utterance(number) for number in range(600))))
    write_json(run / "data" / "quarantine.json", [{"id": "espeak/9999", "path": "9999.wav", "reason": "empty"}])
    write_json(run / "receipts" / "waves.json", receipt("waves", {}, ["wave"], None, "int16"))
    for name, (kind, layers, width, num_params, kws, sid) in MODELS.items():
        model = {"kind": kind, "digest": name, "num_params": num_params, "width": width, "layers": layers}
        names = [f"layer-{layer:02d}" for layer in range(layers)]
        write_json(run / "features" / f"{name}.json", receipt("features", model, names, width, "float16"))
        if kind == "hubert":
            write_json(run / "receipts" / f"{name}.json", receipt("features", model, names[1::2], width, "float16"))
        if kind == "student":
            folder = run / "models" / name
            folder.mkdir(parents=True)
            steps = 0 if name == "untrained" else 1200
            write_curve(folder / "curves.csv", steps, 0.62 if name == "distil" else 0.71)
            settings = {"init": {"kind": "adopted"}, "train": {"steps": steps, "lr": 0.001, "batch_seconds": 60}}
            shape = {"width": width, "heads": [4, 4], "ffn": [768, 768]}
            arrays = [{"name": f"layer-{n:02d}", "digest": "0"} for n in (1, 3, 5)]
            targets = {"stores": [{"key": "0", "arrays": arrays}]}
            facts = {"format": 1, "kind": "student", "shape": shape, "settings": settings, "targets": targets}
            write_json(folder / "shape.json", facts)
            dev = {"l1": 0.3812, "cosine": 0.2466, "total": 0.6278}
            parameters = {"student": num_params, "heads": 296_640}
            write_json(folder / "metrics.json", {"steps": steps, "dev": dev, "parameters": parameters, "epochs": 1})
            (folder / "weights.safetensors").write_bytes(bytes(4 * num_params + 4000))
        write_score(run, name, "kws", kws)
        write_score(run, name, "sid", sid)
    return {
        "manifest": run / "data" / "manifest.jsonl",
        "quarantine": run / "data" / "quarantine.json",
        "waves": run / "receipts" / "waves.json",
        "receipts": run / "receipts",
        "features": run / "features",
        "models": run / "models",
        "probes": run / "reports" / "probe",
    }
