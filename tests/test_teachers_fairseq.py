"""Checkpoints in fairseq's, s3prl's and unilm's layout: every layer as torchaudio computes it, everything else one line."""

import argparse
import hashlib
import json
import os
import random
import re
import sys
import types

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import load_file
from torchaudio.models import wav2vec2 as audio
from torchaudio.models.wav2vec2.utils import import_fairseq_model
from typer.testing import CliRunner

from cache.errors import DataError, SettingsError, StoreError
from pipeline.padding import normalise_waves
from pipeline.teachers.fairseq import LEFT_OUT, Fairseq, conv_layers, convert
from pipeline.teachers.families import build_model
from pipeline.teachers.forward import load_teacher
from pipeline.teachers.sources import TeacherParams, materialise
from pipeline.teachers.unpickle import read_pickle
from stages.teacher import app
from tests.fairseq_fixtures import BASE, LARGE, LARGE_WITHOUT_BIAS, MODELS, TINY, checkpoint, random_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:Support for mismatched key_padding_mask",
    "ignore:`torch.nn.utils.weight_norm` is deprecated",
    "ignore:Detected pickle protocol",
)
FRONTS = {"base": BASE, "large": LARGE, "large without bias": LARGE_WITHOUT_BIAS}
CASES = [(family, front) for family in MODELS for front in FRONTS]


def write(path, family="hubert", front="base", normalise=False, **changes):
    """A random checkpoint at `path`, some of its entries changed; gives its model."""
    settings = {**TINY, **FRONTS[front]}
    model = random_model(family, settings)
    torch.save({**checkpoint(family, settings, model, normalise), **changes}, path)
    return model


def pin(path, out, normalise=None, sha256=None):
    return materialise(
        TeacherParams(source=Fairseq(kind="fairseq", path=str(path), sha256=sha256), normalise=normalise), out
    )


def to_s3prl(path, out, family):
    """What s3prl's convert.py keeps of a fairseq checkpoint."""
    state = torch.load(path, weights_only=True)
    kept = {
        "task_cfg": state["cfg"]["task"],
        "model_cfg": {k: v for k, v in state["cfg"]["model"].items() if k != "_name"},
        "model_weight": state["model"],
    }
    torch.save(kept | ({"dictionaries_symbols": [["<s>", "0", "1"]]} if family == "hubert" else {}), out)


def gated_by_torchaudio(model, settings):
    """torchaudio's WavLM with a unilm state dict, renamed here by hand: it has no importer for it."""
    made = audio.wavlm_model(
        extractor_mode="layer_norm" if settings["extractor_mode"] == "layer_norm" else "group_norm",
        extractor_conv_layer_config=conv_layers(settings["conv_feature_layers"], ""),
        extractor_conv_bias=settings["conv_bias"],
        encoder_embed_dim=settings["encoder_embed_dim"],
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=settings["conv_pos"],
        encoder_pos_conv_groups=settings["conv_pos_groups"],
        encoder_num_layers=settings["encoder_layers"],
        encoder_num_heads=settings["encoder_attention_heads"],
        encoder_num_buckets=320,
        encoder_max_distance=800,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=settings["encoder_ffn_embed_dim"],
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=settings["layer_norm_first"],
        encoder_layer_drop=0.0,
        aux_num_out=None,
    )
    given = model.state_dict()
    renamed = {}
    for name in made.state_dict():
        old = name.removeprefix("encoder.transformer.")
        old = re.sub(r"^encoder\.feature_projection\.layer_norm", "layer_norm", old)
        old = re.sub(r"^encoder\.feature_projection\.projection", "post_extract_proj", old)
        old = re.sub(r"(conv_layers\.\d+)\.conv\.", r"\1.0.", old)
        old = re.sub(
            r"(conv_layers\.\d+)\.layer_norm\.",
            r"\1.2." if settings["extractor_mode"] == "default" else r"\1.2.1.",
            old,
        )
        if name.startswith("encoder.transformer."):
            old = "encoder." + old
            old = old.replace("pos_conv_embed.conv.parametrizations.weight.original0", "pos_conv.0.weight_g")
            old = old.replace("pos_conv_embed.conv.parametrizations.weight.original1", "pos_conv.0.weight_v")
            old = old.replace("pos_conv_embed.conv.", "pos_conv.0.")
            old = re.sub(r"(layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm.", old)
            old = old.replace("feed_forward.intermediate_dense", "fc1").replace("feed_forward.output_dense", "fc2")
            old = old.replace("attention.rel_attn_embed", "self_attn.relative_attention_bias")
            old = old.replace("attention.gru_rel_pos_linear", "self_attn.grep_linear")
            old = old.replace("attention.gru_rel_pos_const", "self_attn.grep_a")
            old = old.replace("attention.attention.out_proj", "self_attn.out_proj")
            if packed := re.match(r"(.*)attention\.attention\.in_proj_(weight|bias)$", old):
                parts = [given[f"{packed[1]}self_attn.{x}_proj.{packed[2]}"] for x in "qkv"]
                renamed[name] = torch.cat(parts)
                continue
        renamed[name] = given[old]
    made.load_state_dict(renamed)
    return made


