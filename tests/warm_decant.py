"""Commands in, the same commands run by forks of one process that has imported everything: seconds less for each.

A DVC table runs fifty stages, and most of their time is the import of torch and transformers. `Warm(folder)` puts a
`decant` into `folder` that, found first on PATH, hands its arguments, folder, environment and streams to that process
and ends with the exit code of the fork. What the console script itself does is tested as a process in test_cli.py.
"""

import atexit
import gc
import importlib
import json
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
IMPORTS = (
    "stages.__main__",
    "pipeline.prepare",
    "pipeline.teachers.sources",
    "pipeline.teachers.forward",
    "pipeline.extract",
    "pipeline.student.upstream",
    "pipeline.distill.train",
    "pipeline.tasks.probe",
    "pipeline.report.page",
)
NAME = "s"  # beside the command, and reached from its folder: a socket's path may have a hundred characters
CLIENT = """
import json, os, socket, sys
here = os.getcwd()
os.chdir({folder!r})
line = socket.socket(socket.AF_UNIX)
line.connect({name!r})
order = json.dumps([sys.argv[1:], here, dict(os.environ)]).encode()
socket.send_fds(line, [len(order).to_bytes(4, "big")], [0, 1, 2])
line.sendall(order)
answer = line.recv(1)
sys.exit(answer[0] if answer else 70)
"""


class Warm:
    """A warm `decant` in `folder`, from `with` to its end. Each has a hash salt of its own."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        (folder / "client.py").write_text(CLIENT.format(folder=str(folder), name=NAME))
        command = shlex.join([sys.executable, "-SEs", str(folder / "client.py")])
        (folder / "decant").write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / "decant").chmod(0o755)

    def __enter__(self) -> "Warm":
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": "random", "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"warm\n"
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()


def serve() -> None:
    """Run what comes, each in a fork."""
    line = socket.socket(socket.AF_UNIX)
    line.bind(NAME)
    line.listen()
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()
    print("warm", flush=True)
    while True:
        caller, _ = line.accept()
        head, streams, _, _ = socket.recv_fds(caller, 4, 3)
        order = b""
        while len(order) < int.from_bytes(head, "big"):
            order += caller.recv(1 << 16)
        if os.fork() == 0:
            line.close()
            run(caller, streams, *json.loads(order))
        caller.close()
        for handle in streams:
            os.close(handle)


def run(
    caller: socket.socket, streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]
) -> None:
    """`decant` with these arguments, in the place of the caller; never returns."""
    pid = os.fork()
    if pid:  # waits for it, so that the server need not
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        caller.send(bytes([code if code >= 0 else 128 - code]))
        os._exit(0)
    caller.close()
    for number, handle in enumerate(streams):
        os.dup2(handle, number)
    # Made anew: a stream remembers from its making whether it can seek, and these now lead elsewhere.
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["decant", *arguments]
    code = 0
    try:
        importlib.import_module("stages.__main__").main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # tearing down torch takes two seconds


if __name__ == "__main__":
    serve()
