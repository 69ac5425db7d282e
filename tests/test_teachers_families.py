"""Every family: the same layers in any batch, those of transformers' own route, on frames whose time is known."""

import inspect
import json

import numpy as np
import pytest
import torch
import transformers
from typer.testing import CliRunner

from cache.errors import DataError, SettingsError
from cache.receipts import open_receipt
from pipeline.extract import extract
from pipeline.extraction.settings import Calibration, ExtractParams, Fail, Keep
from pipeline.student.adopt import copy_adopted
from pipeline.student.encoder import Encoder
from pipeline.teachers.families import FAMILIES, PAIRS, WHISPER, build_model
from pipeline.teachers.forward import load_teacher
from pipeline.teachers.grid import STORE, Grid, onto_store
from pipeline.teachers.mel import LogMel, filter_banks
from pipeline.teachers.sources import Folder, TeacherParams, materialise
from stages.teacher import app
from tests.conftest import TINY_HUBERT
from tests.student_fixtures import TINY as TINY_STUDENT
from tests.test_teachers_forward import FRONTS, speech_like

pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask"),
    pytest.mark.filterwarnings("ignore:__array_wrap__"),
]
TINY_DATA2VEC = {k: v for k, v in TINY_HUBERT.items() if k != "num_conv_pos_embeddings"}
TINY_BERT = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40}
TINY_BERT |= {"left_max_position_embeddings": 5, "right_max_position_embeddings": 3, "conv_depthwise_kernel_size": 7}
TINY_WHISPER = {"d_model": 24, "encoder_layers": 3, "encoder_attention_heads": 3, "encoder_ffn_dim": 40}
TINY_WHISPER |= {"decoder_layers": 1, "decoder_attention_heads": 3, "decoder_ffn_dim": 16, "vocab_size": 32}
TINY_WHISPER |= {"max_source_positions": 100, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TINY_WHISPER |= {"decoder_start_token_id": 1}

MODELS = {  # what is tested -> family, sizes, normalised waveforms, how its frames come to the store's
    **{
        f"{family} {front}": (family, {**TINY_HUBERT, **FRONTS[front]}, front == "large", None)
        for family in ("hubert", "wav2vec2", "wavlm")
        for front in FRONTS
    },
    "data2vec": ("data2vec-audio", TINY_DATA2VEC, True, None),
    "data2vec with even kernels": ("data2vec-audio", {**TINY_DATA2VEC, "conv_pos_kernel_size": 8}, False, None),
    "w2v-bert": ("wav2vec2-bert", TINY_BERT, False, "linear"),
    "w2v-bert, sinusoids": ("wav2vec2-bert", {**TINY_BERT, "position_embeddings_type": "relative"}, False, "nearest"),
    "w2v-bert, rotary": ("wav2vec2-bert", {**TINY_BERT, "position_embeddings_type": "rotary"}, False, "nearest"),
    "whisper": ("whisper", TINY_WHISPER, False, "linear"),
    "whisper of 128 bins": ("whisper", {**TINY_WHISPER, "num_mel_bins": 128}, False, "nearest"),
}
SPECTRAL = {"w2v-bert", "w2v-bert, sinusoids", "w2v-bert, rotary", "whisper", "whisper of 128 bins"}


def extractor_of(family, sizes, normalise):
    if family == "whisper":
        return transformers.WhisperFeatureExtractor(
            feature_size=sizes.get("num_mel_bins", 80), chunk_length=sizes["max_source_positions"] // 50
        )
    if family == "wav2vec2-bert":
        return transformers.SeamlessM4TFeatureExtractor()
    return transformers.Wav2Vec2FeatureExtractor(do_normalize=normalise)


def make_folder(path, name, **changes):
    """A random model as transformers saves it (Whisper with its decoder); norms and biases are random too."""
    family, sizes, normalise, _ = MODELS[name]
    make = transformers.WhisperModel if family == "whisper" else FAMILIES[family].model
    torch.manual_seed(0)
    model = make(FAMILIES[family].config(**{**sizes, **changes})).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.save_pretrained(path)
    extractor_of(family, sizes, normalise).save_pretrained(path)
    return model


def pin(path, out, align=None, normalise=None):
    source = Folder(kind="folder", path=str(path), align=align)
    return materialise(TeacherParams(source=source, normalise=normalise), out)


def make_teacher(tmp_path, name, **changes):
    model = make_folder(tmp_path / "source", name, **changes)
    pin(tmp_path / "source", tmp_path / "teacher", MODELS[name][3])
    return load_teacher(tmp_path / "teacher"), model


@pytest.mark.parametrize("name", MODELS)
def test_no_company_order_or_padding_changes_a_layer(tmp_path, name):
    teacher, _ = make_teacher(tmp_path, name)
    shortest = PAIRS.field if teacher.pinned.family == "wav2vec2-bert" else 400
    lengths = [shortest, shortest + 319, 3_333, 9_999, 16_000, 12_345]
    waves, samples = speech_like(*lengths)
    alone = [teacher.layers(waves[u : u + 1, :n], samples[u : u + 1]) for u, n in enumerate(lengths)]
    rng = np.random.default_rng(0)
    for _ in range(8):
        batch = rng.permutation(len(lengths))[: rng.integers(1, len(lengths) + 1)].tolist()
        width = int(samples[batch].max()) + int(rng.choice([0, 1, 160, 7_000]))
        given = torch.nn.functional.pad(waves, (0, 8_000))[batch, :width]
        given += 3.0 * (torch.arange(width) >= samples[batch][:, None])  # what lies in the padding is nobody's
        together = teacher.layers(given, samples[batch])
        assert len(together) == teacher.num_layers == 4
        for row, u in enumerate(batch):
            frames = (lengths[u] - 400) // 320 + 1
            for one, many in zip(alone[u], together, strict=True):
                assert one.shape == (1, frames, teacher.width)
                torch.testing.assert_close(many[row, :frames], one[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in SPECTRAL])
def test_what_differs_between_batches_is_rounding_alone(tmp_path, name):
    """In double precision nothing is left of it; what leaked from the padding would stay."""
    teacher, _ = make_teacher(tmp_path, name)
    teacher.model.double()
    waves, samples = speech_like(560, 3_333, 9_999)
    together = teacher.layers(torch.nn.functional.pad(waves, (0, 7_000)).double(), samples)
    for row, n in enumerate(samples.tolist()):
        for one, many in zip(
            teacher.layers(waves[row : row + 1, :n].double(), samples[row : row + 1]), together, strict=True
        ):
            assert one.dtype == torch.float64
            torch.testing.assert_close(many[row, : one.shape[1]], one[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in MODELS if name not in SPECTRAL])
def test_a_model_that_hears_waveforms_has_the_layers_of_transformers(tmp_path, name):
    teacher, model = make_teacher(tmp_path, name)
    wave, samples = speech_like(8_000)
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "source")
    prepared = extractor(wave[0].numpy(), sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        expected = model(prepared, output_hidden_states=True).hidden_states
    for ours, theirs in zip(teacher.layers(wave, samples), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # 1.3e-5 on a processor without AVX


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("w2v-bert")])
def test_w2v_bert_has_the_layers_of_transformers_on_its_own_frames(tmp_path, name):
    """With two utterances in the reference's batch: its mask is right, so its padding does not matter either."""
    teacher, model = make_teacher(tmp_path, name)
    waves, samples = speech_like(8_000, 5_111)
    prepared = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "source")(
        [wave[:n].numpy() for wave, n in zip(waves, samples, strict=True)], sampling_rate=16_000, return_tensors="pt"
    )
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(**prepared, output_hidden_states=True).hidden_states
        _, ours = teacher.hear(waves, samples)
    frames = PAIRS.num_frames(samples)
    assert torch.equal(frames, prepared["attention_mask"].sum(1))
    for one, other in zip(ours, expected, strict=True):
        for row, count in enumerate(frames.tolist()):
            torch.testing.assert_close(one[row, :count], other[row, :count], rtol=0, atol=3e-4)


