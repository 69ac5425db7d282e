"""Extraction against the bare forward of the same batches: what reading, encoding and writing cost beside the model.

python benchmarks/bench_extract.py [--quick] [--json FILE]

Two models of random weights: the tiny HuBERT of the embedded default over an hour of noise, all layers kept, and one
of Base size (95 M parameters) over three minutes, four layers kept; with a CUDA device, Base over twenty minutes. The bare
forward gets its padded batches from memory, on the device; extraction reads them from the wave store, encodes every kept
layer, copies it to the host and writes whole shards with checksums, hashes and fsync. Codecs float16 and int8.

The bare forward runs one batch after another with all threads, as a program of one's own would. On a CPU extraction runs
them side by side, one thread each, which is faster (`pipeline/extraction/lanes.py`); "side by side" is the forward alone run
like that, so what extraction has to pay for its files is the difference to this line.

A round runs every contender once, in an order drawn anew; a ratio is the median over the rounds of the ratios within
them. What extraction starts (threads; on a GPU a process) is part of it; fitting int8 to its sample is not, which is done
once for a corpus.

The parts, each run alone and one after the other, say what extraction has to hide behind the forward: reading and padding
waveforms, encoding, and writing shards (checksums, hash, fsync). `--threads` sets those of the forward.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_store import machine
from transformers import HubertConfig, HubertModel

from cache import codecs
from cache.codecs import CODECS
from cache.frames import RATE_HZ
from cache.journal import Journal
from cache.manifest import Manifest, Utterance
from cache.ragged import Store
from cache.receipts import make_receipt, open_receipt, store_key
from cache.waves import WaveWriter
from cache.writer import open_writer
from pipeline.codecs import encode, to_device
from pipeline.devices import choose_device
from pipeline.extract import extract
from pipeline.extraction.job import plan_job
from pipeline.extraction.settings import Calibration, ExtractParams, Fail, Keep
from pipeline.extraction.windows import piece_batches
from pipeline.forward import mean_of, read_batches
from pipeline.padding import pad_waves
from pipeline.teachers.forward import Teacher
from pipeline.teachers.pinned import Pinned
from pipeline.upstream import Upstream

BAR = 0.95
TINY: dict[str, Any] = {
    "conv_dim": (16, 32, 48, 64, 96, 128, 128),
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "num_conv_pos_embeddings": 32,
    "num_conv_pos_embedding_groups": 8,
}


def nothing(*_: Any, **__: Any) -> None:
    """Progress is not shown."""


def make_corpus(stores: Path, seconds: float) -> tuple[Manifest, Store]:
    """Noise in utterances of 1 to 16 s."""
    rng = np.random.default_rng(0)
    utterances: list[Utterance] = []
    with WaveWriter(stores / "waves") as writer:
        while sum(u.samples for u in utterances) < seconds * RATE_HZ:
            wave = rng.normal(0, 3_000, int(rng.uniform(1, 16) * RATE_HZ)).astype(np.int16)
            name, samples = f"noise/{len(utterances):04d}", len(wave)
            utterances.append(
                Utterance(
                    id=name,
                    corpus="noise",
                    path=f"{name}.wav",
                    samples=samples,
                    rate_hz=RATE_HZ,
                    file_samples=samples,
                    file_bytes=2 * samples,
                    audio=writer.add(name, wave),
                    split="train",
                    tasks={},
                )
            )
        manifest = Manifest(tuple(utterances))
        fingerprint = {"audio": manifest.audio_digest}
        place = writer.finish(store_key("waves", fingerprint), fingerprint)
    return manifest, open_receipt(make_receipt(place, ["wave"]))


def make_teacher(config: dict[str, Any], device: str) -> Upstream:
    torch.manual_seed(0)
    model = HubertModel(HubertConfig(**config, attn_implementation="sdpa"))
    shape = model.config
    pinned = Pinned(
        family="hubert",
        digest="random",
        source={"kind": "random"},
        normalise=False,
        layers=shape.num_hidden_layers + 1,
        width=shape.hidden_size,
        num_params=sum(p.numel() for p in model.parameters()),
    )
    return Teacher(model, pinned, torch.device(device))


class Contest:
    """One model over one corpus."""

    def __init__(self, config: dict[str, Any], seconds: float, layers: Any, device: str) -> None:
        self.seconds, self.device = seconds, device
        self.manifest, self.waves = make_corpus(Path(os.environ["DECANT_STORE"]), seconds)
        self.teacher, self.keep = make_teacher(config, device), Keep(layers=layers, select="all")
        self.params = ExtractParams(
            version=1,
            codec="float16",
            chunk_frames=64,
            shard_frames=16_384,
            batch_seconds=30.0 if device == "cpu" else 160.0,
            long=Fail(kind="fail", max_sec=60.0),
            calibration=Calibration(seconds=10, seed=0),
        )
        self.batches = []
        self.pieces = []
        for begin in self.shards():
            for batch in piece_batches(self.manifest, begin, self.params.long, self.params.batch_seconds):
                padded, samples = pad_waves(
                    [self.waves.read("wave", self.manifest[piece.utterance].id) for piece in batch]
                )
                self.batches.append((padded.to(device), samples.to(device)))
                self.pieces.append(batch)

    def shards(self) -> list[range]:
        """Extraction makes batches within shards, so the bare forward gets the same ones."""
        from cache.frames import frames_of
        from cache.plan import plan_rows

        plan = plan_rows(frames_of(self.manifest.samples), self.params.shard_frames)
        return [plan.utterances(shard) for shard in range(plan.num_shards)]

    def bare(self) -> None:
        with torch.inference_mode():
            for padded, samples in self.batches:
                self.teacher.layers(padded, samples)
        if self.device != "cpu":
            torch.cuda.synchronize()

    def side_by_side(self) -> None:
        """The same batches, as many at a time as there are threads."""
        threads = torch.get_num_threads()

        def forward(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
            with torch.inference_mode():
                self.teacher.layers(*batch)

        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            deque(pool.map(forward, self.batches), maxlen=0)
        torch.set_num_threads(threads)

    def extraction(self, codec: str) -> None:
        extract(self.teacher, self.manifest, self.waves, self.with_codec(codec), self.keep, self.device, nothing)

    def with_codec(self, codec: str) -> ExtractParams:
        return self.params.model_copy(update={"codec": codec})

    def forget(self, codec: str) -> None:
        """Delete the shards of a store and keep what its codec was fitted with."""
        job = plan_job(self.teacher, self.manifest, self.with_codec(codec), self.keep, self.device)
        journal = Journal(job.directory)
        journal.keep_only({place: row for place, row in journal.rows.items() if "." in place[0]})
        for array in job.arrays:
            shutil.rmtree(job.directory / array / "c", ignore_errors=True)

    def parts(self, codec: str) -> dict[str, float]:
        """Seconds of each part of extraction by itself, one after the other."""
        job = plan_job(self.teacher, self.manifest, self.with_codec(codec), self.keep, self.device)
        coding = CODECS[codec]
        took = dict.fromkeys(("reading and padding", "forward", "encoding", "writing"), 0.0)

        def timed(name: str, work: Callable[[], Any]) -> Any:
            began = time.perf_counter()
            done = work()
            if self.device != "cpu":
                torch.cuda.synchronize()
            took[name] += time.perf_counter() - began
            return done

        rows: dict[str, list[Any]] = {array: [] for array in job.arrays}
        with open_writer(job.directory, job.header, [u.id for u in job.manifest], job.rows, job.arrays) as writer:
            tables = {array: writer.tables(array) or {} for array in job.arrays}
            on_device = {array: to_device(tables[array], self.device) for array in job.arrays}
            timed(
                "reading and padding", lambda: list(read_batches(self.manifest, self.waves, self.pieces, self.device))
            )
            for padded, samples in self.batches:
                with torch.inference_mode():
                    outputs = timed("forward", partial(self.teacher.outputs, padded, samples))
                for array in job.arrays:
                    frames = mean_of(outputs, array)
                    rows[array].append(
                        timed("encoding", partial(codecs.encode, frames.numpy(), coding, tables[array]))
                        if self.device == "cpu"
                        else timed("encoding", lambda f=frames, a=array: encode(f, coding, on_device[a]).cpu().numpy())
                    )
            width = coding.row_width(self.teacher.width)
            for array in job.arrays:
                flat = np.concatenate([r.reshape(-1, width) for r in rows[array]])
                for shard in range(job.plan.num_shards):
                    used = job.plan.used_rows(shard)
                    some = np.resize(flat, (used, width))
                    timed("writing", partial(writer.write, array, shard, some))
        self.forget(codec)
        return took

    def rounds(self, number: int) -> dict[str, list[float]]:
        """Audio-seconds per second of each contender."""
        work: dict[str, Callable[[], None]] = {"bare forward": self.bare}
        if self.device == "cpu":
            work["side by side"] = self.side_by_side
        work |= {codec: lambda c=codec: self.extraction(c) for codec in ("float16", "int8")}
        rates: dict[str, list[float]] = {name: [] for name in work}
        rng = np.random.default_rng(1)
        audio = float(self.manifest.samples.sum()) / RATE_HZ
        for turn in range(number + 1):
            for place in rng.permutation(len(work)):
                name = list(work)[place]
                if name in CODECS and turn:
                    self.forget(name)
                began = time.perf_counter()
                work[name]()
                if turn:  # the first round warms up
                    rates[name].append(audio / (time.perf_counter() - began))
        return rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less audio, the tiny model alone")
    parser.add_argument("--threads", type=int, help="of the forward on the CPU")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = choose_device("auto")
    cuda = device != "cpu"
    contests: dict[str, tuple[dict[str, Any], float, Any]] = {"tiny": (TINY, 900 if options.quick else 3_600, "all")}
    if not options.quick:
        contests["base"] = ({}, 1_200 if cuda else 180, (0, 4, 8, 12))
    kept: dict[str, Any] = {}
    parts: dict[str, dict[str, float]] = {}
    short = False
    print(f"{machine()['cpu']}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {device}")
    for name, (config, seconds, layers) in contests.items():
        with tempfile.TemporaryDirectory(prefix="bench-extract-") as folder:
            os.environ["DECANT_STORE"] = folder
            contest = Contest(config, seconds, layers, device)
            rates = contest.rounds(5 if name == "tiny" or cuda else 3)
            for codec in ("float16", "int8"):
                took = contest.parts(codec)
                parts[f"{name}, {codec}"] = {part: round(seconds, 3) for part, seconds in took.items()}
                shares = ", ".join(f"{part} {100 * s / took['forward']:.1f} %" for part, s in took.items())
                print(f"{name}: {codec}, each part alone, of the forward: {shares}")
        kept[name] = {contender: [round(r, 2) for r in runs] for contender, runs in rates.items()}
        for contender, runs in rates.items():
            line = f"{name}: {contender}: {statistics.median(runs):,.1f} audio-s/s"
            if contender != "bare forward":
                ratio = statistics.median(a / b for a, b in zip(runs, rates["bare forward"], strict=True))
                line += f", {ratio:.3f} of the bare forward"
            if contender in CODECS:
                line += f" (bar: {BAR}) {'ok' if ratio >= BAR else 'FALLS SHORT'}"
                short |= ratio < BAR
            print(line)
    if options.json:
        options.json.write_text(
            json.dumps(
                {"machine": machine(), "device": device, "audio_seconds_per_second": kept, "parts": parts}, indent=1
            )
            + "\n"
        )
    sys.exit(short)


if __name__ == "__main__":
    main()
