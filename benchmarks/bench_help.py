"""Seconds of `decant --help` and of every `decant STAGE --help`: medians of seven whole processes against a bar of 0.5 s.

python benchmarks/bench_help.py [--json FILE]
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time

from stages.__main__ import STAGES

BAR_SECONDS = 0.5
RUNS = 7


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "stages", *arguments, "--help"], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", help="write the medians here")
    parser.add_argument("--quick", action="store_true", help="three runs instead of seven")
    options = parser.parse_args()
    commands: dict[str, list[str]] = {"decant": [], **{f"decant {s}": [s] for s in STAGES}}
    runs = {name: [] for name in commands}
    for _ in range((3 if options.quick else RUNS) + 1):  # interleaved; the first round warms the page cache
        for name, arguments in commands.items():
            runs[name].append(seconds(arguments))
    medians = {name: statistics.median(times[1:]) for name, times in runs.items()}
    print(
        f"Python {platform.python_version()} on {platform.machine()}, {platform.system()}; median seconds of whole processes"
    )
    for name, median in medians.items():
        print(f"  {name + ' --help':<28}{median:.3f}")
    worst = max(medians.values())
    print(f"slowest --help: {worst:.3f} s (bar: {BAR_SECONDS} s)")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(medians, file, indent=1)
    sys.exit(worst > BAR_SECONDS)


if __name__ == "__main__":
    main()
