"""A whole sweep of probes of one model on the embedded default: every task at five learning rates, with all its seeds.

python benchmarks/bench_probes.py [--quick] [--work FOLDER] [--json FILE]

In a folder of its own: `decant prepare` of the embedded corpus, a tiny HuBERT with random weights (what a head costs does
not depend on what it hears), `decant extract` of all its layers, and then, timed, one `decant probe` per task as dvc.yaml
runs it, start of Python included. Settings are those of params.yaml; where it tries fewer rates than five, rates are added.

The bar is 300 s for all tasks together on 2 cores. It is a limit in seconds, so it is meant for a machine that does nothing
else. --quick takes a twentieth of the updates; with --work what was prepared is used again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import yaml
from bench_store import machine
from teacher_seeds import CORPUS, REPO, decant, folder

RATES = 5
BAR_SECONDS = 300.0


def settings(quick: bool) -> dict[str, Any]:
    """The embedded default with at least five learning rates in every probe and an untrained teacher."""
    params: dict[str, Any] = yaml.safe_load((REPO / "params.yaml").read_text())
    params["teachers"]["hubert"]["source"]["steps"] = [1]
    for probe in params["probes"].values():
        rates = sorted(probe["lrs"])
        while len(rates) < RATES:
            rates.append(rates[-1] * (rates[-1] / rates[-2] if len(rates) > 1 else 3.0))
        probe["lrs"] = rates
        if quick:
            probe["steps"] = max(1, probe["steps"] // 20)
            probe["validate_every"] = probe["steps"]
    return params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the updates, to see that it runs")
    parser.add_argument("--work", type=Path, help="a folder to keep, and to use again")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    params = settings(options.quick)
    keeps = nullcontext(options.work) if options.work else tempfile.TemporaryDirectory(prefix="bench-probes-")
    with keeps as place:
        base = folder(Path(place).resolve() / "base", params)
        work = base.parent
        (work / "data").mkdir(exist_ok=True)
        (work / "receipts").mkdir(exist_ok=True)
        os.environ |= {"DECANT_STORE": str(work / "store"), "PYTHONPATH": str(REPO)}
        made = ("--waves", "../receipts/waves.json", "--quarantine", "../data/quarantine.json")
        decant(base, "prepare", "--out", "../data/manifest.jsonl", "--trials", "../data/trials.jsonl", *made)
        weights = ("--out", "data/teachers/hubert", "--init", "data/init/hubert.safetensors")
        decant(base, "teacher", "hubert", "--starts-from", str(REPO / "recipes/scratch.json"), *CORPUS, *weights)
        features = "receipts/features/hubert.json"
        decant(
            base,
            "extract",
            "hubert",
            "--model",
            "data/teachers/hubert",
            "--keep",
            "features",
            *CORPUS,
            "--out",
            features,
        )
        known = (*CORPUS[:2], "--trials", "../data/trials.jsonl")
        seconds: dict[str, float] = {}
        for task in params["probes"]:
            report = ("--out", f"reports/hubert-{task}.json")
            began = time.perf_counter()
            command = [sys.executable, "-m", "stages", "probe", "hubert", task, "--features", features, *known, *report]
            subprocess.run(command, cwd=base, check=True, stdout=subprocess.DEVNULL)
            seconds[task] = time.perf_counter() - began
            probe = params["probes"][task]
            print(
                f"{task}: {seconds[task]:.1f} s for {len(probe['lrs'])} rates, {len(probe['seeds'])} seeds and "
                f"{probe['steps']} updates",
                flush=True,
            )
    total = sum(seconds.values())
    if options.json:
        figures = {"machine": machine(), "quick": options.quick, "seconds": seconds, "total": total}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    short = total > BAR_SECONDS
    print(
        f"{len(seconds)} tasks: {total:.0f} s (bar: {BAR_SECONDS:.0f} s on 2 cores) {'FALLS SHORT' if short else 'ok'}"
    )
    sys.exit(short and not options.quick)


if __name__ == "__main__":
    main()
