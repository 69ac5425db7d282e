"""The README: its commands exist, its links lead somewhere, and its table is the one a run writes."""

import re
from pathlib import Path

import pytest

from pipeline.report.tables import BEGIN, END
from stages import cachectl
from stages.__main__ import STAGES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_command_it_names_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", README, re.M)) <= targets
    assert set(re.findall(r"\bdecant ([a-z]+)", README)) <= {*STAGES, "cache"}
    assert set(re.findall(r"\bdecant cache ([a-z]+)", README)) <= {c.name for c in cachectl.app.registered_commands}


@pytest.mark.parametrize(
    "page", ["README.md", *[str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").rglob("*.md"))]]
)
def test_every_local_link_leads_to_a_file(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        if not link.startswith("http"):
            assert ((ROOT / page).parent / link).exists(), link
    for path in re.findall(r"`((?:docs|recipes|cache|pipeline|stages|tests|benchmarks)/[\w./-]+)`", text):
        assert (ROOT / path).exists(), path


def test_its_table_shows_what_the_demo_promises():
    """Written by `make readme`; the student lies above log-mel on keywords, and near its teacher."""
    table = README.split(BEGIN)[1].split(END)[0]
    cells = [[cell.strip() for cell in line.split("|")] for line in table.splitlines()]
    column = next(n for n, head in enumerate(cells[1]) if head.startswith(("KS", "Keyword spotting")))
    rows = {row[1].split()[0]: row for row in cells if len(row) > column}
    keywords = {
        name: float(re.sub(r"[*]", "", rows[name][column]).split()[0]) for name in ("hubert", "distil", "logmel")
    }
    assert keywords["hubert"] >= keywords["logmel"] + 10
    assert keywords["distil"] >= 0.95 * keywords["hubert"]
    assert keywords["distil"] > keywords["logmel"] + 10
