"""The command line: light to start, and every error a user can cause is one line with an exit code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cache.errors import SettingsError
from stages.__main__ import STAGES
from tests.in_process import decant

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "torchaudio", "transformers", "numpy", "zarr", "yaml", "sklearn", "matplotlib", "rich")


def process(*arguments, cwd=ROOT, **environment):
    """`decant` as a person runs it."""
    command = [sys.executable, "-m", "stages", *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("arguments", [(), *((stage,) for stage in STAGES)], ids=lambda a: " ".join(a) or "decant")
def test_help_imports_nothing_heavy(arguments):
    """What costs time at every --help is imports; `benchmarks/bench_help.py` has the seconds."""
    script = (
        "import sys, stages.__main__ as m\n"
        f"sys.argv = ['decant', *{list(arguments)!r}, '--help']\n"
        "try: m.main()\n"
        f"finally: print('HEAVY', [x for x in {HEAVY!r} if x in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage: decant" in done.stdout
    assert "HEAVY []" in done.stdout


def test_help_lists_every_stage_with_a_sentence():
    listed = process("--help").stdout
    for stage in STAGES:
        assert any(line.split()[:1] == [stage] and len(line.split()) > 3 for line in listed.splitlines()), stage


def paths(tmp_path, **changes):
    options = {
        "--model": ROOT / "recipes" / "logmel.json",
        "--manifest": tmp_path / "manifest.jsonl",
        "--waves": tmp_path / "waves.json",
        "--keep": "keep",
        "--out": tmp_path / "out.json",
        "--params": tmp_path / "params.yaml",
        **changes,
    }
    return [str(part) for option in options.items() for part in option]


EXTRACT = (
    "{version: 1, codec: float16, chunk_frames: 64, shard_frames: 8192, batch_seconds: 30, long: {kind: fail, max_sec: 60}, "
    "calibration: {seconds: 60, seed: 0}}"
)
KEEP = "{layers: all, select: all}"


@pytest.mark.parametrize(
    ("params", "code", "message"),
    [
        (None, 2, "params.yaml does not exist; run from the project's root or pass --params"),
        ("extract: [", 2, "is not valid YAML"),
        ("extrakt: {}", 2, "extract is not set: the top level has extrakt (did you mean extrakt?)"),
        (f"extract: {EXTRACT[:-1]}, codecs: 1}}", 2, "extract.codecs is not a setting; known are version, codec"),
        ("extract: {version: 1}", 2, "extract.codec is missing; settings have no defaults, write it out (and 5 more)"),
        (
            f"extract: {EXTRACT.replace('float16', 'float8')}",
            2,
            "extract.codec is 'float8': input should be 'float32', 'float16', 'bfloat16'",
        ),
        (f"extract: {EXTRACT}\nkeep: {{layers: [one], select: all}}", 2, "keep.layers"),
        (f"extract: {EXTRACT}\nkeep: {KEEP}", 3, "manifest.jsonl does not exist; write it with `decant prepare`"),
    ],
)
def test_a_wrong_setting_is_one_line_with_key_value_and_remedy(tmp_path, params, code, message):
    if params is not None:
        (tmp_path / "params.yaml").write_text(params)
    done = decant("extract", "x", *paths(tmp_path))
    assert done.returncode == code
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("decant extract: ")
    assert message in done.stderr


def test_a_wrong_option_is_one_line_too(tmp_path):
    for arguments, message in [
        (["extract", "x", "--modell", "y"], "No such option: --modell"),
        (["extract"], "Missing"),
        (["extrakt"], "No such command 'extrakt'"),
    ]:
        done = decant(*arguments)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert message in done.stderr
        assert "--help" in done.stderr


def test_debug_shows_the_trace(tmp_path):
    arguments = ["extract", "x", *paths(tmp_path)]
    quiet, loud = process(*arguments), process(*arguments, DECANT_DEBUG="1")
    assert decant(*arguments) == (quiet.returncode, quiet.stdout, quiet.stderr)  # as the other tests here take it
    assert (quiet.returncode, loud.returncode) == (2, 1)
    assert "Traceback" not in quiet.stderr
    assert "Traceback" in loud.stderr
    assert "SettingsError" in loud.stderr
    with pytest.raises(SettingsError):
        decant("extract", "--debug", *arguments[1:])


def test_a_place_that_is_no_model_and_a_device_that_is_not_there_are_named(tmp_path, tiny_corpus):
    (tmp_path / "params.yaml").write_text(f"extract: {EXTRACT}\nkeep: {KEEP}")
    given = {"--manifest": tiny_corpus.manifest_path, "--waves": tiny_corpus.waves_path}
    done = decant("extract", "x", *paths(tmp_path, **given, **{"--model": tmp_path}))
    assert done.returncode == 4
    assert "is no model: it has neither teacher.json nor shape.json" in done.stderr
    done = decant("extract", "x", *paths(tmp_path, **given), "--device", "cuda:9")
    assert done.returncode == 2
    assert "--device is 'cuda:9'" in done.stderr


def test_the_packages_come_from_this_repository():
    import cache
    import pipeline
    import stages

    for package in (cache, pipeline, stages):
        assert Path(package.__file__).parent.parent == ROOT


def test_a_terminal_that_lacks_a_character_ends_no_stage():
    """`decant report` prints the README's table, with its narrow spaces and plus-minus signs."""
    code = "import sys; from stages import __main__ as m; sys.argv = ['decant']; m.app = lambda **_: print('1 ± 2'); m.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout) == (0, b"1 ? 2\n")


def test_a_ctrl_c_is_answered_with_one_line_and_its_exit_code(tmp_path):
    (tmp_path / "params.yaml").write_text(f"extract: {EXTRACT}\nkeep: {KEEP}")
    script = (
        "import os, signal, sys, time, cache.manifest, stages.__main__ as m\n"
        # it may be another thread that the signal reaches: then this one hears of it a moment later
        "cache.manifest.read_manifest = lambda path: (os.kill(os.getpid(), signal.SIGINT), time.sleep(30))\n"
        f"sys.argv = ['decant', 'extract', 'x', *{paths(tmp_path)!r}]\n"
        "m.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "decant extract: interrupted; the same command goes on where it stopped\n"
