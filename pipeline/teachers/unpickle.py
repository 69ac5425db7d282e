"""Pickles of other people's libraries: a .pt or .bin file in, its tensors and plain values out, with nothing of it run.

torch's restricted unpickler makes tensors and containers only. The checkpoints of fairseq hold a few objects more, settings
and dictionaries: each class that is known to occur is named here and replaced by one that keeps its state and does nothing.
"""

import pickle
import struct
from pathlib import Path
from typing import Any

import torch
from torch.serialization import safe_globals

from cache.errors import DataError, StoreError


class Inert:
    """Stands for an object of a library that is not here: it keeps what it was made from and has no behaviour."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> "Inert":
        """Not `__init__`, which the unpickler leaves out for some objects."""
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state


KNOWN = [  # classes found in checkpoints of fairseq and of what was built on it, by their full names
    "argparse.Namespace",
    "collections.defaultdict",
    *(f"builtins.{name}" for name in ("bool", "bytes", "dict", "float", "int", "list", "object", "str", "tuple")),
    *(f"typing.{name}" for name in ("Any", "Dict", "List", "Optional", "Tuple", "Union")),
    "enum.Enum",
    "fairseq.data.dictionary.Dictionary",
    "fairseq.dataclass.constants.Choices",
    "fairseq.dataclass.constants.StrEnum",
    *(f"fairseq.{m}.{name}Meter" for m in ("meters", "logging.meters") for name in ("Average", "Stopwatch", "Time")),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    "numpy.dtype",
    "numpy.ndarray",
    *(f"omegaconf.base.{name}" for name in ("ContainerMetadata", "Metadata", "Node", "Container", "SCMode")),
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    *(f"omegaconf.nodes.{name}Node" for name in ("Any", "String", "Integer", "Float", "Boolean", "Enum", "Bytes")),
]

DAMAGED = (  # what the unpickler raises on bytes that are no checkpoint, found by cutting and changing them
    *(pickle.UnpicklingError, struct.error, EOFError, OSError, RuntimeError, AssertionError, AttributeError),
    *(IndexError, KeyError, MemoryError, OverflowError, TypeError, ValueError),
)


def read_pickle(path: Path, where: str) -> Any:
    """What a file that `torch.save` wrote holds, in either of its two formats; objects of known classes as `Inert`.

    Raises:
        DataError: the file is not there.
        StoreError: damaged, or an object of a class that is not known.
    """
    try:
        with safe_globals([(Inert, name) for name in KNOWN]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise DataError(f"{where} does not exist; download the checkpoint and give its path") from None
    except DAMAGED as error:
        raise StoreError(
            f"{where} is damaged or holds more than tensors ({_reason(error)}); nothing of it was run: fetch it again, or "
            "ask its authors for safetensors"
        ) from error


def plain(value: Any, where: str) -> Any:
    """Settings as dicts, lists and scalars: out of an argparse.Namespace, an omegaconf container or an enum's member.

    Raises:
        StoreError: nested or long beyond any settings, which a file can be made to be.
    """
    return _plain(value, where, 0, [100_000])


def _plain(value: Any, where: str, depth: int, budget: list[int]) -> Any:
    budget[0] -= 1
    if depth > 32 or budget[0] < 0:
        raise StoreError(f"{where}: its settings are nested or long beyond what any checkpoint has; fetch it again")
    if isinstance(value, Inert):
        state = value.state[0] if isinstance(value.state, tuple) and value.state else value.state
        if isinstance(state, dict):
            # omegaconf keeps a container's items in _content and a node's value in _val, beside links to its parent
            inside = next((state[key] for key in ("_content", "_val") if key in state), state)
            return _plain(inside, where, depth + 1, budget)
        return _plain(value.args[0], where, depth + 1, budget) if len(value.args) == 1 else None
    if isinstance(value, dict):
        return {str(_plain(k, where, depth + 1, budget)): _plain(v, where, depth + 1, budget) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where, depth + 1, budget) for item in value]
    return value if isinstance(value, str | int | float | bool) else None


def _reason(error: BaseException) -> str:
    """The sentence of torch's long advice that says what was found."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    found = next((line for line in lines if "GLOBAL" in line or line.startswith("WeightsUnpickler error")), lines[0])
    return found.removeprefix("WeightsUnpickler error: ").split(". Please use")[0][:200]
