import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cache.errors import SettingsError, StoreError
from cache.publish import read_json, write_json
from pipeline.student.adopt import adopt, copy_adopted, read_shape, save_adopted
from pipeline.student.encoder import Encoder, initialise
from pipeline.student.shape import EncoderShape, PositionBias
from tests.student_fixtures import FRONTS, TINY, WAVLM, changed, hf_model


def test_older_and_newer_spellings_of_weight_norm_are_the_same_weights(tmp_path):
    hf_model().save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    root = "encoder.pos_conv_embed.conv."
    pairs = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
    now = adopt(tmp_path)
    for old, new in pairs.items():
        source, target = (root + new, root + old) if root + new in written else (root + old, root + new)
        written[target] = written.pop(source)
    save_file(written, tmp_path / "model.safetensors")
    again = adopt(tmp_path)
    assert now.keys() == again.keys()
    assert all(torch.equal(now[name], again[name]) for name in now)


def test_a_ctc_model_gives_its_trunk(tmp_path):
    import transformers

    ctc = transformers.HubertForCTC(hf_model("hubert").config)
    ctc.save_pretrained(tmp_path)
    assert any(key.startswith("hubert.") for key in load_file(tmp_path / "model.safetensors"))
    assert set(adopt(tmp_path)) == set(Encoder(TINY).state_dict())


def test_tensors_that_nobody_expects_are_refused_by_name(tmp_path):
    hf_model().save_pretrained(tmp_path)
    written = load_file(tmp_path / "model.safetensors")
    save_file({**written, "encoder.adapter.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(StoreError, match=r"unknown tensors.*encoder\.adapter\.weight"):
        adopt(tmp_path)
    written.pop("encoder.layers.2.final_layer_norm.bias")
    save_file(written, tmp_path / "model.safetensors")
    with pytest.raises(StoreError, match=r"disagree about blocks\.2\.ffn_norm\.bias"):
        adopt(tmp_path)


def test_an_unknown_family_or_activation_is_refused(tmp_path):
    hf_model().save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    write_json(tmp_path / "config.json", {**config, "hidden_act": "relu"})
    with pytest.raises(StoreError, match="hidden_act is 'relu'"):
        adopt(tmp_path)
    write_json(tmp_path / "config.json", {**config, "model_type": "whisper"})
    with pytest.raises(StoreError, match="'whisper'; a student can adopt from hubert"):
        adopt(tmp_path)


def test_a_student_copies_everything_but_the_encoder_norm(tmp_path):
    (file,) = init_files(tmp_path, hf_model())
    adopted = load_file(file)
    student = Encoder(TINY.model_copy(update={"heads": (3, 3), "ffn": (40, 40), "feature_norm": False}))
    initialise(student, torch.Generator().manual_seed(0))
    copy_adopted(student, [file], final_norm=False)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, adopted[name]) != name.startswith("norm."), name
    torch.testing.assert_close(student.norm.weight, torch.ones(24))


def test_an_init_of_another_shape_is_refused_with_both_shapes(tmp_path):
    files = init_files(tmp_path, hf_model())
    wider = Encoder(TINY.model_copy(update={"ffn": (48, 40, 40)}))
    with pytest.raises(SettingsError, match=r"blocks\.0\.ffn_up\.weight is \(40, 24\).*\(48, 24\)"):
        copy_adopted(wider, files, final_norm=False)
    deeper = Encoder(TINY.model_copy(update={"heads": (3,) * 4, "ffn": (40,) * 4}))
    with pytest.raises(SettingsError, match=r"has no blocks\.3\."):
        copy_adopted(deeper, files, final_norm=False)


def init_files(tmp_path, *models, normalise=False):
    """What `decant teacher` leaves of each model."""
    files = [tmp_path / f"{number}.safetensors" for number in range(len(models))]
    for file, model in zip(files, models, strict=True):
        folder = file.with_suffix("")
        model.save_pretrained(folder)
        save_adopted(file, adopt(folder), read_shape(folder, normalise), file.stem)
    return files


def test_the_mean_of_several_trunks_is_rounded_once(tmp_path):
    files = init_files(tmp_path, hf_model("hubert"), hf_model("wav2vec2", num_hidden_layers=4))
    one, other = (load_file(file) for file in files)
    one["projection.bias"][:2] = torch.tensor([1.0, 3e38])
    other["projection.bias"][:2] = torch.tensor([1.0 + 2**-22, 3e38])  # a float32 sum would overflow
    for file, weights in zip(files, (one, other), strict=True):
        save_adopted(file, weights, TINY, "")
    student = Encoder(TINY)
    copy_adopted(student, files, final_norm=True)
    assert student.projection.bias[:2].tolist() == [1.0 + 2**-23, torch.tensor(3e38).item()]
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, ((one[name].double() + other[name].double()) / 2).float()), name


def test_the_last_norm_comes_along_if_asked_for(tmp_path):
    (file,) = init_files(tmp_path, hf_model())
    student = Encoder(TINY)
    copy_adopted(student, [file], final_norm=True)
    assert all(torch.equal(tensor, load_file(file)[name]) for name, tensor in student.state_dict().items())


def test_a_wavlm_gives_its_position_bias_to_students_that_have_one(tmp_path):
    wavlm = hf_model("wavlm", num_buckets=12, max_bucket_distance=20)
    (file,) = init_files(tmp_path, wavlm)
    first, second = (block.attention for block in wavlm.encoder.layers[:2])
    student = Encoder(changed(WAVLM, heads=(3, 3), ffn=(40, 40)))
    copy_adopted(student, [file], final_norm=False)
    assert torch.equal(student.position_bias.table, first.rel_attn_embed.weight)
    assert torch.equal(student.blocks[1].attention.gate.weight, second.gru_rel_pos_linear.weight)
    assert torch.equal(student.blocks[1].attention.gate_scale, second.gru_rel_pos_const.flatten())
    plain = Encoder(TINY)
    copy_adopted(plain, [file], final_norm=False)
    assert torch.equal(plain.blocks[1].attention.key.weight, second.k_proj.weight)
    with pytest.raises(SettingsError, match=r"blocks\.0\.attention\.gate\w*\S* .*the student's shape asks for"):
        copy_adopted(Encoder(WAVLM), init_files(tmp_path, hf_model("hubert")), final_norm=False)


