"""The settings that the documentation shows are settings: each block of YAML is read as what it says it is."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import TypeAdapter

from pipeline.corpora.sources import Source
from pipeline.distill.augment import AugmentParams
from pipeline.distill.predictor import Predict
from pipeline.extraction.settings import ExtractParams, Keep
from pipeline.layers.ensembles import Ensemble
from pipeline.layers.similarity import SimilarityParams
from pipeline.layers.targets import Init
from pipeline.student.encoder import Encoder, count_parameters
from pipeline.student.shape import EncoderShape
from pipeline.tasks.asr import AsrParams
from pipeline.tasks.blstm import SpeechHead
from pipeline.tasks.verify import SvParams
from pipeline.teachers.sources import TeacherParams

DOCS = Path(__file__).parent.parent / "docs"


def blocks(page):
    """Every block of YAML on a page; lines that begin the same key anew are alternatives, each a block of its own."""
    for block in re.findall(r"```yaml\n(.*?)```", (DOCS / page).read_text(), re.DOTALL):
        lines = block.splitlines()
        if len({line.split(":")[0] for line in lines}) == 1 < len(lines):
            yield from map(yaml.safe_load, lines)
        else:
            yield yaml.safe_load(block)


@pytest.mark.parametrize("block", list(blocks("corpora.md")), ids=lambda block: next(iter(block)))
def test_a_corpus_of_the_documentation_is_one(block):
    ((_, source),) = block.items()
    assert TypeAdapter(Source).validate_python(source).kind == source["kind"]


def test_every_kind_of_corpus_is_documented():
    kinds = {next(iter(block.values()))["kind"] for block in blocks("corpora.md")} | {"espeak"}
    choices = TypeAdapter(Source).json_schema()["discriminator"]["mapping"]
    assert kinds == set(choices)


def test_the_teachers_of_the_page_on_them_can_be_set():
    """As dvc.yaml asks for them: where they start from and what is kept, too."""
    kinds = []
    for block in blocks("teachers.md"):
        for teacher in block["teachers"].values():
            assert teacher["starts_from"] == "recipes/scratch.json"
            Keep.model_validate(teacher["keep"])
            rest = {key: value for key, value in teacher.items() if key not in ("starts_from", "keep")}
            if "revision" in rest["source"]:
                assert rest["source"]["revision"] == "<full commit hash>"
                rest["source"]["revision"] = 40 * "0"
            kinds.append(TeacherParams.model_validate(rest).source.kind)
    assert kinds == ["hub", "fairseq"]


@pytest.mark.parametrize("page", ["ekd", "skill"])
def test_the_students_of_the_pages_on_methods_can_be_set(page):
    seen = []
    for block in blocks(f"methods/{page}.md"):
        if "similarity" in block:
            SimilarityParams.model_validate(block["similarity"])
        for student in block["students"].values():
            seen.append(TypeAdapter(Ensemble).validate_python(student["ensemble"]).kind)
            TypeAdapter(Init).validate_python(student["init"])
            TypeAdapter(Predict).validate_python(student.get("predict", {"kind": "last"}))
    assert seen == {"ekd": ["heads", "average", "concat"], "skill": ["groups"]}[page]


def test_what_the_page_on_extraction_shows_can_be_set():
    seen = []
    for block in blocks("extraction.md"):
        for key, value in block.items():
            seen.append(key)
            if key == "extract":
                ExtractParams.model_validate(value)
            elif key == "keep":
                Keep.model_validate(value)
            else:
                assert key == "means"
                assert [Keep.model_validate(mean["keep"]) for mean in value.values()]
    assert seen == ["extract", *["keep"] * 5, "means"]


def test_the_noisy_student_of_the_documentation_is_one():
    (block,) = blocks("noisy-student.md")
    params = AugmentParams.model_validate(block["augment"])
    assert params.distort is not None
    assert params.hide is not None


def test_the_shape_that_the_page_on_students_shows_is_the_one_it_names():
    (block,) = blocks("student.md")
    with torch.device("meta"):
        assert count_parameters(Encoder(EncoderShape.model_validate(block["shape"]))) == 18_403_120


def test_the_head_that_the_page_on_speaker_verification_shows_is_superbs():
    (block,) = blocks("speaker-verification.md")
    params = SvParams.model_validate(block["probes"]["sv"])
    assert (params.head_width, params.channels, params.pooled_width, params.embedding) == (512, 512, 1500, 512)
    assert (params.scale, params.margin, params.crop_frames) == (30, 0.4, 400)


def test_the_head_that_the_page_on_speech_recognition_shows_is_superbs():
    (block,) = blocks("asr.md")
    params = AsrParams.model_validate(block["probes"]["asr"])
    head = SpeechHead(13, 768, params, 29, torch.Generator())
    linears = 769 * 1024 + 2049 * 29
    lstms = sum(2 * 4 * 1024 * (inputs + 1024 + 2) for inputs in (1024, 2048))  # two directions, four gates, two biases
    assert sum(value.numel() for value in head.parameters()) == 13 + linears + lstms == 42_822_698
    assert params.dropout == 0.2
    assert params.beam is not None
