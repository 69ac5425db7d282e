"""P2 end to end: what lies in a store is what transformers itself gives for each utterance alone."""

import numpy as np
import pytest
import torch
import transformers

from cache.receipts import open_receipt
from pipeline.extract import extract
from pipeline.extraction.settings import Calibration, ExtractParams, Fail, Keep
from pipeline.teachers.forward import load_teacher
from pipeline.teachers.sources import Folder, TeacherParams, materialise
from tests.conftest import TINY_HUBERT

SAMPLE = Calibration(seconds=60, seed=0)  # more than there is: all of it


@pytest.fixture
def hubert(tmp_path):
    """A random HuBERT with a group norm over time, as a folder of the hub; and the folder pinned."""
    torch.manual_seed(0)
    model = transformers.HubertModel(transformers.HubertConfig(**TINY_HUBERT)).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "source")
    source = Folder(kind="folder", path=str(tmp_path / "source"))
    materialise(TeacherParams(source=source, normalise=False), tmp_path / "teacher")
    return transformers.HubertModel.from_pretrained(tmp_path / "source").eval(), tmp_path / "teacher"


@pytest.mark.parametrize("batch_seconds", [0.1, 2.0, 60.0])
@pytest.mark.parametrize("codec", ["float32", "float16"])
def test_a_cached_frame_is_what_transformers_gives_for_that_utterance_alone(tiny_corpus, hubert, codec, batch_seconds):
    reference, folder = hubert
    params = ExtractParams(
        version=1,
        codec=codec,
        chunk_frames=16,
        shard_frames=256,
        batch_seconds=batch_seconds,
        long=Fail(kind="fail", max_sec=60.0),
        calibration=SAMPLE,
    )
    keep = Keep(layers="all", select="all")
    receipt = extract(
        load_teacher(folder), tiny_corpus.manifest, tiny_corpus.waves, params, keep, "cpu", lambda *_, **__: None
    )
    store = open_receipt(receipt, verify=True)
    for u in tiny_corpus.manifest:
        wave = torch.from_numpy(tiny_corpus.waves.read("wave", u.id).astype(np.float32) / 32768)[None]
        with torch.no_grad():
            alone = reference(wave, output_hidden_states=True).hidden_states
        for layer, states in enumerate(alone):
            want, got = states[0].numpy(), store.read(f"layer-{layer:02d}", u.id).astype(np.float32)
            assert got.shape == want.shape == (u.num_frames, 24)
            if codec == "float32":
                assert np.abs(got - want).max() <= 1e-5
            else:
                assert np.linalg.norm(got - want) <= 1e-3 * np.linalg.norm(want)


def test_without_masked_statistics_padding_would_change_the_frames(tiny_corpus, hubert):
    """That the test above can fail: the plain model, padded by half, is off by a hundred times the tolerance and more."""
    reference, _ = hubert
    wave = torch.from_numpy(tiny_corpus.waves.read("wave", 1).astype(np.float32) / 32768)[None]
    padded = torch.nn.functional.pad(wave, (0, 8_000))
    mask = torch.ones(1, padded.shape[1], dtype=torch.long)
    mask[:, wave.shape[1] :] = 0
    with torch.no_grad():
        alone = reference(wave).last_hidden_state
        beside = reference(padded, attention_mask=mask).last_hidden_state[:, : alone.shape[1]]
    assert (alone - beside).abs().max() > 1e-3
