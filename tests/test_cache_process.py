"""No orphan writers: a stage dies with the DVC that started it, and one started by hand outlives its shell."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cache.process import LAUNCHERS

CHILD = (
    "from cache.process import die_with_parent; import time; die_with_parent(); print('up', flush=True); time.sleep(30)"
)
PARENT = (
    "import subprocess, sys, time\n"
    f"child = subprocess.Popen([sys.executable, '-c', {CHILD!r}], stdout=subprocess.PIPE, text=True)\n"
    "child.stdout.readline(); print(child.pid, flush=True); time.sleep(30)"
)


def is_running(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # dead, and nobody has asked for its exit code


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
@pytest.mark.parametrize(("launcher", "survives"), [("DVC_ROOT", False), ("TORCHELASTIC_RUN_ID", False), (None, True)])
def test_a_killed_parent_takes_its_stage_along_only_under_dvc_and_torchrun(launcher, survives):
    environment = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
    if launcher is not None:
        environment[launcher] = "."
    parent = subprocess.Popen([sys.executable, "-c", PARENT], env=environment, stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + (1 if survives else 10)
    while is_running(child) and time.monotonic() < deadline:
        time.sleep(0.02)
    try:
        assert is_running(child) is survives
    finally:
        if is_running(child):
            os.kill(child, signal.SIGKILL)
