"""A name from the command line in, a torch device out."""

import torch

from cache.errors import SettingsError


def choose_device(name: str) -> str:
    """ "auto" is the first CUDA device, or the CPU where there is none.

    Raises:
        SettingsError: a device this machine does not have.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError(f"--device is {name!r}; choose cpu, cuda, cuda:1 or auto") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise SettingsError(
            f"--device is {name!r} and this machine has {torch.cuda.device_count()} CUDA devices; use cpu or auto"
        )
    return name
