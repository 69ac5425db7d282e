"""warm: a command in; the same command, with every `decant` it runs started from a process that has torch loaded."""

from typing import Annotated

import typer

CONTEXT = {"ignore_unknown_options": True, "allow_interspersed_args": False}
app = typer.Typer()


def main(
    command: Annotated[list[str], typer.Argument(help="The command and its own options: `decant warm dvc repro`.")],
) -> None:
    """Run a command that runs `decant` many times; each of those starts two seconds sooner. Results are the same."""
    import os
    import signal
    import subprocess
    import tempfile
    from pathlib import Path

    from cache.errors import SettingsError
    from stages._warm import Warm

    with tempfile.TemporaryDirectory(prefix="decant-warm-") as folder, Warm(Path(folder), os.environ) as warm:
        environment = {**os.environ, "PATH": os.pathsep.join([str(warm.folder), os.environ.get("PATH", "")])}
        try:
            running = subprocess.Popen(command, env=environment)
        except FileNotFoundError as error:
            raise SettingsError(f"there is no command '{command[0]}'; check its spelling and PATH") from error
        signal.signal(signal.SIGINT, lambda *_: None)  # from a terminal the command has got it, too
        signal.signal(signal.SIGTERM, lambda *_: running.terminate())
        code = running.wait()
    raise SystemExit(code if code >= 0 else 128 - code)


app.command(context_settings=CONTEXT)(main)

if __name__ == "__main__":
    app()
