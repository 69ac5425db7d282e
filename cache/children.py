"""A function in, a child process that runs it out: it talks through a pipe, dies with its parent, and its errors arrive.

The children of `multiprocessing` import the program that started them once more (all of typer and torch, or a script
that was not written for it) and need another process to clean up after them. These start as a bare interpreter and
import what their function needs. They are told nothing by signals: the pipe's end is their end.
"""

import ctypes
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, NoReturn

from cache.errors import DecantError, ResourceError
from cache.process import PR_SET_PDEATHSIG

_GONE = (EOFError, BrokenPipeError, ConnectionResetError)
# What a terminal, a scheduler or DVC sends to a whole group of processes: the parent decides what it means.
_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}


class Failure(NamedTuple):
    """How a child says what went wrong in it."""

    kind: type[DecantError] | None
    """Class of an error that a user can cause; None for a defect."""
    message: str
    trace: str


class ChildTraceback(Exception):
    """Where in the child it happened, as text: the cause of what the parent raises."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


class Line:
    """A child's end of the pipe. When the parent is gone, or has closed its end, the child ends without a word."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def recv(self) -> Any:
        """What the parent sent next."""
        try:
            return self._connection.recv()
        except _GONE:
            raise SystemExit from None

    def send(self, reply: Any, limit: int | None = None) -> None:
        """Answer the parent, in at most `limit` bytes: a pipe that is full of answers would make both wait."""
        data = pickle.dumps(reply)
        if limit is not None and len(data) > limit:
            raise ValueError(f"an answer of {len(data)} bytes is larger than {limit}; put arrays into the slot")
        try:
            self._connection.send_bytes(data)
        except _GONE:
            raise SystemExit from None


class Child:
    """A process that runs `work(line, *arguments)`.

    Args:
        work: a function of an importable module; it answers through its `Line`.
        arguments: picklable, or open file handles that are also in `handles`.
        handles: open files that the child inherits under the same numbers.
        what: what it is, for messages ("reader process").
    """

    def __init__(self, work: Callable[..., None], arguments: Sequence[Any], handles: Sequence[int], what: str) -> None:
        self.what = what
        order = pickle.dumps((work, tuple(arguments)))  # what cannot be sent is found before anything starts
        self._pipe, other = Pipe()
        number = other.fileno()
        # The parent's path, because scripts, editable installs and tests all find their modules in other ways.
        code = f"import sys; sys.path[:] = {sys.path!r}; from cache.children import run; run({number}, {os.getpid()})"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=[number, *handles],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_ONE_THREAD},
            )
        except OSError as error:
            raise ResourceError(f"a {what} could not be started: {error.strerror}; use fewer of them") from error
        finally:
            other.close()
        with suppress(BrokenPipeError, ConnectionResetError):
            self._pipe.send_bytes(order)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def fileno(self) -> int:
        """Handle of the pipe: readable when an answer has come or the child has died."""
        return self._pipe.fileno()

    def send(self, request: Any) -> None:
        """Give the child something to do; that it died is for `recv` to say, after what it answered before."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self._pipe.send(request)

    def has_answer(self) -> bool:
        """Whether `recv` would return, or raise, at once."""
        return self._pipe.poll()

    def recv(self) -> Any:
        """Wait for the next answer.

        Raises:
            DecantError: the child met one; same class, same message.
            ResourceError: the child was killed.
            RuntimeError: any other error in the child, whose traceback is the cause.
        """
        try:
            reply = self._pipe.recv()
        except _GONE:
            self._explain_death()
        if isinstance(reply, Failure):
            error = (
                RuntimeError(f"in a {self.what}: {reply.message}") if reply.kind is None else reply.kind(reply.message)
            )
            raise error from ChildTraceback(reply.trace)
        return reply

    def _explain_death(self) -> NoReturn:
        code = self._process.wait()
        if code >= 0:
            raise RuntimeError(
                f"a {self.what} (process {self.pid}) ended with exit code {code} before its work was done"
            )
        name = signal.Signals(-code).name
        hint = "; the system does so when memory runs out: use fewer or smaller buffers" if name == "SIGKILL" else ""
        raise ResourceError(f"a {self.what} (process {self.pid}) was killed by {name}{hint}")

    def hang_up(self) -> None:
        """Close the pipe: the child finishes what it is doing and ends."""
        self._pipe.close()

    def kill(self) -> None:
        """End it at once, whatever it is doing."""
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def wait(self) -> int:
        """Wait for its end; gives its exit code."""
        return self._process.wait()


def run(handle: int, parent: int) -> None:
    """What a child's interpreter executes."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    _die_with(parent)
    line = Line(Connection(handle))
    sys.excepthook = lambda kind, error, trace: _tell(line, error)
    work, arguments = line.recv()
    work(line, *arguments)


def _tell(line: Line, error: BaseException) -> None:
    kind = type(error) if isinstance(error, DecantError) else None
    message = str(error) if kind else "".join(traceback.format_exception_only(error)).strip()
    with suppress(SystemExit):
        line.send(Failure(kind, message, "".join(traceback.format_exception(error))))


def _die_with(parent: int) -> None:
    """End when the parent ends, even in the middle of something.

    The pipe's end alone could come late: a sibling that the parent forked may hold the other side. Linux sends the
    signal when the *thread* ends that started the child, which is why the handler looks whether the parent is there.
    """

    def orphaned(*_: object) -> None:
        if os.getppid() != parent:
            os._exit(1)

    signal.signal(signal.SIGHUP, orphaned)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
    orphaned()  # it may have died before the call