@pytest.mark.parametrize("name", ["whisper", "whisper of 128 bins"])
def test_whisper_has_the_layers_of_transformers_on_its_own_frames_and_no_final_norm(tmp_path, name):
    teacher, model = make_teacher(tmp_path, name)
    wave, samples = speech_like(8_111)
    prepared = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "source")(
        wave[0].numpy(), sampling_rate=16_000, return_tensors="pt", return_attention_mask=True
    )
    with torch.no_grad():
        expected = model.encoder(prepared["input_features"], output_hidden_states=True).hidden_states
        _, ours = teacher.hear(wave, samples)
        ours_normed = model.encoder.layer_norm(ours[-1])
    mel = int(prepared["attention_mask"].sum())
    assert ours[0].shape[1] == int(model.encoder._get_feat_extract_output_lengths(torch.tensor(mel))) == 26
    for one, other in zip([*ours[:-1], ours_normed], expected, strict=True):
        torch.testing.assert_close(one, other[:, :26], rtol=0, atol=1e-5)


def test_data2vec_of_transformers_would_change_with_the_batch(tmp_path):
    teacher, model = make_teacher(tmp_path, "data2vec with even kernels")
    waves, samples = speech_like(3_333, 16_000)
    with torch.no_grad():
        mask = (torch.arange(16_000) < samples[:, None]).long()
        stock = model(waves, attention_mask=mask, output_hidden_states=True).hidden_states[0][0, :10]
    assert (stock - teacher.layers(waves, samples)[0][0, :10]).abs().max() > 0.1