@pytest.mark.parametrize(("family", "front"), CASES)
def test_every_layer_is_the_one_that_torchaudio_computes_from_the_same_checkpoint(tmp_path, family, front):
    model = write(tmp_path / "model.pt", family, front, normalise=front != "base")
    pinned = pin(tmp_path / "model.pt", tmp_path / "teacher")
    teacher = load_teacher(tmp_path / "teacher")
    settings = {**TINY, **FRONTS[front]}
    reference = gated_by_torchaudio(model, settings) if family == "wavlm" else import_fairseq_model(model)
    wave = torch.randn(1, 8_000, generator=torch.Generator().manual_seed(3)) * 0.1 + 0.01
    samples = torch.tensor([8_000])
    given = normalise_waves(wave, samples) if front != "base" else wave
    with torch.no_grad():
        blocks, _ = reference.eval().extract_features(given)
    layers = teacher.layers(wave, samples)
    assert len(layers) == len(blocks) + 1 == 4
    for ours, theirs in zip(layers[1:], blocks, strict=True):
        assert ours.std() > 0.1
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (pinned.family, pinned.normalise) == (family, front != "base")


@pytest.mark.parametrize(("family", "front"), [("hubert", "base"), ("wav2vec2", "large")])
def test_what_s3prl_converted_is_the_same_teacher(tmp_path, family, front):
    write(tmp_path / "model.pt", family, front)
    to_s3prl(tmp_path / "model.pt", tmp_path / "converted.pt", family)
    first, second = (pin(tmp_path / f"{name}.pt", tmp_path / name) for name in ("model", "converted"))
    assert first.digest == second.digest
    assert (second.source["kind"], second.source["name"]) == ("fairseq", "converted.pt")
    assert second.source["sha256"] == hashlib.sha256((tmp_path / "converted.pt").read_bytes()).hexdigest()
    assert str(tmp_path) not in (tmp_path / "converted" / "teacher.json").read_text()


def test_a_pinned_checkpoint_opens_with_automodel(tmp_path):
    write(tmp_path / "model.pt", "wavlm", "large", normalise=True)
    pin(tmp_path / "model.pt", tmp_path / "teacher")
    model, details = transformers.AutoModel.from_pretrained(tmp_path / "teacher", output_loading_info=True)
    assert not any(details.values())
    assert isinstance(model, transformers.WavLMModel)
    assert json.loads((tmp_path / "teacher" / "preprocessor_config.json").read_text())["do_normalize"] is True
    assert model.config.max_bucket_distance == 800


def meta(family, settings):
    with torch.device("meta"):
        return MODELS[family](settings)


def sizes(front, width, layers, heads):
    return {
        **FRONTS[front],
        **{"conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2", "conv_pos": 128},
        **{"encoder_embed_dim": width, "encoder_layers": layers, "encoder_attention_heads": heads},
        **{"encoder_ffn_embed_dim": 4 * width, "conv_pos_groups": 16},
    }


@pytest.mark.parametrize(
    ("family", "size", "published"),
    [
        ("hubert", ("base", 768, 12, 12), audio.hubert_base),
        ("hubert", ("large without bias", 1024, 24, 16), audio.hubert_large),
        ("hubert", ("large without bias", 1280, 48, 16), audio.hubert_xlarge),
        ("wav2vec2", ("base", 768, 12, 12), audio.wav2vec2_base),
        ("wav2vec2", ("large", 1024, 24, 16), audio.wav2vec2_large_lv60k),
        ("wavlm", ("base", 768, 12, 12), audio.wavlm_base),
        ("wavlm", ("large without bias", 1024, 24, 16), audio.wavlm_large),
    ],
)
def test_published_sizes_fill_the_model_and_have_as_many_parameters_as_torchaudio_says(family, size, published):
    """On the meta device: names and shapes without the gigabytes."""
    settings = sizes(*size)
    config, weights, _ = convert(checkpoint(family, settings, meta(family, settings)), "here")
    wanted = build_model(config, "here").state_dict()
    assert {name: t.shape for name, t in weights.items()} == {name: t.shape for name, t in wanted.items()}
    with torch.device("meta"):
        expected = sum(p.numel() for p in published().parameters())
    assert sum(t.numel() for name, t in weights.items() if name != "masked_spec_embed") == expected