def test_a_block_that_shares_attention_takes_what_it_has_a_place_for(tmp_path):
    (file,) = init_files(tmp_path, hf_model())
    student = Encoder(changed(TINY, shares_attention=(False, True, False)))
    copy_adopted(student, [file], final_norm=False)
    assert torch.equal(student.blocks[1].attention.value.weight, load_file(file)["blocks.1.attention.value.weight"])


def test_trunks_that_differ_cannot_be_averaged(tmp_path):
    files = init_files(tmp_path, hf_model(), hf_model(intermediate_size=48))
    with pytest.raises(SettingsError, match=r"ffn_up\.weight is \(48, 24\) in .*1\.safetensors but \(40, 24\)"):
        copy_adopted(Encoder(TINY), files, final_norm=False)


DISTANT = PositionBias(buckets=12, max_distance=40, heads=3)


@pytest.mark.parametrize(
    ("shape", "changes", "refused"),
    [
        (TINY, {"pre_norm": True}, r"pre_norm is false in .*0\.safetensors but true .*; set pre_norm to false"),
        (TINY, {"normalise": True}, "set normalise to false"),
        (
            TINY,
            {"heads": (6,) * 3, "head_width": 4},
            r"head_width is 8 .* 4 .*; set head_width to 8 and heads to \[3, 3, 3\]",
        ),
        (TINY, {"feature_norm_width": 13}, "set feature_norm_width to 12"),
        (
            TINY,
            {"conv_spans": ((10, 5), (3, 2), (3, 2), (3, 2), (3, 2), (2, 1), (2, 4))},
            "set conv_spans to .*, or its init",
        ),
        (WAVLM, {"position_bias": DISTANT}, r"set position_bias\.max_distance to 20"),
        (WAVLM, {"kept_heads": ((0, 1, 2), (2, 1, 0), (0, 1, 2))}, "set kept_heads to null"),
    ],
)
def test_a_student_that_computes_something_else_with_tensors_of_the_same_sizes_is_refused(
    tmp_path, shape, changes, refused
):
    wavlm = hf_model("wavlm", num_buckets=12, max_bucket_distance=20)
    files = init_files(tmp_path, hf_model() if shape is TINY else wavlm)
    student, fits = Encoder(EncoderShape.model_construct(**{**dict(shape), **changes})), Encoder(shape)
    assert {n: t.shape for n, t in student.state_dict().items()} == {n: t.shape for n, t in fits.state_dict().items()}
    with pytest.raises(SettingsError, match=refused):
        copy_adopted(student, files, final_norm=False)
    copy_adopted(fits, files, final_norm=False)


def test_what_a_student_has_no_place_for_may_differ(tmp_path):
    """A WavLM's distances for a student without position bias, kept columns in their order, fewer blocks, other dropout."""
    large = init_files(tmp_path, hf_model("hubert", **FRONTS["large"]), normalise=True)
    front = {"pre_norm": True, "front_norm": "layer", "conv_bias": True, "normalise": True}
    copy_adopted(Encoder(changed(TINY, **front, heads=(3,), ffn=(40,))), large, final_norm=True)
    wavlms = [hf_model("wavlm", num_buckets=12, max_bucket_distance=distance) for distance in (20, 40)]
    files = init_files(tmp_path, *wavlms)
    copy_adopted(Encoder(TINY), files, final_norm=False)
    copy_adopted(Encoder(changed(WAVLM, kept_heads=((0, 1, 2),) * 3)), files[:1], final_norm=False)
    with pytest.raises(SettingsError, match=r"max_distance is 20 in .* but 40 in .*1\.safetensors: .* agree"):
        copy_adopted(Encoder(WAVLM), files, final_norm=False)


def test_a_file_that_does_not_say_what_its_trunk_computes_is_to_be_made_again(tmp_path):
    (file,) = init_files(tmp_path, hf_model())
    for metadata in (None, {"teacher": "1" * 64}, {"teacher": "ab" * 32}, {"teacher": '{"computes": {}}'}):
        save_file(load_file(file), tmp_path / "older.safetensors", metadata=metadata)
        with pytest.raises(StoreError, match=r"older\.safetensors does not say .*`decant teacher` again"):
            copy_adopted(Encoder(TINY), [tmp_path / "older.safetensors"], final_norm=False)


def test_the_same_trunk_gives_the_same_bytes(tmp_path):
    (file,) = init_files(tmp_path, hf_model())
    (again,) = init_files(tmp_path / "again", hf_model())
    assert again.read_bytes() == file.read_bytes()
    with safe_open(file, "pt") as opened:
        assert len(opened.metadata()) == 1  # safetensors orders several keys by a hash that every process draws anew


def test_a_configuration_that_leaves_out_what_a_trunk_computes_is_refused_by_name(tmp_path):
    hf_model("wavlm", num_buckets=12, max_bucket_distance=20).save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    left = {k: v for k, v in config.items() if k not in ("num_buckets", "max_bucket_distance")}
    write_json(tmp_path / "config.json", left)
    with pytest.raises(StoreError, match="leaves out num_buckets, max_bucket_distance; `decant teacher`"):
        read_shape(tmp_path)
