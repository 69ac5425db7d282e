"""A compiled encoder against the same one as it is, on batches padded to few lengths."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.padding import bucket_samples

COMPILED = """
import torch
from pipeline.padding import bucket_samples
from pipeline.student.encoder import Encoder, initialise
from tests.student_fixtures import WAVLM, changed, noise

torch.set_num_threads(1)
shape = changed(WAVLM, heads=(3,), ffn=(40,))
encoder = Encoder(shape, feature_grad_mult=0.1)
initialise(encoder, torch.Generator().manual_seed(2))
encoder.eval()
compiled = torch.compile(encoder.forward)
for lengths in ((8_000, 5_000, 3_100), (9_600, 700, 7_000)):  # one bucket, so one compilation
    waves, samples = noise(*lengths)
    waves = torch.nn.functional.pad(waves, (0, bucket_samples(waves.shape[1], 3_200) - waves.shape[1]))
    frames, results = [(length - 400) // 320 + 1 for length in lengths], []
    for forward in (encoder.forward, compiled):
        encoder.zero_grad()
        states = forward(waves, samples)
        valid = [state[row, :count] for state in states.hidden for row, count in enumerate(frames)]
        sum(part.square().mean() for part in valid).backward()
        gradients = [p.grad for p in encoder.parameters()]
        results.append((torch.cat([part.flatten() for part in valid]), gradients))
    (plain, wanted), (got, gradients) = results
    torch.testing.assert_close(got, plain, rtol=0, atol=1e-5)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
    print("equal", tuple(waves.shape), flush=True)
"""


def test_buckets_hold_the_longest_and_are_multiples():
    assert [bucket_samples(longest, 3_200) for longest in (1, 3_199, 3_200, 3_201)] == [3_200, 3_200, 3_200, 6_400]


@pytest.mark.compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_encoder_computes_the_same(tmp_path):
    """In a process of its own, because the shape checks of the tests are no part of what is compiled."""
    done = subprocess.run(
        [sys.executable, "-c", COMPILED],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    assert done.stdout.count("equal") == 2