def test_a_fine_tuned_checkpoint_gives_its_trunk(tmp_path):
    model = write(tmp_path / "plain.pt", "wav2vec2", "large", normalise=True)
    state = torch.load(tmp_path / "plain.pt", weights_only=True)
    trunk = {k: t for k, t in model.state_dict().items() if not any(re.match(p, k) for p in LEFT_OUT)}
    tuned = {
        "cfg": {
            "model": {"_name": "wav2vec_ctc", "w2v_args": state["cfg"], "encoder_layers": 99},
            "task": state["cfg"]["task"],
        },
        "model": {f"w2v_encoder.w2v_model.{k}": t for k, t in trunk.items()}
        | {"w2v_encoder.proj.weight": torch.ones(30, 24), "w2v_encoder.proj.bias": torch.ones(30)},
    }
    torch.save(tuned, tmp_path / "tuned.pt")
    assert pin(tmp_path / "plain.pt", tmp_path / "a").digest == pin(tmp_path / "tuned.pt", tmp_path / "b").digest


def test_parametrised_weight_norm_and_half_precision_are_read_too(tmp_path):
    model = write(tmp_path / "old.pt")
    expected = pin(tmp_path / "old.pt", tmp_path / "a").digest
    names = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    new = {re.sub("weight_[gv]$", lambda m: names[m[0]], k): t for k, t in model.state_dict().items()}
    write(tmp_path / "new.pt", model=new)
    assert pin(tmp_path / "new.pt", tmp_path / "b").digest == expected
    write(tmp_path / "half.pt", model={k: t.half() for k, t in new.items()})
    pin(tmp_path / "half.pt", tmp_path / "c")
    assert load_teacher(tmp_path / "c").model.encoder.layers[0].attention.q_proj.weight.dtype == torch.float32


class Dictionary:
    """fairseq's, as far as a pickle sees it."""

    def __init__(self):
        self.symbols, self.indices = ["<s>", "0"], {"<s>": 0, "0": 1}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_settings_in_a_namespace_and_dictionaries_of_fairseq_are_read_without_fairseq(tmp_path, monkeypatch, zipped):
    model = write(tmp_path / "cfg.pt", "hubert", "large", normalise=True)
    module = types.ModuleType("fairseq.data.dictionary")
    monkeypatch.setattr(Dictionary, "__module__", module.__name__)
    module.Dictionary = Dictionary
    with monkeypatch.context() as patch:
        for name in ("fairseq", "fairseq.data", module.__name__):
            patch.setitem(sys.modules, name, module)
        args = argparse.Namespace(arch="hubert", normalize=True, sample_rate=16_000, **TINY, **LARGE)
        old = {"args": args, "cfg": None, "model": model.state_dict(), "task_state": {"dictionaries": [Dictionary()]}}
        torch.save(old, tmp_path / "args.pt", _use_new_zipfile_serialization=zipped)
    assert pin(tmp_path / "args.pt", tmp_path / "a").digest == pin(tmp_path / "cfg.pt", tmp_path / "b").digest


def test_settings_in_omegaconf_are_read_without_it(tmp_path):
    omegaconf = pytest.importorskip("omegaconf")
    write(tmp_path / "plain.pt", "wav2vec2")
    state = torch.load(tmp_path / "plain.pt", weights_only=True)
    torch.save({**state, "cfg": omegaconf.OmegaConf.create(state["cfg"])}, tmp_path / "omega.pt")
    assert pin(tmp_path / "omega.pt", tmp_path / "a").digest == pin(tmp_path / "plain.pt", tmp_path / "b").digest


def refused(path, out, kind, normalise=None):
    with pytest.raises(kind) as error:
        pin(path, out, normalise)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert not out.exists()
    return str(error.value)


