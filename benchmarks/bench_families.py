"""A random checkpoint of Base size of each family, in the hub's layout, extracted over real speech by the product's commands.

python benchmarks/bench_families.py --speech FOLDER [--minutes 20] [--families hubert,wavlm,...] [--json FILE]

FOLDER holds LibriSpeech/ (its own layout). `decant prepare`, `teacher` (kind hub, offline) and `extract` (layers 4, 8 and 12,
float16) run as a user would run them. Then, for utterances drawn over all lengths, every stored layer is held against
transformers on that utterance alone with its own feature extractor: the bar is a relative L2 error of 1e-3 (P2 for
float16). Random weights: speeds and sizes are those of trained models, what the features mean is nothing.

`robust` is HuBERT's architecture under its own seed, as RobustHuBERT is.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import yaml
from bench_store import machine

from cache.frames import RATE_HZ
from cache.manifest import Manifest, read_manifest, write_manifest
from cache.names import array_name
from cache.receipts import open_receipt

BAR = 1e-3
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LAYERS = (4, 8, 12)
FAMILIES: dict[str, tuple[Any, Any]] = {
    "hubert": (transformers.HubertConfig, transformers.HubertModel),
    "robust": (transformers.HubertConfig, transformers.HubertModel),
    "wavlm": (transformers.WavLMConfig, transformers.WavLMModel),
    "wav2vec2": (transformers.Wav2Vec2Config, transformers.Wav2Vec2Model),
    "data2vec": (transformers.Data2VecAudioConfig, transformers.Data2VecAudioModel),
}


def publish(name: str, hub: Path) -> str:
    """A random model of Base size as the hub's cache keeps one commit of a repository; gives the repository's name."""
    torch.manual_seed(sorted(FAMILIES).index(name))
    config, model = FAMILIES[name]
    repo = f"random/{name}-base"
    folder = hub / f"models--random--{name}-base"
    snapshot = folder / "snapshots" / COMMIT
    model(config()).save_pretrained(snapshot)
    normalise = name == "data2vec"
    transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise).save_pretrained(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    return repo


def settings(speech: Path, repos: dict[str, str], codec: str, batch_seconds: float) -> dict[str, Any]:
    """A params file: the test speakers of LibriSpeech, and every family as a teacher from the hub."""
    source = {"kind": "librispeech", "root": str(speech / "LibriSpeech"), "subsets": ["train-clean-100", "test-clean"]}
    source |= {"dev_speakers": 0.1, "sid": None, "lexicon": None}
    return {
        "prepare": {
            "workers": 2,
            "max_bad_fraction": 0.01,
            "audio": {"max_sec": 35.0, "channels": "mean", "rate": "resample"},
            "sources": {"librispeech": source},
        },
        "extract": {
            "version": 1,
            "codec": codec,
            "calibration": {"seconds": 200, "seed": 0},
            "chunk_frames": 64,
            "shard_frames": 65_536,
            "batch_seconds": batch_seconds,
            "long": {"kind": "fail", "max_sec": 35.0},
        },
        "keep": {"layers": list(LAYERS), "select": "all"},
        "teachers": {
            name: {"source": {"kind": "hub", "repo": repo, "revision": COMMIT, "align": None}, "normalise": None}
            for name, repo in repos.items()
        },
    }


def decant(work: Path, *arguments: str) -> float:
    """Run a stage in `work`; seconds it took."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "stages", *arguments], cwd=work, check=True)
    return time.perf_counter() - start


def some_minutes(manifest: Manifest, minutes: float) -> Manifest:
    """Utterances in an order of their own until they have so many minutes."""
    order = np.random.default_rng(0).permutation(len(manifest))
    enough = int(np.searchsorted(np.cumsum(manifest.samples[order]), minutes * 60 * RATE_HZ)) + 1
    return Manifest(tuple(manifest[u] for u in sorted(order[:enough].tolist())))


