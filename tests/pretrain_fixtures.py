"""What the tests of pretraining share: tiny settings, and twenty melodies in a wave store."""

import dataclasses

import numpy as np

from cache.manifest import Manifest, Utterance
from cache.ragged import Store
from cache.receipts import store_key
from cache.waves import WaveWriter
from pipeline.teachers.pretrain.batches import Recordings
from pipeline.teachers.pretrain.models import open_start
from pipeline.teachers.pretrain.run import Job, pretrain
from pipeline.teachers.pretrain.settings import PretrainParams
from pipeline.teachers.sources import Corpus, TeacherParams, materialise

MFCC_ROUND = {"units": {"kind": "mfcc", "centre": False}, "clusters": 8, "restart": True}
LAYER_ROUND = {"units": {"kind": "layer", "layer": 1, "centre": True}, "clusters": 6, "restart": False}
MASKED = {
    "kind": "masked_units",
    "iterations": [MFCC_ROUND],
    "fit_frames": 2_000,
    "unmasked_weight": 0.0,
    "codeword_width": 16,
    "temperature": 0.1,
}
CONTRASTIVE = {
    "kind": "contrastive",
    "codebooks": 2,
    "entries": 8,
    "code_width": 16,
    "target_width": 16,
    "gumbel": {"start": 2.0, "end": 0.5, "reached": 0.7},
    "distractors": 10,
    "temperature": 0.1,
    "diversity_weight": 0.1,
    "penalty_weight": 10.0,
    "feature_grad_mult": 0.1,
    "unmasked_weight": 0.0,
}
SHAPE = {
    "conv_channels": [8, 8, 8, 16, 16, 16, 16],
    "width": 24,
    "layers": 2,
    "heads": 2,
    "ffn": 48,
    "position_kernel": 8,
    "position_groups": 2,
}
SETTINGS = {
    "kind": "pretrain",
    "family": "hubert",
    "takes": None,
    "shape": SHAPE,
    "objective": MASKED,
    "steps": [6],
    "distort": None,
    "mix": None,
    "batch_seconds": 4.0,
    "crop_seconds": 1.0,
    "lr": 0.002,
    "warmup": 0.1,
    "weight_decay": 0.01,
    "clip": 1.0,
    "dropout": 0.1,
    "mask_prob": 0.8,
    "mask_frames": 10,
    "precision": "float32",
    "checkpoint_every": 4,
    "seed": 0,
}
TWO_ROUNDS = {"objective": {**MASKED, "iterations": [MFCC_ROUND, LAYER_ROUND]}, "steps": [6, 3]}
WHOLE = {"takes": "model", "shape": None}  # of the teacher that is started from
DISTORT = {
    "combine": "each",
    "reverberation": {
        "probability": 0.5,
        "rooms": {"kind": "synthetic", "t60_sec": [0.2, 0.6], "direct_db": [0.0, 6.0]},
    },
    "noise": {
        "probability": 0.5,
        "sources": [{"kind": "babble", "voices": [1, 3]}, {"kind": "coloured", "exponents": [0.0, 2.0]}],
        "snr_db": [0.0, 20.0],
    },
    "gaussian": {"probability": 0.5, "snr_db": [5.0, 20.0]},
}
MIX = {"probability": 0.5, "ratio_db": [-5.0, 5.0], "longest": 0.5, "noise": None}


def settings(**changes):
    return PretrainParams.model_validate({**SETTINGS, **changes})


def objective(**changes):
    return {**MASKED, **changes}


def tones(seed, samples):
    """A melody of 0.2 s notes: structure that clusters and context that predicts."""
    rng = np.random.default_rng(seed)
    notes = np.repeat(rng.choice([200, 450, 900, 1_800], samples // 3_200 + 1), 3_200)[:samples]
    wave = 0.3 * np.sin(2 * np.pi * np.cumsum(notes) / 16_000) + 0.003 * rng.standard_normal(samples)
    return (wave * 32_767).astype(np.int16)


def make_melodies(root):
    """Twenty melodies of a wave store; the one of dev is named in the manifest and is not in the store."""
    rows = []
    with WaveWriter(root) as writer:
        for number in range(20):
            wave = tones(number, 12_000 + 1_234 * number)
            audio = writer.add(f"u{number:02d}", wave)
            rows.append(
                Utterance(
                    id=f"u{number:02d}", corpus="tones", path=f"{number}.wav", samples=len(wave), rate_hz=16_000,
                    file_samples=len(wave), file_bytes=2 * len(wave), audio=audio, split="train", tasks={},
                )
            )  # fmt: skip
        place = writer.finish(store_key("waves", {}), {})
    unheard = dataclasses.replace(rows[0], id="unheard", split="dev")
    return Corpus(Manifest((*rows, unheard)), Store(place, ("wave",)))


def run(corpus, out, starts_from=None, normalise=False, **changes):
    """Pretrain into a new folder; the bytes of the weights, and what was told."""
    notes = []
    job = Job(settings(**changes), Recordings(corpus.manifest, corpus.waves), open_start(starts_from), normalise, "cpu")
    states = out.with_name(f"{out.name}-states")
    for folder in (out, states):
        folder.mkdir(exist_ok=True)
    pretrain(job, states, out, lambda seconds, note="", found=False: notes.append((seconds, note)))
    return (out / "model.safetensors").read_bytes(), notes


def pinned(corpus, out, starts_from=None, **changes):
    """A teacher in its folder, as `decant teacher` makes it."""
    params = TeacherParams(source=settings(**changes), normalise=None)
    return materialise(params, out, corpus, starts_from=starts_from)
