"""`decant warm`: the same commands from a process that has torch loaded, with the same streams, codes and signals."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from stages._warm import Warm

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def warm(tmp_path_factory):
    with Warm(tmp_path_factory.mktemp("warm"), ENVIRONMENT) as warm:
        yield warm


@pytest.fixture
def blocked(tmp_path):
    """Arguments of a command that waits for its settings until somebody writes them."""
    os.mkfifo(tmp_path / "params.yaml")
    return ["targets", "a", "--receipts", "r", "--init", "i", "--out", "o", "--params", str(tmp_path / "params.yaml")]


@pytest.fixture
def start(warm):
    """Start a command; whatever a test leaves running ends with it."""
    started = []

    def start(arguments, by=warm, **others):
        command = [str(by.folder / "decant"), *arguments]
        started.append(subprocess.Popen(command, env={**ENVIRONMENT, **others}, text=True, stdout=-1, stderr=-1))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()
    until(lambda: warm._process.poll() is not None or not forks(warm))


def forks(warm):
    return psutil.Process(warm._process.pid).children(recursive=True)


@contextmanager
def reading(fifo):
    """While a command reads from a FIFO that says nothing."""
    handles = []

    def opened():
        with suppress(OSError):  # nobody reads
            handles.append(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        return handles

    until(opened)
    time.sleep(0.2)  # from opening it to reading
    try:
        yield
    finally:
        os.close(handles[0])


def until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("arguments", [["--help"], ["targets", "a"], ["cache", "verify", "nowhere.json"]])
def test_a_warm_command_says_what_the_cold_one_says(warm, arguments, tmp_path):
    cold = subprocess.run(
        [sys.executable, "-m", "stages", *arguments],
        cwd=tmp_path,
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        check=False,
    )
    command = [str(warm.folder / "decant"), *arguments]
    run = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, text=True, capture_output=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (cold.returncode, cold.stdout, cold.stderr)
    assert cold.returncode == 0 or cold.stderr


def test_a_fork_has_torch_and_no_transformers(warm, start, blocked):
    start(blocked)
    with reading(blocked[-1]):
        running = forks(warm)  # the command, and the one that waits for it
        loaded = {Path(mapped.path).name for fork in running for mapped in fork.memory_maps()}
    assert len(running) == 2
    assert "libtorch_cpu.so" in loaded
    assert not any("tokenizers" in name for name in loaded)  # the native half of transformers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_command_ends_the_fork(warm, start, blocked, number):
    process = start(blocked)
    with reading(blocked[-1]):  # before that it imports, where Python may lose a KeyboardInterrupt
        process.send_signal(number)
        process.communicate(timeout=20)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[number]
    until(lambda: not forks(warm))


def test_a_command_whose_libraries_would_load_otherwise_runs_cold(warm, start, blocked):
    process = start(blocked, OMP_NUM_THREADS="2")
    until(lambda: "stages" in psutil.Process(process.pid).cmdline())  # it became Python itself
    assert not forks(warm)


def test_a_server_ends_beside_a_command_that_goes_on(tmp_path, start, blocked):
    with Warm(tmp_path / "w", ENVIRONMENT) as other:
        process = start(blocked, by=other)
        until(lambda: len(forks(other)) == 2)
    assert process.poll() is None


def test_without_the_server_commands_run_cold(tmp_path, start):
    with Warm(tmp_path / "w", ENVIRONMENT) as gone:
        pass
    process = start(["--help"], by=gone)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "distill" in said


def test_the_command_of_decant_warm_finds_the_warm_one_and_gives_its_code(tmp_path):
    script = 'decant --help > help.txt; case "$(command -v decant)" in *decant-warm-*) exit 7;; esac'
    run = subprocess.run(
        [sys.executable, "-m", "stages", "warm", "sh", "-c", script], cwd=tmp_path, env=ENVIRONMENT, check=False
    )
    assert run.returncode == 7
    assert "distill" in (tmp_path / "help.txt").read_text()


def test_a_command_that_does_not_exist_is_named():
    run = subprocess.run(
        [sys.executable, "-m", "stages", "warm", "dcv", "repro"],
        env=ENVIRONMENT,
        text=True,
        capture_output=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr == "decant warm: there is no command 'dcv'; check its spelling and PATH\n"
