"""`decant teacher` with {kind: pretrain}: as a person calls it."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

from cache.manifest import write_manifest
from cache.publish import write_json
from cache.receipts import make_receipt, store_key
from cache.waves import WaveWriter
from pipeline.student.adopt import adopt
from pipeline.teachers.forward import load_teacher
from tests.in_process import decant
from tests.pretrain_fixtures import DISTORT, SETTINGS, WHOLE, make_melodies


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_melodies(tmp_path_factory.mktemp("waves"))


def test_the_command_writes_the_teacher_and_what_a_student_starts_from(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    heard = corpus.manifest.select(split="train")
    with WaveWriter(tmp_path / "store" / "waves") as writer:
        for utterance in heard:
            writer.add(utterance.id, corpus.waves.read("wave", utterance.id))
        fingerprint = {"audio": heard.audio_digest}
        place = writer.finish(store_key("waves", fingerprint), fingerprint)
    write_json(tmp_path / "waves.json", make_receipt(place, ["wave"]))
    write_manifest(tmp_path / "manifest.jsonl", heard)
    continued = {**SETTINGS, **WHOLE, "distort": DISTORT, "steps": [2]}
    teachers = {
        "made": {"source": SETTINGS, "normalise": None, "keep": {}},
        "robust": {"source": continued, "normalise": None, "keep": {}},
        "copied": {"source": {"kind": "folder", "path": str(tmp_path / "made")}, "normalise": None, "keep": {}},
        "moving": {"source": {"kind": "hub", "repo": "someone/hubert", "revision": "main"}, "normalise": None},
        "loop": {"source": {**SETTINGS, "family": "hubrt"}, "normalise": None},
    }
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"teachers": teachers}))
    corpus_options = ("--manifest", tmp_path / "manifest.jsonl", "--waves", tmp_path / "waves.json")

    def command(name, *more):
        out, init = tmp_path / name, tmp_path / f"{name}.safetensors"
        return decant("teacher", name, "--out", out, "--init", init, "--params", tmp_path / "params.yaml", *more)

    refused = command("made")
    assert (refused.returncode, refused.stderr) == (
        2,
        "decant teacher: a teacher of kind pretrain needs --manifest and --waves\n",
    )
    done = command("made", *corpus_options, "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "teacher made: hubert, " in done.stdout
    wanted = adopt(tmp_path / "made")
    found = load_file(tmp_path / "made.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)

    robust = command("robust", *corpus_options, "--starts-from", tmp_path / "made", "--device", "cpu")
    assert robust.returncode == 0, robust.stderr
    nowhere = command("robust", *corpus_options, "--starts-from", tmp_path / "nobody")
    assert (nowhere.returncode, nowhere.stderr.count("\n")) == (4, 1)
    assert "nobody does not exist" in nowhere.stderr

    assert command("copied").returncode == 0
    digests = [load_teacher(tmp_path / name).describe()["digest"] for name in ("made", "copied", "robust")]
    assert digests[0] == digests[1] != digests[2]
    assert (tmp_path / "made.safetensors").read_bytes() == (tmp_path / "copied.safetensors").read_bytes()
    whole = command("copied", "--starts-from", tmp_path / "made")
    assert whole.returncode == 2
    assert "which is a whole teacher" in whole.stderr

    moving = command("moving")
    assert moving.returncode == 2
    assert "teachers.moving.source.revision is 'main'" in moving.stderr
    assert "a branch or tag can move" in moving.stderr
    assert moving.stderr.count("\n") == 1
    misspelt = command("loop", *corpus_options)
    assert (misspelt.returncode, misspelt.stderr.count("\n")) == (2, 1)
    assert "teachers.loop.source.family is 'hubrt'" in misspelt.stderr
