import pytest
import torch
from safetensors.torch import load_file, save_file

from cache.errors import SettingsError, StoreError
from cache.publish import read_json, write_json
from pipeline.student.adopt import adopt, copy_adopted
from pipeline.student.encoder import Encoder, initialise
from tests.student_fixtures import TINY, WAVLM, changed, hf_model


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
    hf_model().save_pretrained(tmp_path)
    adopted = adopt(tmp_path)
    save_file(adopted, tmp_path / "init.safetensors")
    student = Encoder(TINY.model_copy(update={"heads": (3, 3), "ffn": (40, 40), "feature_norm": False}))
    initialise(student, torch.Generator().manual_seed(0))
    copy_adopted(student, [tmp_path / "init.safetensors"], final_norm=False)
    for name, tensor in student.state_dict().items():
        assert torch.equal(tensor, adopted[name]) != name.startswith("norm."), name
    torch.testing.assert_close(student.norm.weight, torch.ones(24))


def test_an_init_of_another_shape_is_refused_with_both_shapes(tmp_path):
    hf_model().save_pretrained(tmp_path)
    save_file(adopt(tmp_path), tmp_path / "init.safetensors")
    wider = Encoder(TINY.model_copy(update={"ffn": (48, 40, 40)}))
    with pytest.raises(SettingsError, match=r"blocks\.0\.ffn_up\.weight is \(40, 24\).*\(48, 24\)"):
        copy_adopted(wider, [tmp_path / "init.safetensors"], final_norm=False)
    deeper = Encoder(TINY.model_copy(update={"heads": (3,) * 4, "ffn": (40,) * 4}))
    with pytest.raises(SettingsError, match=r"has no blocks\.3\."):
        copy_adopted(deeper, [tmp_path / "init.safetensors"], final_norm=False)


def init_files(tmp_path, *models):
    """What `decant teacher` leaves of each model."""
    for number, model in enumerate(models):
        model.save_pretrained(tmp_path / str(number))
        save_file(adopt(tmp_path / str(number)), tmp_path / f"{number}.safetensors")
    return [tmp_path / f"{number}.safetensors" for number in range(len(models))]


def test_the_mean_of_several_trunks_is_rounded_once(tmp_path):
    files = init_files(tmp_path, hf_model("hubert"), hf_model("wav2vec2", num_hidden_layers=4))
    one, other = (load_file(file) for file in files)
    one["projection.bias"][:2] = torch.tensor([1.0, 3e38])
    other["projection.bias"][:2] = torch.tensor([1.0 + 2**-22, 3e38])  # a float32 sum would overflow
    for file, weights in zip(files, (one, other), strict=True):
        save_file(weights, file)
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
