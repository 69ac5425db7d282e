"""Recordings that are too long for one forward: refused, left out, or cut into windows that overlap."""

from itertools import pairwise

import hypothesis
import numpy as np
import pytest
import torch
import transformers
from hypothesis import strategies
from pydantic import ValidationError

from cache.errors import DataError
from cache.frames import HOP, num_frames
from cache.receipts import open_receipt
from pipeline.distill.settings import StudentParams
from pipeline.distill.train import distil
from pipeline.extract import extract
from pipeline.extraction.settings import Calibration, Chunk, ExtractParams, Fail, Keep, Skip
from pipeline.extraction.windows import piece_batches, pieces_of
from pipeline.layers.choose import choose_targets
from pipeline.layers.ensembles import SingleTeacher
from pipeline.layers.targets import Adopted
from pipeline.teachers.forward import load_teacher
from pipeline.teachers.sources import Folder, TeacherParams, materialise
from pipeline.upstream import LayersAlone
from stages._params import read_params
from tests.conftest import TINY_HUBERT
from tests.distill_fixtures import EXTRACT, make_world, write_params, write_receipt

PARAMS = ExtractParams(
    version=1,
    codec="float32",
    chunk_frames=16,
    shard_frames=128,
    batch_seconds=4.0,
    long=Fail(kind="fail", max_sec=60.0),
    calibration=Calibration(seconds=60, seed=0),
)
ALL = Keep(layers="all", select="all")


class Framed(LayersAlone):
    """A model whose frame is its 400 samples, and so the same in any window that has them."""

    num_layers, width = 1, 400

    def __init__(self):
        self.longest = 0

    def describe(self):
        return {"kind": "framed", "digest": "0"}

    def layers(self, waves, samples):
        self.longest = max(self.longest, int(samples.max()))
        return [waves.unfold(1, 400, 320)]


def run(model, corpus, long):
    params = PARAMS.model_copy(update={"long": long})
    return extract(model, corpus.manifest, corpus.waves, params, ALL, "cpu", lambda *_, **__: None)


@hypothesis.given(
    samples=strategies.integers(400, 200_000),
    max_sec=strategies.floats(0.2, 5.0),
    share=strategies.floats(0.0, 0.4),
)
def test_windows_keep_every_frame_once_with_its_context_on_the_grid(samples, max_sec, share):
    overlap_sec = share * (max_sec - 0.1)
    long = Chunk(kind="chunk", max_sec=max_sec, overlap_sec=overlap_sec)
    pieces, frames = list(pieces_of(7, samples, long)), num_frames(samples)
    assert pieces[0].first == 0
    assert all(after.first == before.first + before.num_kept for before, after in pairwise(pieces))
    assert pieces[-1].first + pieces[-1].num_kept == frames
    if samples <= int(max_sec * 16_000):
        assert len(pieces) == 1
        assert pieces[0].samples == slice(0, samples)
    overlap = round(overlap_sec * 50)
    for piece in pieces:
        begin = piece.samples.start // HOP
        assert piece.samples.start == begin * HOP
        assert piece.num_samples <= int(max_sec * 16_000)
        assert begin + piece.kept.start == piece.first  # the frame in the window is the frame in the recording
        assert piece.kept.stop <= num_frames(piece.num_samples)
        assert begin == 0 or piece.kept.start >= overlap
        heard_after = num_frames(piece.num_samples) - piece.kept.stop
        assert piece.samples.stop == samples or heard_after >= overlap


def test_a_model_without_context_gives_the_same_in_windows(tiny_corpus):
    model = Framed()
    whole = open_receipt(run(model, tiny_corpus, Fail(kind="fail", max_sec=60.0)))
    assert model.longest == 25_600
    model.longest = 0
    receipt = run(model, tiny_corpus, Chunk(kind="chunk", max_sec=0.5, overlap_sec=0.06))
    cut = open_receipt(receipt)
    assert 7_000 < model.longest <= 8_000
    for u in tiny_corpus.manifest:
        np.testing.assert_array_equal(cut.read("layer-00", u.id), whole.read("layer-00", u.id))
    assert receipt["fingerprint"]["long"] == {"kind": "chunk", "max_sec": 0.5, "overlap_sec": 0.06}
    assert cut.key != whole.key


def test_a_setting_that_cuts_nothing_changes_no_store(tiny_corpus):
    whole = run(Framed(), tiny_corpus, Fail(kind="fail", max_sec=60.0))
    assert run(Framed(), tiny_corpus, Chunk(kind="chunk", max_sec=2.0, overlap_sec=0.1)) == whole
    assert run(Framed(), tiny_corpus, Skip(kind="skip", max_sec=2.0)) == whole
    assert "long" not in whole["fingerprint"]