def worst_error(work: Path, name: str, hub: Path, manifest: Manifest, num: int = 8) -> float:
    """The largest relative L2 distance of a stored layer to transformers on that utterance alone."""
    folder = hub / f"models--random--{name}-base" / "snapshots" / COMMIT
    model = FAMILIES[name][1].from_pretrained(folder).eval()
    listen = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    store = open_receipt(work / f"{name}.json", verify=True)
    waves = open_receipt(work / "waves.json")
    by_length = sorted(manifest, key=lambda u: u.samples)
    worst = 0.0
    for u in by_length[:: max(1, len(by_length) // num)]:
        wave = waves.read("wave", u.id).astype(np.float32) / 32768
        heard = listen(wave, sampling_rate=RATE_HZ, return_tensors="pt").input_values
        with torch.inference_mode():
            states = model(heard, output_hidden_states=True).hidden_states
        for layer in LAYERS:
            want, got = states[layer][0].numpy(), store.read(array_name(layer), u.id).astype(np.float32)
            worst = max(worst, float(np.linalg.norm(got - want) / np.linalg.norm(want)))
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True, help="holds LibriSpeech/")
    parser.add_argument("--minutes", type=float, default=20.0, help="of it")
    parser.add_argument("--families", default=",".join(FAMILIES), help="which, with commas between")
    parser.add_argument("--codec", default="float16")
    parser.add_argument("--batch-seconds", type=float, default=30.0)
    parser.add_argument("--quick", action="store_true", help="half a minute of speech, one family")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    names = ["wavlm"] if options.quick else options.families.split(",")
    minutes = 0.5 if options.quick else options.minutes
    rows, short = {}, False
    with tempfile.TemporaryDirectory(prefix="bench-families-") as folder:
        work, hub = Path(folder), Path(folder) / "hub"
        os.environ |= {"DECANT_STORE": str(work / "store"), "HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1"}
        os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
        repos = {name: publish(name, hub) for name in names}
        params = settings(options.speech.resolve(), repos, options.codec, options.batch_seconds)
        (work / "params.yaml").write_text(yaml.safe_dump(params))
        decant(work, "prepare", "--out", "all.jsonl", "--waves", "waves.json", "--quarantine", "quarantine.json")
        manifest = some_minutes(read_manifest(work / "all.jsonl"), minutes)
        write_manifest(work / "manifest.jsonl", manifest)
        seconds = float(manifest.samples.sum()) / RATE_HZ
        print(f"{machine()['cpu']}, {os.cpu_count()} cores; {len(manifest)} utterances, {seconds / 60:.1f} min")
        for name in names:
            decant(work, "teacher", name, "--out", name, "--init", f"{name}.safetensors")
            command = ["extract", name, "--model", name, "--keep", "keep", "--manifest", "manifest.jsonl"]
            took = decant(work, *command, "--waves", "waves.json", "--out", f"{name}.json")
            receipt = json.loads((work / f"{name}.json").read_text())
            error = worst_error(work, name, hub, manifest)
            short |= not error <= BAR
            rows[name] = {
                "parameters": receipt["fingerprint"]["model"]["num_params"],
                "seconds": round(took, 1),
                "audio_seconds_per_second": round(seconds / took, 2),
                "bytes": receipt["bytes"],
                "worst_relative_error": float(f"{error:.2e}"),
            }
            print(
                f"{name}: {rows[name]['parameters'] / 1e6:.2f} M parameters, {took:.0f} s with start-up, "
                f"{seconds / took:.1f} audio-s/s, {receipt['bytes'] / 1e6:.1f} MB, worst relative error {error:.1e} "
                f"(bar: {BAR:g}) {'ok' if error <= BAR else 'FALLS SHORT'}",
                flush=True,
            )
            shutil.rmtree(hub / f"models--random--{name}-base")  # 0.4 GB each
            if options.json:  # after each: a run takes a quarter of an hour
                found = {"machine": machine(), "audio_seconds": round(seconds, 1), "utterances": len(manifest)}
                options.json.write_text(json.dumps(found | {"families": rows}, indent=1) + "\n")
    sys.exit(short)


if __name__ == "__main__":
    main()
