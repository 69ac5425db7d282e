"""Models in, as they are given on the command line or in the params file; their folders and files out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def model_paths(given: Sequence[Path], of: str, params: Path) -> list[Path]:
    """The paths that were given; or, where `of` is a key of the params file, those below the one that was given.

    Raises:
        SettingsError: the key has no list of names.
    """
    from stages._params import read_params

    if not of:
        return list(given)
    names: list[str] = read_params(of, list[str], params)
    return [folder / name for folder in given for name in names]


def named_models(given: Sequence[str], of: str, params: Path) -> dict[str, Path]:
    """NAME=PATH as they were given, and after them what stands below the key `of`; a later path of a name counts.

    What stands below the key and is not made yet is left out, and named: `make demo` makes some of the models.

    Raises:
        SettingsError: no model at all, or one without a name or a path.
    """
    from cache.errors import SettingsError
    from stages._params import read_params

    paths = {}
    for pair in given:
        name, equals, path = pair.partition("=")
        if not (name and equals and path):
            raise SettingsError(f"--models is '{pair}'; write it NAME=PATH, as in --models distil=models/distil")
        paths[name] = Path(path)
    if of:
        below: dict[str, dict[str, Any]] = read_params(of, dict[str, dict[str, Any]], params)
        for name, settings in below.items():
            if "path" not in settings:
                raise SettingsError(f"{params}: {of}.{name} has no path; write {{path: FOLDER}}")
            if Path(settings["path"]).exists():
                paths[name] = Path(settings["path"])
            else:
                print(f"{name}: {settings['path']} is not there yet; left out")
    if not paths:
        raise SettingsError("there is nothing to measure; give --models NAME=PATH, or --of models")
    return paths
