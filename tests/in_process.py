"""A command line in, what the `decant` of this process printed out: its whole main, without a start of two seconds."""

import contextlib
import io
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

from stages.__main__ import main


class Done(NamedTuple):
    """The three things that `subprocess.run` is asked for."""

    returncode: int
    stdout: str
    stderr: str


def decant(*arguments: object, cwd: Path = Path()) -> Done:
    """Run `decant` with these arguments in the folder `cwd`.

    Raises:
        DecantError: with `--debug`, where a process would show the trace.
    """
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["decant", *map(str, arguments)]),
        mock.patch("stages.__main__.die_with_parent"),  # it would tie the whole test run to its parent
    ):
        code: object = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
    return Done(code if isinstance(code, int) else int(code is not None), out.getvalue(), err.getvalue())
