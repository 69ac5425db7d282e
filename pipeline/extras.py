"""The name of a module that an extra brings in, the module out."""

from importlib import import_module
from typing import Any

from cache.errors import SettingsError


def from_extra(module: str, extra: str) -> Any:
    """A module of an extra, imported only when somebody asks for what needs it.

    Raises:
        SettingsError: the extra is not installed.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"{error.name} is not installed; install the extra {extra}: `uv pip install --editable '.[{extra}]'`"
        ) from None
