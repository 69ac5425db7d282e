"""Where a teacher comes from: folders and hub commits are pinned, everything else is refused in one line."""

import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cache.errors import DataError, SettingsError, StoreError
from cache.publish import write_json
from pipeline.student.adopt import copy_adopted, read_shape
from pipeline.student.encoder import Encoder
from pipeline.teachers import sources
from pipeline.teachers.forward import load_teacher
from pipeline.teachers.sources import Folder, Hub, TeacherParams, materialise
from stages.teacher import app
from tests.conftest import TINY_HUBERT

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TINY = {**TINY_HUBERT, "num_hidden_layers": 2}


@pytest.fixture
def folder(tmp_path):
    """A tiny HuBERT as transformers saves it."""
    torch.manual_seed(0)
    path = tmp_path / "hubert-tiny"
    transformers.HubertModel(transformers.HubertConfig(**TINY)).save_pretrained(path)
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(path)
    return path


def pin_folder(folder, out, normalise=None):
    return materialise(TeacherParams(source=Folder(kind="folder", path=str(folder)), normalise=normalise), out)


def edit_json(path, **changes):
    described = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in described.items() if value is not ...}))


def to_pickle(folder, **more):
    torch.save({**load_file(folder / "model.safetensors"), **more}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def to_hub_cache(folder, cache, repo="someone/hubert-tiny", commit=COMMIT):
    """The layout that huggingface_hub keeps: blobs, and a snapshot of links to them."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (root / "blobs").mkdir()
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(commit)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copy(file, root / "blobs" / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """An empty hub cache, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "hub").mkdir()
    return tmp_path / "hub"


def test_a_pinned_folder_opens_with_automodel_and_says_what_it_holds(folder, tmp_path):
    pinned = pin_folder(folder, tmp_path / "out")
    described = json.loads((tmp_path / "out" / "teacher.json").read_text())
    model, details = transformers.AutoModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(details.values())
    assert isinstance(model, transformers.HubertModel)
    assert described["source"] == {"kind": "folder", "name": "hubert-tiny"}
    assert (described["family"], described["normalise"], described["layers"], described["width"]) == (
        "hubert",
        True,
        3,
        24,
    )
    assert described["num_params"] == sum(p.numel() for n, p in model.named_parameters() if n != "masked_spec_embed")
    assert described["digest"] == pinned.digest == load_teacher(tmp_path / "out").describe()["digest"]
    assert str(tmp_path) not in "".join(p.read_text() for p in (tmp_path / "out").glob("*.json"))
    assert not list(tmp_path.glob(".out*"))


def test_pinning_twice_gives_the_same_bytes_wherever_the_folder_lies(folder, tmp_path):
    pin_folder(folder, tmp_path / "a")
    (tmp_path / "elsewhere").mkdir()
    pin_folder(folder.rename(tmp_path / "elsewhere" / folder.name), tmp_path / "b")
    for file in sorted((tmp_path / "a").iterdir()):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_normalisation_is_what_the_folder_says_unless_the_setting_says_otherwise(folder, tmp_path):
    published, chosen = pin_folder(folder, tmp_path / "a"), pin_folder(folder, tmp_path / "b", normalise=False)
    assert (published.normalise, chosen.normalise) == (True, False)
    assert published.digest != chosen.digest
    assert json.loads((tmp_path / "b" / "preprocessor_config.json").read_text())["do_normalize"] is False
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(SettingsError, match=r"set the teacher's normalise: false \(base models"):
        pin_folder(folder, tmp_path / "c")
    assert pin_folder(folder, tmp_path / "c", normalise=True).digest == published.digest


def test_a_pickle_of_tensors_becomes_safetensors(folder, tmp_path):
    expected = pin_folder(folder, tmp_path / "safe").digest
    to_pickle(folder)
    assert pin_folder(folder, tmp_path / "out").digest == expected
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_malicious_pickle_is_refused_and_not_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    to_pickle(folder, payload=Payload())
    with pytest.raises(StoreError, match="holds more than tensors") as refused:
        pin_folder(folder, tmp_path / "out")
    assert "\n" not in str(refused.value)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(StoreError, match="holds more than tensors"):
        pin_folder(folder, tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


def test_a_cut_weights_file_is_refused(folder, tmp_path):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(StoreError, match="is damaged"):
        pin_folder(folder, tmp_path / "out")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"<html>not found</html>")
    with pytest.raises(StoreError, match="damaged or holds more"):
        pin_folder(folder, tmp_path / "out")


def test_weights_in_several_files_are_read_together(folder, tmp_path):
    expected = pin_folder(folder, tmp_path / "one").digest
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: weights[name] for name in part}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert pin_folder(folder, tmp_path / "out").digest == expected
    index["weight_map"][names[0]] = "../elsewhere.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"names \.\./elsewhere\.safetensors"):
        pin_folder(folder, tmp_path / "out2")


