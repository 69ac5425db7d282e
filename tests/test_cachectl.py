"""`decant cache`: every command works from a shell, says what it did in lines or JSON, and exits as documented."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cache.publish import read_json
from cache.receipts import make_receipt
from stages.__main__ import STAGES
from stages.cachectl import NAMES
from stages.cachectl import app as cache_app
from tests import in_process
from tests.cache_fixtures import LAYERS, SHARD, build, damage, edit, with_receipt

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "torchaudio", "transformers", "numpy", "zarr", "h5py", "yaml", "sklearn", "matplotlib", "rich")


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "store"))
    return with_receipt(tmp_path / "receipts" / "teachers" / "hubert.json")


def decant(*arguments, cwd=ROOT):
    return in_process.decant("cache", *arguments, cwd=cwd)


def answer(*arguments, code=0, cwd=ROOT):
    done = decant(*arguments, "--json", cwd=cwd)
    assert done.returncode == code, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", ["", *NAMES])
def test_help_imports_nothing_heavy_and_has_a_sentence(command):
    script = (
        "import sys, stages.__main__ as m\n"
        f"sys.argv = ['decant', 'cache', *{command.split()!r}, '--help']\n"
        "try: m.main()\n"
        f"finally: print('HEAVY', [x for x in {HEAVY!r} if x in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Usage: decant cache {command}".rstrip() in done.stdout
    assert "HEAVY []" in done.stdout
    if command:
        assert "--json" in done.stdout
    else:
        for name in NAMES:
            assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in done.stdout.splitlines()), name


def test_its_names_are_its_commands_and_no_stage_is_called_cache():
    assert {c.name for c in cache_app.registered_commands} == set(NAMES)
    assert "cache" not in STAGES


def test_ls_and_info_say_what_a_store_is(place, tmp_path):
    other, _ = build({"model": "other"}, layers=LAYERS[:1])
    edit(other / "journal.jsonl", '"shard": 2', '"shard": 7')
    rows = {row["key"]: row for row in answer("ls")}
    receipt = read_json(tmp_path / "receipts" / "teachers" / "hubert.json")
    want = {"kind": "features", "key": place.name, "model": "hubert abababab", "complete": True, "codec": "float16"}
    want |= {k: receipt[k] for k in ("utterances", "rows", "bytes")} | {"arrays": list(LAYERS), "width": 24}
    assert rows[place.name] == want
    assert rows[other.name]["complete"] is False
    listed = decant("ls").stdout.splitlines()
    assert [("unfinished" in line) for line in listed if other.name in line] == [True]
    assert [("unfinished" in line) for line in listed if place.name in line] == [False]
    about = answer("info", place.name[:6])
    assert about == {**want, "fingerprint": receipt["fingerprint"]}
    assert "ab" * 32 in decant("info", tmp_path / "receipts" / "teachers" / "hubert.json").stdout
    (other / "zarr.json").write_text("{")
    assert [("unreadable" in line) for line in decant("ls").stdout.splitlines() if other.name in line] == [True]


def test_a_key_that_fits_no_store_is_a_wrong_setting(place):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "stages", "cache", "info", "nothing"]  # as a person runs it
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert decant("info", "nothing") == (done.returncode, done.stdout, done.stderr)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("decant cache info: 'nothing' is no store under")
    assert place.name in done.stderr
    assert done.stderr.count("\n") == 1
    done = decant("verify", "--ful")
    assert done.returncode == 2
    assert "(see `decant cache verify --help`)" in done.stderr


def test_damage_is_verified_repaired_and_made_again_from_the_shell(place, tmp_path):
    receipts = tmp_path / "receipts"
    done = decant("verify", "--full", "--receipts", receipts)
    assert done.returncode == 0, done.stderr
    assert "1 stores, 10 shards sound (hashes and checksums)" in done.stdout
    damage("payload", place)
    assert decant("verify", "--receipts", receipts).returncode == 0  # names and sizes alone
    done = decant("verify", "--full", "--receipts", receipts)
    assert done.returncode == 4
    assert f"features/{place.name}: damaged: {SHARD}: chunk 0 is damaged" in done.stdout
    assert done.stderr.startswith("decant cache verify: 1 of 1 stores damaged")
    assert done.stderr.count("\n") == 1
    (finding,) = answer("verify", "--full", code=4)["findings"]
    assert (finding["store"], finding["place"], finding["damage"]) == (f"features/{place.name}", SHARD, True)
    done = decant("repair", place.name, "--receipts", receipts)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        f"dropped {SHARD}",
        "rewritten journal.jsonl",
        "now run: dvc repro -f -s extract@hubert",
    ]
    assert build()[1] == [SHARD]
    assert answer("verify", "--full", "--receipts", receipts) == {
        "stores": 1,
        "shards": 10,
        "full": True,
        "findings": [],
    }
    nothing = {"dropped": [], "rewritten": [], "removed": [], "left": [], "run": None}
    assert answer("repair", place.name) == nothing


def test_a_damaged_receipt_is_an_error_of_verify_and_names_the_file(place, tmp_path):
    receipt = tmp_path / "receipts" / "teachers" / "hubert.json"
    edit(receipt, '"digest": "', '"digest": "0')
    done = decant("verify", "--receipts", tmp_path / "receipts")
    assert done.returncode == 4
    assert f"receipt: {receipt} is damaged" in done.stdout
    assert "1 receipts damaged" in done.stderr


def test_gc_says_first_and_deletes_only_when_told(place, tmp_path):
    other, _ = build({"model": "other"})
    done = decant("gc", tmp_path / "receipts")
    assert done.returncode == 0, done.stderr
    assert f"would delete features/{other.name}" in done.stdout
    assert "--yes deletes" in done.stdout
    assert other.exists()
    (row,) = answer("gc", tmp_path / "receipts", "--yes")
    assert (row["store"], row["deleted"]) == (f"features/{other.name}", True)
    assert not other.exists()
    assert make_receipt(place, LAYERS) == read_json(tmp_path / "receipts" / "teachers" / "hubert.json")
    done = decant("gc", tmp_path / "nowhere", "--yes")
    assert done.returncode == 2
    assert place.exists()


def test_export_and_import_move_a_store(place, tmp_path, monkeypatch):
    out = tmp_path / "store.h5"
    done = decant("export", place.name[:8], "--out", out)
    assert done.returncode == 0, done.stderr
    assert "is there already" in decant("import", out).stderr
    monkeypatch.setenv("DECANT_STORE", str(tmp_path / "elsewhere"))
    assert answer("import", out) == {"store": f"features/{place.name}"}
    again = tmp_path / "elsewhere" / "features" / place.name
    assert make_receipt(again, LAYERS) == make_receipt(place, LAYERS)
    done = decant("import", ROOT / "README.md")
    assert done.returncode == 4
    assert done.stderr.startswith("decant cache import: ")
    assert "is no HDF5 file" in done.stderr


def test_a_receipt_that_names_the_store_is_a_receipt(place, tmp_path):
    receipt = tmp_path / "receipts" / "teachers" / "hubert.json"
    whole = (place / "journal.jsonl").read_bytes()
    (place / "journal.jsonl").unlink()
    assert decant("verify", place.name).returncode == 0  # unfinished, as far as the store itself can tell
    found = answer("verify", receipt, code=4)["findings"]
    assert len(found) == 10
    assert found == answer("verify", "--receipts", tmp_path / "receipts", code=4)["findings"]
    assert found == answer("verify", receipt, "--receipts", tmp_path / "receipts", code=4)["findings"]
    assert found == answer("verify", os.path.relpath(receipt, ROOT), "--receipts", receipt, code=4)["findings"]
    done = answer("repair", receipt)
    assert (done["dropped"], done["rewritten"], done["run"]) == ([], ["journal.jsonl"], None)
    assert sorted((place / "journal.jsonl").read_bytes().splitlines()) == sorted(whole.splitlines())
    assert answer("verify", "--full", receipt)["shards"] == 10
    done = decant("verify", tmp_path / "no.json")
    assert done.returncode == 4
    assert "no.json does not exist" in done.stderr


def test_gc_says_where_a_link_leads_and_deletes_the_link_alone(place, tmp_path):
    other, _ = build({"model": "other"})
    big = other.rename(tmp_path / "big-disk")
    other.symlink_to(big)
    assert f"a link: what is at {big} stays" in decant("gc", tmp_path / "receipts").stdout
    (row,) = answer("gc", tmp_path / "receipts", "--yes")
    assert (row["deleted"], row["bytes"], row["link_to"]) == (True, 0, str(big))
    assert not other.is_symlink()
    assert (big / "journal.jsonl").exists()