@pytest.mark.parametrize("name", ["hubert base", "wavlm large", "data2vec", "w2v-bert", "whisper"])
def test_what_training_drops_and_masks_is_off(tmp_path, name):
    teacher, _ = make_teacher(tmp_path / "a", name)
    key = "encoder_layerdrop" if name == "whisper" else "layerdrop"
    off = {key: 1.0, "apply_spec_augment": True, "mask_time_prob": 0.9, "mask_feature_prob": 0.9}
    dropping, _ = make_teacher(tmp_path / "b", name, **off)
    wave, samples = speech_like(8_000)
    for one, other in zip(teacher.layers(wave, samples), dropping.layers(wave, samples), strict=True):
        assert torch.equal(one, other)
    assert not dropping.model.training


@pytest.mark.parametrize("family", ["wav2vec2-bert", "whisper"])
def test_frames_are_counted_as_transformers_counts_them(family):
    lengths = [*range(560, 1_400, 53), *range(15_990, 16_330, 7)]
    waves = [np.zeros(n, np.float32) for n in lengths]
    if family == "whisper":
        given = transformers.WhisperFeatureExtractor(chunk_length=2)(
            waves, sampling_rate=16_000, return_attention_mask=True, return_tensors="np"
        )
        expected = (given["attention_mask"].sum(1) - 1) // 2 + 1  # WhisperModel._get_feat_extract_output_lengths
    else:
        extractor = transformers.SeamlessM4TFeatureExtractor()
        expected = np.array(
            [extractor([w], sampling_rate=16_000, return_tensors="np")["attention_mask"].sum() for w in waves]
        )
    np.testing.assert_array_equal(FAMILIES[family].grid.num_frames(torch.tensor(lengths)).numpy(), expected)