def test_a_kept_frame_is_what_the_teacher_gives_for_its_window(tiny_corpus, tmp_path):
    torch.manual_seed(0)
    reference = transformers.HubertModel(transformers.HubertConfig(**TINY_HUBERT)).eval()
    reference.save_pretrained(tmp_path / "source")
    source = Folder(kind="folder", path=str(tmp_path / "source"))
    materialise(TeacherParams(source=source, normalise=False), tmp_path / "teacher")
    long = Chunk(kind="chunk", max_sec=0.9, overlap_sec=0.2)
    store = open_receipt(run(load_teacher(tmp_path / "teacher"), tiny_corpus, long))
    windows = 0
    for number, u in enumerate(tiny_corpus.manifest):
        wave = torch.from_numpy(tiny_corpus.waves.read("wave", u.id).astype(np.float32) / 32768)[None]
        got = store.read("layer-03", u.id)
        for piece in pieces_of(number, u.samples, long):
            with torch.no_grad():
                states = reference(wave[:, piece.samples], output_hidden_states=True).hidden_states[3][0]
            rows = slice(piece.first, piece.first + piece.num_kept)
            np.testing.assert_allclose(got[rows], states[piece.kept].numpy(), rtol=0, atol=1e-5)
            windows += 1
    assert windows > len(tiny_corpus.manifest) + 3


def test_what_is_too_long_is_named_before_the_first_forward(tiny_corpus):
    model = Framed()
    with pytest.raises(
        DataError,
        match=r"tiny/010 has 1.6 s and 2 utterances have more than extract.long.max_sec 1.4; raise it, or set",
    ):
        run(model, tiny_corpus, Fail(kind="fail", max_sec=1.4))
    assert model.longest == 0
    with pytest.raises(DataError, match=r"every utterance has more than extract.long.max_sec 0.01 s"):
        run(model, tiny_corpus, Skip(kind="skip", max_sec=0.01))
    with pytest.raises(ValidationError, match="leaves nothing between two overlaps of 0.5 s"):
        Chunk(kind="chunk", max_sec=1.0, overlap_sec=0.5)
    with pytest.raises(
        ValidationError, match=r"leaves nothing between two overlaps of 5\.03 s"
    ):  # in frames, 504 - 2 x 252
        Chunk(kind="chunk", max_sec=10.12, overlap_sec=5.03)


def test_what_is_skipped_is_not_in_the_store_and_the_fingerprint_says_so(tiny_corpus):
    receipt = run(Framed(), tiny_corpus, Skip(kind="skip", max_sec=1.4))
    assert open_receipt(receipt).ids == [u.id for u in tiny_corpus.manifest if u.samples <= 22_400]
    assert receipt["utterances"] == 10
    assert receipt["fingerprint"]["long"] == {"kind": "skip", "max_sec": 1.4}


def test_a_student_trains_without_what_was_skipped_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    world = make_world(tmp_path)
    limit = sorted(u.samples for u in world.manifest if u.split == "train")[-3] / 16_000
    skip = EXTRACT.model_copy(update={"long": Skip(kind="skip", max_sec=limit)})
    write_receipt(world, "hubert", 0, params=skip)
    write_params(world, train={"steps": 2, "validate_every": 2})
    ensemble = SingleTeacher(kind="single", teacher="hubert", layers=(3, 1), normalise=None)
    start = Adopted(kind="adopted", teacher="hubert", final_norm=False)
    targets = choose_targets(ensemble, tmp_path / "receipts", start, tmp_path / "init")
    said = []
    metrics = distil(
        read_params("students.distil", StudentParams, tmp_path / "params.yaml"),
        targets,
        world.manifest,
        open_receipt(tmp_path / "receipts/waves.json"),
        [tmp_path / "init/hubert.safetensors"],
        tmp_path / "models/distil",
        "cpu",
        lambda *_, **__: None,
        said.append,
    )
    left_out = sum(u.samples > limit * 16_000 for u in world.manifest)
    assert left_out >= 2
    assert f"{left_out} utterances of more than {limit:g} s have no targets" in said
    assert metrics["train_utterances"] == sum(
        u.split == "train" and u.samples <= limit * 16_000 for u in world.manifest
    )


def test_batches_hold_every_piece_once_and_stay_in_their_budget(tiny_corpus):
    long = Chunk(kind="chunk", max_sec=0.5, overlap_sec=0.05)
    batches = list(piece_batches(tiny_corpus.manifest, range(12), long, 1.2))
    flat = [piece for batch in batches for piece in batch]
    want = [p for u in range(12) for p in pieces_of(u, tiny_corpus.manifest[u].samples, long)]
    assert sorted(map(repr, flat)) == sorted(map(repr, want))
    assert all(len(b) == 1 or len(b) * b[0].num_samples <= 1.2 * 16_000 for b in batches)
    assert all(a.num_samples >= b.num_samples for batch in batches for a, b in pairwise(batch))
