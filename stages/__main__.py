"""The console script `decant`: one command per stage; an error a user can cause is one line and an exit code.

Exit codes: 0 done; 1 a defect of ours; 2 a setting or option; 3 input data; 4 a store or model on disk; 5 the machine
(disk, permission, lock); 75 stopped on request with its state saved; 130 interrupted from the keyboard (distillation
saves its state first and gives 75).
"""

import os
import resource
import sys
from contextlib import suppress
from importlib import import_module
from io import TextIOWrapper
from typing import Any

import typer

from cache.errors import DecantError
from cache.process import die_with_parent
from stages import cachectl

STAGES = {  # in the order of the pipeline, as `decant --help` lists them
    "prepare": "corpora -> manifest and waveforms",
    "teacher": "a pinned teacher, fetched or pretrained here",
    "extract": "a model's layers -> a store and its receipt",
    "similarity": "how alike the layers of a teacher are",
    "targets": "what one student reads of the stores",
    "distill": "one student, from the stores alone",
    "probe": "a frozen model's score on one task",
    "finetune": "a student or teacher and two heads, trained on keywords and speakers together",
    "profile": "what models cost: parameters, multiply-accumulates, seconds on this CPU",
    "report": "everything on one page",
    "lhotse": "the manifest and its waveforms, for lhotse",
    "warm": "a command that runs many of these, each started sooner",
}

OPEN_FILES = 8192  # where the system lets us: stores have thousands of shards, and the usual limit is 1024 files
INTERRUPTED = 130  # from the keyboard

# What a person typed wrong; typer exports only subclasses of it.
UsageError: Any = typer.BadParameter.__base__

# No rich markup: it costs a quarter of a second at every --help.
app = typer.Typer(
    name="decant",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help=(
        "Distil large self-supervised speech models into small ones from cached teacher features. "
        "Each command is one stage; `dvc repro` runs those whose inputs changed. "
        "`--debug`, anywhere, shows the full trace of an error."
    ),
)
for name, sentence in STAGES.items():
    stage = import_module(f"stages.{name}")
    app.command(name, short_help=sentence, context_settings=getattr(stage, "CONTEXT", None))(stage.main)
app.add_typer(cachectl.app, name="cache", short_help="list, check, repair, clean and move the stores")


def main() -> None:
    """Run one stage; a `DecantError` becomes one line on stderr and its exit code."""
    debug = "--debug" in sys.argv or os.environ.get("DECANT_DEBUG") == "1"
    arguments = [a for a in sys.argv[1:] if a != "--debug" or sys.argv[1] == "warm"]  # its command may have one, too
    depth = 2 if arguments[:1] == ["cache"] else 1
    stage = " ".join(["decant", *[a for a in arguments[:depth] if a == "cache" or a in STAGES or a in cachectl.NAMES]])
    die_with_parent()
    allow_files()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal that knows no "±" gets a "?", and no stage ends for it
            stream.reconfigure(errors="replace")
    try:
        code = app(args=arguments, prog_name="decant", standalone_mode=False)
        if code == INTERRUPTED:  # typer makes a Ctrl-C of it without a word
            raise KeyboardInterrupt
        sys.exit(code)
    except DecantError as error:
        if debug:
            raise
        print(f"{stage}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except UsageError as error:
        print(f"{stage}: {error.format_message()} (see `{stage} --help`)", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        print(f"{stage}: interrupted; the same command goes on where it stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:  # the reader of our output left: `decant ... | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  # kept open for the interpreter's last flush
        sys.exit(141)


def allow_files() -> None:
    """Let this process and those it starts have `OPEN_FILES` files open, or as many as they may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if resource.RLIM_INFINITY != soft < wanted:
        with suppress(OSError, ValueError):  # a sandbox, or macOS; then the stores make do with what there is
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    main()