def click_frames(family, at):
    """Frames that a click at sample `at` changes, weighted by how much."""
    generator = torch.Generator().manual_seed(at)
    wave = 0.01 * torch.randn(1, 16_000, generator=generator)
    clicked = wave.clone()
    clicked[0, at - 8 : at + 8] += 0.5 * torch.randn(16, generator=generator)
    samples = torch.tensor([16_000])
    if family == "whisper":
        first, second = (LogMel(80, 16_000)(w, samples)[0].T for w in (wave, clicked))
        kernel = torch.ones(1, 1, 3) / 3  # both of Whisper's convolutions are centred on their frame
        changed = (first - second).abs().sum(1)[None, None]
        once = torch.nn.functional.conv1d(changed, kernel, padding=1)
        weight = torch.nn.functional.conv1d(once, kernel, stride=2, padding=1)[0, 0]
    elif family == "wav2vec2-bert":
        first, second = (filter_banks(w, samples, 80)[0] for w in (wave, clicked))
        weight = (first - second).abs().sum(1)
    else:
        torch.manual_seed(0)
        front = transformers.HubertModel(
            transformers.HubertConfig(**{**TINY_HUBERT, **FRONTS["large"]})
        ).feature_extractor
        with torch.no_grad():
            weight = (front(wave) - front(clicked)).abs().sum(1)[0]
    weight = (weight - 0.2 * weight.max()).clamp(min=0)  # w2v-BERT's normalisation moves all frames a little
    return weight / weight.sum()


@pytest.mark.parametrize("family", ["hubert", "wav2vec2-bert", "whisper"])
def test_a_click_is_found_where_the_grid_says_its_frames_are(family):
    grid = FAMILIES[family].grid
    places = range(4_000, 12_000, 193)
    found = []
    for at in places:
        weight = click_frames(family, at)
        found.append(float((weight * torch.arange(len(weight))).sum()) * grid.hop + grid.centre - at)
    assert abs(np.mean(found)) < 40  # a wrong centre would be off by 80 (w2v-BERT) or 200 samples (Whisper)


