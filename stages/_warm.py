"""Commands in, the same commands run by forks of one process that has imported torch: two seconds less for each.

`Warm(folder)` puts a `decant` into `folder` that, found first on PATH, hands its arguments, folder, environment and streams
to that process and ends as the fork ends. The process imports no teacher and no transformers: commands that need them
import them themselves. It computes nothing, so a fork finds torch as a fresh import leaves it, and no thread is lost.

What is only read when a library is loaded (OMP_NUM_THREADS, LD_LIBRARY_PATH ...) must be the same in the server and in the
caller; where it is not, or the server has gone, the command runs cold, in a process of its own. A fork lives no longer
than the command it stands for: signals are passed on, and a caller that is killed takes it along.
"""

import atexit
import gc
import importlib
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from cache.errors import ResourceError

IMPORTS = (
    "stages.__main__",
    "pipeline.prepare",
    "pipeline.extract",
    "pipeline.student.upstream",
    "pipeline.distill.train",
    "pipeline.tasks.run",
    "pipeline.report.page",
)
AT_LOAD = ("OMP_", "KMP_", "MKL_", "GOMP_", "OPENBLAS_", "LD_", "MALLOC_", "PYTHON", "TORCH_")
"""Variables whose value counts when a library is loaded."""
PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
NAME = "s"  # beside the command, and reached from its folder: a socket's path may have a hundred characters
FAILED = 70  # the server went away

CLIENT = """
import json, os, signal, socket, sys
here, given = os.getcwd(), dict(os.environ)
chosen = {{name: value for name, value in given.items() if name.startswith({at_load!r})}}
line = socket.socket(socket.AF_UNIX)
try:
    os.chdir({folder!r})
    if chosen == {loaded!r}:
        line.connect({name!r})
except OSError:
    chosen = None
if chosen != {loaded!r}:
    os.chdir(here)
    os.execv({python!r}, [{python!r}, "-m", "stages", *sys.argv[1:]])
order = json.dumps([sys.argv[1:], here, given]).encode()
socket.send_fds(line, [len(order).to_bytes(4, "big")], [0, 1, 2])
line.sendall(order)
for number in {passed_on!r}:
    signal.signal(number, lambda number, frame: line.send(bytes([number])))
answer = line.recv(1)
sys.exit(answer[0] if answer else {failed})
"""


class Warm:
    """A warm `decant` in `folder`, from `with` to its end."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self._environment = folder, dict(environment)
        folder.mkdir(exist_ok=True)
        client = CLIENT.format(
            folder=str(folder),
            name=NAME,
            python=sys.executable,
            at_load=AT_LOAD,
            loaded={name: value for name, value in environment.items() if name.startswith(AT_LOAD)},
            passed_on=[int(number) for number in PASSED_ON],
            failed=FAILED,
        )
        (folder / "client.py").write_text(client, encoding="utf-8")
        command = shlex.join([sys.executable, "-SEs", str(folder / "client.py")])
        (folder / "decant").write_text(f'#!/bin/sh\nexec {command} "$@"\n', encoding="utf-8")
        (folder / "decant").chmod(0o755)

    def __enter__(self) -> "Warm":
        self._process = subprocess.Popen(
            [sys.executable, "-m", "stages._warm", str(self.folder)],
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C reaches the callers, who pass it on
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != b"warm\n":
            raise ResourceError(
                f"the process that keeps torch loaded ended with {self._process.wait()}; run the command without `decant warm`"
            )
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        # Not read to their ends: a fork that lives on holds them, too.
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()


def serve(folder: Path) -> None:
    """Run what comes, each in a fork, until whoever started this hangs up."""
    for name in IMPORTS:
        importlib.import_module(name)
    os.chdir(folder)
    line = socket.socket(socket.AF_UNIX)
    line.bind(NAME)
    line.listen()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that wait for a fork
    gc.freeze()
    print("warm", flush=True)
    while True:
        ready, _, _ = select.select([line, sys.stdin], [], [])
        if line not in ready:
            return
        caller, _ = line.accept()
        head, streams, _, _ = socket.recv_fds(caller, 4, 3)
        order, more = b"", head
        while more and len(order) < int.from_bytes(head, "big"):
            more = caller.recv(1 << 16)
            order += more
        if more and os.fork() == 0:  # else it was killed while it asked
            line.close()
            attend(caller, streams, *json.loads(order))
        caller.close()
        for handle in streams:
            os.close(handle)


def attend(
    caller: socket.socket, streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]
) -> None:
    """Fork once more and stand between the command and its caller; never returns."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        caller.close()
        run(streams, arguments, folder, environment)
    for handle in streams:
        os.close(handle)
    ended = os.pidfd_open(pid)
    while True:
        ready, _, _ = select.select([ended, caller.fileno()], [], [])
        if ended in ready:
            break
        asked = caller.recv(1)
        os.kill(pid, asked[0] if asked else signal.SIGKILL)  # nothing: the caller was killed
        if not asked:
            os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    caller.send(bytes([code if code >= 0 else 128 - code]))
    os._exit(0)


def run(streams: list[int], arguments: list[str], folder: str, environment: dict[str, str]) -> None:
    """`decant` with these arguments, in the place of the caller; never returns."""
    for number, handle in enumerate(streams):
        os.dup2(handle, number)
        os.close(handle)
    # Made anew: a stream remembers from its making whether it can seek, and these now lead elsewhere.
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
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
    serve(Path(sys.argv[1]))