def test_tensors_that_are_unknown_absent_or_of_another_shape_are_named(tmp_path):
    path = tmp_path / "model.pt"
    weights = write(path).state_dict()
    write(path, model={**weights, "encoder.surprise": torch.ones(2), "decoder.weight": torch.ones(2)})
    assert "encoder.surprise, decoder.weight" in refused(path, tmp_path / "out", StoreError)
    both = {**weights, "encoder.pos_conv.0.parametrizations.weight.original0": weights["encoder.pos_conv.0.weight_g"]}
    write(path, model=both)
    assert "encoder.pos_conv.0.parametrizations" in refused(path, tmp_path / "out", StoreError)
    write(path, model={k: t for k, t in weights.items() if k != "encoder.layers.2.fc2.bias"})
    text = refused(path, tmp_path / "out", StoreError)
    assert "missing: encoder.layers.2.feed_forward.output_dense.bias" in text
    write(path, model={**weights, "encoder.layers.1.self_attn.k_proj.weight": torch.ones(24, 23)})
    text = refused(path, tmp_path / "out", StoreError)
    assert "encoder.layers.1.attention.k_proj.weight is (24, 23), not (24, 24)" in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"encoder_layers": 12}, "encoder_layers is 12 and the weights have 3"),
        ({"encoder_embed_dim": 768}, "encoder_embed_dim is 768 and the weights have 24"),
        ({"encoder_ffn_embed_dim": 80}, "encoder_ffn_embed_dim is 80 and the weights have 40"),
        ({"extractor_mode": "layer_norm"}, "extractor_mode is True and the weights have False"),
        ({"conv_bias": True}, "conv_bias is True and the weights have False"),
        ({"conv_pos": 128}, "conv_pos is 128 and the weights have 16"),
        ({"conv_pos_groups": 8}, "encoder_embed_dim/conv_pos_groups is 3 and the weights have 6"),
        (
            {"conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 6"},
            "conv_feature_layers[5] is (8, 3) and the weights have",
        ),
        ({"conv_feature_layers": "__import__('os').system('touch executed')"}, "no list of (channels, kernel, stride)"),
        ({"conv_feature_layers": "[(8,10,5)] * 99 * 99 * 99 * 99"}, "no list of (channels, kernel, stride)"),
    ],
)
def test_settings_that_the_weights_contradict_are_named(tmp_path, monkeypatch, changes, text):
    monkeypatch.chdir(tmp_path)
    settings = {**TINY, **BASE}
    model = random_model("hubert", settings)
    torch.save(checkpoint("hubert", {**settings, **changes}, model), tmp_path / "model.pt")
    assert text in refused(tmp_path / "model.pt", tmp_path / "out", StoreError)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"activation_fn": "relu"}, "activation_fn is 'relu' and only 'gelu' can be a teacher"),
        ({"layer_type": "conformer"}, "layer_type is 'conformer'"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm is True"),
        ({"_name": "data2vec_audio"}, "is a model 'data2vec_audio'; a checkpoint can be of hubert, wav2vec2 or wavlm"),
        ({"encoder_attention_heads": 5}, "transformers refuses this configuration"),
        ({"conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] + [(12,2,1)]"}, "frames every 320 samples"),
    ],
)
def test_a_model_that_cannot_be_a_teacher_is_refused_with_its_reason(tmp_path, changes, text):
    settings = {**TINY, **BASE}
    state = checkpoint("hubert", settings, random_model("hubert", settings))
    state["cfg"]["model"] |= changes
    torch.save(state, tmp_path / "model.pt")
    assert text in refused(tmp_path / "model.pt", tmp_path / "out", SettingsError)


def test_a_checkpoint_that_is_silent_about_normalisation_needs_the_setting(tmp_path):
    settings = {**TINY, **BASE}
    state = checkpoint("hubert", settings, random_model("hubert", settings))
    del state["cfg"]["task"]["normalize"]
    torch.save(state, tmp_path / "model.pt")
    text = refused(tmp_path / "model.pt", tmp_path / "out", SettingsError)
    assert "set the teacher's normalise: false (base models)" in text
    assert pin(tmp_path / "model.pt", tmp_path / "out", normalise=True).normalise is True
    state["cfg"]["task"] |= {"normalize": False, "sample_rate": 8_000}
    torch.save(state, tmp_path / "narrow.pt")
    assert "trained at 8000 Hz" in refused(tmp_path / "narrow.pt", tmp_path / "narrow", SettingsError)


class Payload:
    def __reduce__(self):
        return os.system, ("touch executed",)


class Sly:
    """A class that is known, called with what is not."""

    def __reduce__(self):
        return eval, ("open('executed', 'w')",)


