"""The tiny teachers of the embedded default under other seeds, each judged beside log-mel: does one seed say it all?

python benchmarks/teacher_seeds.py [--seeds 1,2] [--teachers hubert,wavlm,...] [--quick] [--work FOLDER] [--json FILE]

In a folder of its own: `decant prepare` once; then, for every seed, params.yaml with `source.seed` of every teacher changed,
`decant teacher`, `extract` of all layers and `probe` on keywords and phones, as dvc.yaml has them. The corpus and the seeds
of the probes stay, so log-mel is judged once. A seed draws the first weights, the units (k-means), masks and batches; robust
and wav2vec2 start from the hubert of the same seed.

The bar: under every seed every teacher is better than log-mel, in accuracy on keywords and in PER on phones. With --work
what is there already is not made again, and a run that was killed goes on. --quick takes a hundredth of the steps, to see
that it runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from bench_store import machine

REPO = Path(__file__).resolve().parent.parent
TASKS = {"kws": True, "pr": False}  # whether higher is better
CORPUS = ("--manifest", "../data/manifest.jsonl", "--waves", "../receipts/waves.json")


def decant(work: Path, *arguments: str) -> None:
    """Run a stage in `work`, unless the file after its --out is there."""
    made = work / arguments[arguments.index("--out") + 1]
    if not made.exists():
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "stages", *arguments], cwd=work, check=True)
        print(f"# {' '.join(arguments[:3])}: {time.perf_counter() - began:.0f} s", flush=True)


def settings(seed: int | None, quick: bool) -> dict[str, Any]:
    """The embedded default with that seed in every teacher; robust and wav2vec2 keep whom they start from."""
    params: dict[str, Any] = yaml.safe_load((REPO / "params.yaml").read_text())
    for teacher in params["teachers"].values():
        if seed is not None:
            teacher["source"]["seed"] = seed
        if quick:
            teacher["source"]["steps"] = [max(1, steps // 100) for steps in teacher["source"]["steps"]]
    if quick:
        for task in TASKS:
            params["probes"][task] |= {"steps": 10, "validate_every": 5, "seeds": [0]}
    return params


def judge(work: Path, model: str, path: str) -> dict[str, float]:
    """The score of a model on each task: extracts its layers and probes them."""
    features = f"receipts/features/{model}.json"
    decant(work, "extract", model, "--model", path, "--keep", "features", *CORPUS, "--out", features)
    scores = {}
    for task in TASKS:
        report = f"reports/{model}-{task}.json"
        decant(work, "probe", model, task, "--features", features, *CORPUS[:2], "--out", report)
        scores[task] = json.loads((work / report).read_text())["mean"]
    return scores


def make_teachers(work: Path, names: list[str], starts: dict[str, str]) -> None:
    """Pretrain them in the order of the settings: those that others start from stand before those."""
    for name in names:
        start = starts[name]
        begin = str(REPO / start) if start.endswith(".json") else start
        places = ("--out", f"data/teachers/{name}", "--init", f"data/init/{name}.safetensors")
        decant(work, "teacher", name, "--starts-from", begin, *CORPUS, *places)


def folder(work: Path, params: dict[str, Any]) -> Path:
    """A folder for the stages of one seed."""
    for below in ("data/teachers", "data/init", "receipts/features", "reports"):
        (work / below).mkdir(parents=True, exist_ok=True)
    (work / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    return work


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="1,2", help="with commas between; 0 is that of the embedded default")
    parser.add_argument("--teachers", default="", help="with commas between; else all, and those they start from")
    parser.add_argument("--quick", action="store_true", help="a hundredth of the steps, to see that it runs")
    parser.add_argument("--work", type=Path, help="a folder to keep, and to go on in")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    params = settings(None, options.quick)
    starts = {name: teacher["starts_from"] for name, teacher in params["teachers"].items()}
    names = options.teachers.split(",") if options.teachers else list(starts)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    keeps = nullcontext(options.work) if options.work else tempfile.TemporaryDirectory(prefix="teacher-seeds-")
    with keeps as place:
        work = Path(place).resolve()
        os.environ |= {"DECANT_STORE": str(work / "store"), "PYTHONPATH": str(REPO)}
        base = folder(work / "base", params)
        (work / "data").mkdir(exist_ok=True)
        (work / "receipts").mkdir(exist_ok=True)
        prepared = ("--waves", "../receipts/waves.json", "--quarantine", "../data/quarantine.json")
        decant(base, "prepare", "--out", "../data/manifest.jsonl", *prepared)
        floor = judge(base, "logmel", str(REPO / "recipes/logmel.json"))
        found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in names}
        for seed in seeds:
            here = folder(work / f"seed-{seed}", settings(seed, options.quick))
            make_teachers(here, names, starts)
            for name in names:
                found[name][str(seed)] = judge(here, name, f"data/teachers/{name}")
                print(f"seed {seed}: {name}: {percent(found[name][str(seed)])}; log-mel {percent(floor)}", flush=True)
                if options.json:  # after each: a seed takes minutes
                    kept = {"machine": machine(), "quick": options.quick, "logmel": floor, "teachers": found}
                    options.json.write_text(json.dumps(kept, indent=1) + "\n")
    short = report(found, floor)
    sys.exit(short and not options.quick)


def percent(scores: dict[str, float]) -> str:
    """Scores of one model in a line."""
    return ", ".join(f"{task} {100 * score:.1f}" for task, score in scores.items())


def report(found: dict[str, dict[str, dict[str, float]]], floor: dict[str, float]) -> bool:
    """Print mean and spread over the seeds, and say whether any run falls short of log-mel."""
    short = False
    for task, higher in TASKS.items():
        print(f"{task}: log-mel {100 * floor[task]:.1f} %")
        for name, runs in found.items():
            scores = [run[task] for run in runs.values()]
            worst = min(scores) if higher else max(scores)
            better = worst > floor[task] if higher else worst < floor[task]
            short |= not better
            spread = f" ± {100 * statistics.stdev(scores):.1f}" if len(scores) > 1 else ""
            print(
                f"{task}: {name}: {100 * statistics.fmean(scores):.1f}{spread} % over {len(scores)} seeds, "
                f"worst {100 * worst:.1f} {'ok' if better else 'FALLS SHORT'}"
            )
    return short


if __name__ == "__main__":
    main()