@pytest.mark.parametrize("grid", [PAIRS, WHISPER, STORE, Grid(hop=640, field=1_040, centre=520)])
def test_frames_come_to_the_store_by_interpolation_in_time(grid):
    lengths = [1_040, 5_000, 9_999, 16_000]
    samples = torch.tensor(lengths)
    have = grid.num_frames(samples).tolist()
    layers = [torch.randn(4, max(have) + 2, 3, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    aligned = {how: onto_store(layers, grid, samples, how) for how in ("linear", "nearest")}
    for row, (n, count) in enumerate(zip(lengths, have, strict=True)):
        wanted = np.arange((n - 400) // 320 + 1) * 320 + 200
        given = np.arange(count) * grid.hop + grid.centre
        for number, layer in enumerate(layers):
            values = layer[row, :count].numpy()
            linear = np.stack([np.interp(wanted, given, values[:, d]) for d in range(3)], 1)
            got = {how: found[number][row, : len(wanted)].numpy() for how, found in aligned.items()}
            np.testing.assert_allclose(got["linear"], linear, rtol=0, atol=1e-5)
            distance = np.abs(wanted[:, None] - given[None, :])
            chosen = [np.abs(values - frame).sum(1).argmin() for frame in got["nearest"]]
            np.testing.assert_array_equal(distance[np.arange(len(wanted)), chosen], distance.min(1))
    if grid == STORE:
        torch.testing.assert_close(aligned["linear"][0][3], layers[0][3, : have[3]], rtol=0, atol=0)


def test_frames_held_at_the_ends_are_held_for_less_than_a_hop():
    samples = torch.arange(560, 20_000)
    for grid in (PAIRS, WHISPER):
        last_wanted = (STORE.num_frames(samples) - 1) * STORE.hop + STORE.centre
        last_given = (grid.num_frames(samples) - 1) * grid.hop + grid.centre
        assert int((last_wanted - last_given).max()) < STORE.hop
        assert grid.centre - STORE.centre < STORE.hop


def test_a_model_on_other_frames_needs_to_be_told_how_they_pair(tmp_path):
    for name in ("w2v-bert", "whisper"):
        make_folder(tmp_path / name, name)
        with pytest.raises(
            SettingsError, match="they do not pair; say how to bring them there .* align: linear"
        ) as error:
            pin(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(error.value)
        first, second = (pin(tmp_path / name, tmp_path / f"{name} {how}", how) for how in ("linear", "nearest"))
        assert first.digest != second.digest
    make_folder(tmp_path / "hubert", "hubert base")
    with pytest.raises(SettingsError, match="frames of hubert are the store's already; leave out align: linear"):
        pin(tmp_path / "hubert", tmp_path / "out", "linear")
    with pytest.raises(SettingsError, match="hears spectra scaled its own way; set the teacher's normalise: false"):
        pin(tmp_path / "whisper", tmp_path / "out", "linear", normalise=True)
    assert not (tmp_path / "out").exists()


def test_the_description_says_what_is_heard_and_how_frames_were_brought_to_the_store(tmp_path):
    teacher, _ = make_teacher(tmp_path / "a", "w2v-bert")
    described = teacher.describe()
    assert described["frames"] == {"hop": 320, "field": 560, "centre": 280, "align": "linear"}
    assert described["input"] == "pairs of 80 log filter banks, each bin normalised over the utterance"
    assert (described["kind"], described["attention"], described["normalise"]) == ("wav2vec2-bert", "eager", False)
    assert json.loads(json.dumps(described)) == described
    teacher, _ = make_teacher(tmp_path / "b", "data2vec")  # on the store's frames: described as ever
    assert set(teacher.describe()) == {
        *("kind", "digest", "normalise", "layers", "width", "num_params", "precision", "attention")
    }


def test_an_utterance_that_does_not_fit_the_model_is_refused(tmp_path):
    teacher, _ = make_teacher(tmp_path / "a", "w2v-bert")
    with pytest.raises(DataError, match=r"559 samples and w2v-BERT's first frame needs 560"):
        teacher.layers(*speech_like(559, 3_000))
    teacher, _ = make_teacher(tmp_path / "b", "whisper")
    with pytest.raises(DataError, match=r"has 2\.0 s and Whisper hears 2 s; leave out .*max_sec: 2\)"):
        teacher.layers(*speech_like(32_001, 3_000))
    assert teacher.layers(*speech_like(32_000))[0].shape == (1, 99, 24)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("whisper", "hop_length", 320),
        ("whisper", "chunk_length", 30),
        ("w2v-bert", "stride", 1),
        ("hubert base", "sampling_rate", 8_000),
    ],
)
def test_a_model_trained_on_other_spectra_is_refused(tmp_path, name, key, value):
    make_folder(tmp_path / "source", name)
    path = tmp_path / "source" / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(SettingsError, match=f"{key} is {value} in preprocessor_config.json and only"):
        pin(tmp_path / "source", tmp_path / "out", MODELS[name][3])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["data2vec", "w2v-bert", "whisper"])
def test_a_pinned_folder_opens_with_transformers(tmp_path, name):
    teacher, _ = make_teacher(tmp_path, name)
    family = FAMILIES[MODELS[name][0]]
    model, details = family.model.from_pretrained(tmp_path / "teacher", output_loading_info=True)
    assert not any(details.values())
    extractor = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "teacher")
    original = transformers.AutoFeatureExtractor.from_pretrained(tmp_path / "source")
    for key in {*inspect.signature(type(original).__init__).parameters} - {"return_attention_mask"}:  # ours always does
        assert getattr(extractor, key, None) == getattr(original, key, None), key
    assert sum(p.numel() for n, p in model.named_parameters() if n != "masked_spec_embed") == teacher.pinned.num_params