def test_the_head_of_a_fine_tuned_model_is_left_behind(folder, tmp_path):
    expected = pin_folder(folder, tmp_path / "trunk")
    tuned = transformers.HubertForCTC(transformers.HubertConfig(**TINY, vocab_size=7))
    tuned.hubert.load_state_dict(load_file(folder / "model.safetensors"))
    tuned.save_pretrained(folder)
    got = pin_folder(folder, tmp_path / "out")
    assert got.num_params == expected.num_params
    ours, theirs = (
        load_file(tmp_path / "out" / "model.safetensors"),
        load_file(tmp_path / "trunk" / "model.safetensors"),
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_weight_norm_under_its_old_names_is_understood(folder, tmp_path):
    expected = pin_folder(folder, tmp_path / "a").digest
    old = {
        name.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): t
        for name, t in load_file(folder / "model.safetensors").items()
    }
    assert any(name.endswith("weight_g") for name in old)
    save_file(old, folder / "model.safetensors")
    assert pin_folder(folder, tmp_path / "b").digest == expected


def test_every_tensor_that_does_not_belong_is_named(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    gone = weights.pop("encoder.layers.1.final_layer_norm.weight")
    save_file(
        {**weights, "extra.weight": gone, "feature_projection.projection.bias": torch.ones(5)},
        folder / "model.safetensors",
    )
    with pytest.raises(StoreError) as refused:
        pin_folder(folder, tmp_path / "out")
    text = str(refused.value)
    assert "missing: encoder.layers.1.final_layer_norm.weight" in text
    assert "unexpected: extra.weight" in text
    assert "feature_projection.projection.bias is (5,), not (24,)" in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "sew"}, "model_type is 'sew'; a teacher can be hubert, wav2vec2, wavlm, data2vec-audio"),
        ({"model_type": ...}, "model_type is None"),
        ({"conv_stride": [5, 2, 2, 2, 2, 2, 1]}, "stores count frames every 320 samples"),
        ({"conv_pos_batch_norm": True}, "spreads padding into speech"),
        ({"add_adapter": True}, "changes the frame rate"),
        ({"hidden_size": "wide"}, "transformers refuses this configuration"),
        ({"hidden_size": 25}, "transformers refuses this configuration"),
    ],
)
def test_a_configuration_that_cannot_be_a_teacher_is_refused_with_its_reason(folder, tmp_path, changes, text):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(SettingsError) as refused:
        pin_folder(folder, tmp_path / "out")
    assert text in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_wavlm_that_rests_on_its_librarys_defaults_has_them_written_out(tmp_path):
    transformers.WavLMModel(transformers.WavLMConfig(**TINY)).save_pretrained(tmp_path / "wavlm")
    edit_json(tmp_path / "wavlm/config.json", num_buckets=..., max_bucket_distance=...)
    source = {"kind": "folder", "path": str(tmp_path / "wavlm")}
    write_json(tmp_path / "params.yaml", {"teachers": {"t": {"source": source, "normalise": False}}})
    out, init = tmp_path / "out", tmp_path / "init.safetensors"
    command = ["t", "--out", str(out), "--init", str(init), "--params", str(tmp_path / "params.yaml")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    config = json.loads((out / "config.json").read_text())
    assert (config["num_buckets"], config["max_bucket_distance"]) == (320, 800)
    student = Encoder(read_shape(out))
    copy_adopted(student, [init], final_norm=True)
    assert torch.equal(student.position_bias.table, load_file(init)["position_bias.table"])


def test_code_that_a_folder_brings_is_neither_run_nor_kept(folder, tmp_path):
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    edit_json(folder / "config.json", auto_map={"AutoModel": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Evil"})
    pin_folder(folder, tmp_path / "out")
    load_teacher(tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "teacher.json",
    }


def test_a_folder_that_is_not_there_is_refused(tmp_path, folder):
    with pytest.raises(DataError, match=r"has no config\.json"):
        pin_folder(tmp_path / "nowhere", tmp_path / "out")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"neither model\.safetensors nor pytorch_model\.bin"):
        pin_folder(folder, tmp_path / "out")


@pytest.mark.parametrize("revision", ["main", "v1.0", COMMIT[:12], COMMIT.upper().replace("0", "G"), ""])
def test_a_revision_that_can_move_is_refused_with_the_reason(revision):
    with pytest.raises(ValidationError, match="a branch or tag can move"):
        Hub(kind="hub", repo="someone/hubert-tiny", revision=revision)


def hub_params(repo="someone/hubert-tiny", revision=COMMIT):
    return TeacherParams(source=Hub(kind="hub", repo=repo, revision=revision), normalise=None)


def test_a_commit_in_the_hub_cache_needs_no_network(folder, tmp_path, offline):
    to_hub_cache(folder, offline)
    pinned = materialise(hub_params(), tmp_path / "out")
    assert pinned.source == {"kind": "hub", "repo": "someone/hubert-tiny", "revision": COMMIT}
    assert pinned.digest == pin_folder(folder, tmp_path / "folder").digest
    assert not (tmp_path / "out" / "model.safetensors").is_symlink()


def test_a_cached_commit_that_has_only_a_pickle_is_read_safely(folder, tmp_path, offline):
    expected = pin_folder(folder, tmp_path / "folder").digest
    to_pickle(folder)
    to_hub_cache(folder, offline)
    assert materialise(hub_params(), tmp_path / "out").digest == expected


@pytest.fixture
def cached_without_preprocessor(folder, tmp_path, offline):
    """What `AutoModel.from_pretrained` leaves of a commit; and the file that it does not ask for."""
    left_out = (folder / "preprocessor_config.json").rename(tmp_path / "preprocessor_config.json")
    to_hub_cache(folder, offline)
    return left_out


def test_a_cached_commit_without_its_preprocessor_is_completed_from_the_network(
    cached_without_preprocessor, tmp_path, monkeypatch
):
    def snapshot(repo, *, revision, allow_patterns, local_files_only):
        found = huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
        if not local_files_only and "preprocessor_config.json" in allow_patterns:
            shutil.copy(cached_without_preprocessor, found)
        return found

    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    assert materialise(hub_params(), tmp_path / "out").normalise


@pytest.mark.parametrize("unreachable", [None, LocalEntryNotFoundError("no route"), HTTPError("refused")])
def test_a_cached_commit_without_its_preprocessor_is_used_where_the_network_cannot_be_reached(
    cached_without_preprocessor, tmp_path, monkeypatch, unreachable
):
    def snapshot(repo, *, local_files_only, **asked):
        if unreachable is not None and not local_files_only:
            raise unreachable
        return huggingface_hub.snapshot_download(repo, local_files_only=local_files_only, **asked)

    monkeypatch.setattr(sources, "snapshot_download", snapshot)
    said = TeacherParams(source=hub_params().source, normalise=False)
    assert not materialise(said, tmp_path / "out").normalise
    with pytest.raises(SettingsError, match=r"has no preprocessor_config\.json here .* set the teacher's normalise"):
        materialise(hub_params(), tmp_path / "unsaid")


def test_a_commit_that_is_not_cached_is_one_line_without_a_try_or_a_wait_when_offline(
    folder, tmp_path, offline, monkeypatch
):
    to_hub_cache(folder, offline)
    for module, name in ((socket, "getaddrinfo"), (socket.socket, "connect"), (time, "sleep")):
        monkeypatch.setattr(module, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    with pytest.raises(DataError, match="not in the hub's cache") as refused:
        materialise(hub_params(revision="f" * 40), tmp_path / "out")
    assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match="not in the hub's cache"):
        materialise(hub_params(repo="someone/else"), tmp_path / "out")
    with pytest.raises(SettingsError, match="not a repository's name"):
        materialise(hub_params(repo="a/b/c"), tmp_path / "out")


def test_the_environment_alone_makes_it_offline(folder, tmp_path):
    """HF_HUB_OFFLINE and HF_HUB_CACHE as a person sets them, in a process of its own."""
    to_hub_cache(folder, tmp_path / "hub")
    code = (
        "import sys; from pathlib import Path\n"
        "from cache.errors import DataError\n"
        "from pipeline.teachers.sources import Hub, TeacherParams, materialise\n"
        "for revision in sys.argv[1:]:\n"
        "    hub = Hub(kind='hub', repo='someone/hubert-tiny', revision=revision)\n"
        f"    try: print(materialise(TeacherParams(source=hub, normalise=None), Path({str(tmp_path / 'out')!r})).family)\n"
        "    except DataError as error: print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", code, COMMIT, "f" * 40], env=environment, capture_output=True, text=True, check=True
    )
    first, second = done.stdout.strip().splitlines()
    assert first == "hubert"
    assert second.startswith(f"someone/hubert-tiny at {'f' * 40} is not in the hub's cache")


def test_an_unfinished_teacher_is_never_at_its_place(folder, tmp_path):
    pin_folder(folder, tmp_path / "out")
    before = (tmp_path / "out" / "teacher.json").read_text()
    (folder / "model.safetensors").write_bytes(b"")
    with pytest.raises(StoreError):
        pin_folder(folder, tmp_path / "out")
    assert (tmp_path / "out" / "teacher.json").read_text() == before