@pytest.mark.parametrize("payload", [Payload(), Sly()])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_checkpoint_is_refused_and_not_run(tmp_path, monkeypatch, payload, zipped):
    monkeypatch.chdir(tmp_path)
    settings = {**TINY, **BASE}
    state = checkpoint("hubert", settings, random_model("hubert", settings))
    torch.save({**state, "extra_state": payload}, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    text = refused(tmp_path / "model.pt", tmp_path / "out", StoreError)
    assert "holds more than tensors" in text
    assert "nothing of it was run" in text
    assert not (tmp_path / "executed").exists()


def test_settings_without_an_end_are_refused_instead_of_followed(tmp_path):
    state = checkpoint("hubert", {**TINY, **BASE}, random_model("hubert", {**TINY, **BASE}))
    endless = {}
    endless["itself"] = endless
    bomb = "x"
    for _ in range(25):
        bomb = [bomb] * 10
    for name, trap in (("endless", endless), ("bomb", bomb)):
        torch.save({**state, "cfg": {**state["cfg"], "common": trap}}, tmp_path / f"{name}.pt")
        assert "nested or long" in refused(tmp_path / f"{name}.pt", tmp_path / "out", StoreError)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_cut_or_overwritten_checkpoint_is_refused(tmp_path, zipped):
    settings = {**TINY, **BASE}
    path = tmp_path / "model.pt"
    whole = checkpoint("hubert", settings, random_model("hubert", settings))
    torch.save(whole, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    for cut in (0, 1, 100, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        refused(path, tmp_path / "out", StoreError)
    path.write_bytes(b"<html>not found</html>")
    refused(path, tmp_path / "out", StoreError)


@pytest.mark.parametrize("zipped", [True, False])
def test_bytes_changed_at_random_are_one_of_our_errors_or_harmless(tmp_path, zipped):
    path = tmp_path / "model.pt"
    state = {"args": argparse.Namespace(a=1), "model": {"w": torch.randn(4, 5), "b": torch.randn(3).half()}}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    data, rng, refusals = path.read_bytes(), random.Random(0), []
    for _ in range(300):
        changed = bytearray(data)
        for _ in range(3):
            changed[rng.randrange(min(len(data), 900))] = rng.randrange(256)
        path.write_bytes(changed)
        try:
            read_pickle(path, "here")
        except StoreError as error:
            refusals.append(str(error))
    assert len(refusals) > 100
    assert not any("\n" in text for text in refusals)


def test_a_student_can_start_from_a_pinned_checkpoint(tmp_path):
    """The command as a person runs it, and the weights it wrote for students."""
    model = write(tmp_path / "model.pt")
    source = {"kind": "fairseq", "path": str(tmp_path / "model.pt"), "sha256": None}
    (tmp_path / "params.yaml").write_text(json.dumps({"teachers": {"robust": {"source": source, "normalise": None}}}))
    paths = ["--out", str(tmp_path / "teacher"), "--init", str(tmp_path / "init.safetensors")]
    done = CliRunner().invoke(app, ["robust", *paths, "--params", str(tmp_path / "params.yaml")])
    assert done.exit_code == 0, done.output
    adopted = load_file(tmp_path / "init.safetensors")
    assert torch.equal(adopted["blocks.2.ffn_up.weight"], model.encoder.layers[2].fc1.weight)
    assert torch.equal(adopted["feature_norm.bias"], model.layer_norm.bias)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (torch.ones(3), "holds no dictionary"),
        ({}, "has nothing; a checkpoint of fairseq"),
        ({"state_dict": {}}, "has state_dict; a checkpoint of fairseq"),
        ({"model": {"a": 1}, "cfg": {"encoder_layers": 1}}, "a among the weights is no tensor"),
        ({"model": {"a": torch.ones(1)}, "cfg": {"encoder_layers": 1}}, "is a model None"),
    ],
)
def test_another_kind_of_file_is_refused(tmp_path, content, text):
    torch.save(content, tmp_path / "model.pt")
    kind = SettingsError if "is a model" in text else StoreError
    assert text in refused(tmp_path / "model.pt", tmp_path / "out", kind)


def test_the_file_can_be_held_to_its_digest(tmp_path):
    path = tmp_path / "model.pt"
    write(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert pin(path, tmp_path / "out", sha256=digest).source["sha256"] == digest
    with pytest.raises(StoreError, match="source.sha256 says 000000000000…; fetch it again"):
        pin(path, tmp_path / "other", sha256="0" * 64)
    with pytest.raises(DataError, match="does not exist; download the checkpoint"):
        pin(tmp_path / "nowhere.pt", tmp_path / "other")
    with pytest.raises(ValidationError):
        Fairseq(kind="fairseq", path="x.pt", sha256="main")
