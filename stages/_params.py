"""A key of params.yaml and a settings model in, checked settings out; a failure is one line with key, value and choices."""

import difflib
import functools
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_params(key: str, model: type[T] | Any, params: Path = Path("params.yaml")) -> T:
    """Read the section `key` ("students.distil") of a params file as `model`.

    Raises:
        SettingsError: no such file, key or setting, or a value of the wrong kind.
    """
    from pydantic import TypeAdapter, ValidationError

    from cache.errors import SettingsError

    section = lookup(key, params)
    try:
        return typing.cast(T, TypeAdapter(model).validate_python(section))
    except ValidationError as error:
        raise SettingsError(f"{params}: {_explain(key, model, section, error)}") from None


def lookup(key: str, params: Path) -> Any:
    """The raw value at a dotted key.

    Raises:
        SettingsError: the file or a part of the key is missing; the nearest name is offered.
    """
    from ruamel.yaml import YAMLError

    from cache.errors import SettingsError

    try:
        value = _parsed(params.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{params} does not exist; run from the project's root or pass --params") from None
    except YAMLError as error:
        raise SettingsError(f"{params} is not valid YAML: {' '.join(str(error).split())}") from None
    walked: list[str] = []
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            choices = list(map(str, value)) if isinstance(value, dict) else []
            where = ".".join(walked) or "the top level"
            raise SettingsError(
                f"{params}: {key} is not set: {where} has {', '.join(choices) or 'no keys'}{_nearest(part, choices)}"
            )
        walked.append(part)
        value = value[part]
    return value


@functools.lru_cache(maxsize=4)
def _parsed(text: str) -> Any:
    """The text is parsed once, however many keys are asked for."""
    from ruamel.yaml import YAML

    # YAML 1.2, as DVC reads and writes it: `dvc exp run -S` takes the quotes off "yes", which 1.1 then calls a boolean
    return YAML(typ="safe", pure=True).load(text)


def _nearest(name: str, choices: list[str]) -> str:
    near = difflib.get_close_matches(name, choices, 1)
    return f" (did you mean {near[0]}?)" if near else ""


def _explain(key: str, model: Any, section: Any, error: Any) -> str:
    """The first failure as one line; how many more there are."""
    errors = error.errors()
    # a misspelt key is two failures, one unknown and one missing: the unknown one tells more
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    location = [str(part) for part in first["loc"]]
    full = ".".join([key, *_as_typed(first["loc"], section)])
    if first["type"] == "extra_forbidden":
        known = _fields(model, location[:-1])
        text = f"{full} is not a setting; known are {', '.join(known)}{_nearest(location[-1], known)}"
    elif first["type"] == "missing":
        text = f"{full} is missing; settings have no defaults, write it out"
    else:
        # settings that contradict each other: the message names them, and nobody reads a whole section in one line
        given = "" if isinstance(first["input"], dict) else f" is {first['input']!r}"
        text = f"{full}{given}: {first['msg'][0].lower() + first['msg'][1:]}"
    more = error.error_count() - 1
    return " ".join(text.split()) + (f" (and {more} more)" if more else "")


def _as_typed(location: tuple[Any, ...], section: Any) -> list[str]:
    """The path of a failure in the file: pydantic's own, without the tags of unions it passed."""
    path, value = [], section
    for number, part in enumerate(location, 1):
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]
        elif number < len(location):
            continue  # a tag: nobody typed it here
        path.append(str(part))
    return path


def _fields(model: Any, location: list[str]) -> list[str]:
    """Names of the settings at a place inside a model, through unions, mappings and lists."""
    from pydantic import BaseModel

    if isinstance(model, type) and issubclass(model, BaseModel):
        if not location:
            return list(model.model_fields)
        field = model.model_fields.get(location[0])
        return (
            _fields(field.annotation, location[1:]) if field else _fields(model, location[1:])
        )  # a union's tag is in the path
    options = [_fields(option, rest) for option in typing.get_args(model) for rest in (location, location[1:])]
    return max(options, key=len, default=[])
