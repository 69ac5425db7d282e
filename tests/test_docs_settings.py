"""The settings that the documentation shows are settings: each block of YAML is read as what it says it is."""

import re
from pathlib import Path

import pytest
import yaml
from pydantic import TypeAdapter

from pipeline.corpora.sources import Source
from pipeline.extraction.settings import ExtractParams, Keep

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
    assert seen == ["extract", *["keep"] * 4, "means"]