def test_whisper_with_its_language_model_gives_the_same_encoder(tmp_path):
    expected = (make_teacher(tmp_path / "a", "whisper"))[0].pinned.digest
    torch.manual_seed(0)
    encoder = transformers.WhisperModel.from_pretrained(tmp_path / "a" / "source")
    whole = transformers.WhisperForConditionalGeneration(encoder.config)
    whole.model = encoder
    whole.save_pretrained(tmp_path / "b")
    extractor_of("whisper", TINY_WHISPER, False).save_pretrained(tmp_path / "b")
    (tmp_path / "b" / "config.json").write_text((tmp_path / "a" / "source" / "config.json").read_text())
    assert pin(tmp_path / "b", tmp_path / "out", "linear").digest == expected


@pytest.mark.parametrize("name", ["data2vec", "w2v-bert", "whisper"])
def test_the_command_pins_a_family_no_student_can_start_from_and_says_so_when_one_tries(tmp_path, name):
    make_folder(tmp_path / "source", name)
    source = {"kind": "folder", "path": str(tmp_path / "source")}
    if MODELS[name][3]:
        source["align"] = MODELS[name][3]
    (tmp_path / "params.yaml").write_text(json.dumps({"teachers": {"t": {"source": source, "normalise": None}}}))
    out, init = tmp_path / "teacher", tmp_path / "init.safetensors"
    done = CliRunner().invoke(
        app, ["t", "--out", str(out), "--init", str(init), "--params", str(tmp_path / "params.yaml")]
    )
    assert done.exit_code == 0, done.output
    assert f"teacher t: {MODELS[name][0]}" in done.output
    with pytest.raises(SettingsError, match="which the student's shape asks for; .*init to {kind: random}"):
        copy_adopted(Encoder(TINY_STUDENT), [init], final_norm=False)


def test_whisper_base_opens_from_the_configuration_it_was_published_with():
    """With the settings of generation that stand beside those of the model; sizes on the meta device."""
    published = {
        **{"model_type": "whisper", "d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "num_hidden_layers": 6},
        **{
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
        },
        **{"num_mel_bins": 80, "max_source_positions": 1500, "max_target_positions": 448, "vocab_size": 51865},
        **{"architectures": ["WhisperForConditionalGeneration"], "is_encoder_decoder": True, "torch_dtype": "float32"},
        **{"begin_suppress_tokens": [220, 50257], "forced_decoder_ids": [[1, 50259], [2, 50359]], "max_length": 448},
        **{"activation_dropout": 0.0, "scale_embedding": False, "use_cache": True, "transformers_version": "4.27.0"},
    }
    model = build_model(published, "here")
    front = 80 * 512 * 3 + 512 + 512 * 512 * 3 + 512 + 1500 * 512
    block = 4 * 512 * 512 + 3 * 512 + 2 * 512 * 2048 + 2048 + 512 + 4 * 512  # keys have no bias
    assert sum(p.numel() for p in model.parameters()) == front + 6 * block + 2 * 512 == 20_590_592


def test_whispers_layers_are_stored_on_the_manifests_frames(tmp_path, tiny_corpus):
    teacher, _ = make_teacher(tmp_path, "whisper")
    params = ExtractParams(
        version=1,
        codec="float32",
        chunk_frames=16,
        shard_frames=128,
        batch_seconds=4.0,
        long=Fail(kind="fail", max_sec=60.0),
        calibration=Calibration(seconds=60, seed=0),
    )
    keep = Keep(layers=(0, 3), select="all")
    receipt = extract(teacher, tiny_corpus.manifest, tiny_corpus.waves, params, keep, "cpu", lambda *_, **__: None, 0)
    store = open_receipt(receipt)
    for u in tiny_corpus.manifest:
        wave = torch.from_numpy(tiny_corpus.waves.read("wave", u.id)).float()[None] / 32768
        alone = teacher.layers(wave, torch.tensor([u.samples]))[3][0].numpy()
        np.testing.assert_allclose(store.read("layer-03", u.id), alone, rtol=0, atol=2e-5)
