"""A name from the command line in, a torch device out."""

import torch

from cache.errors import SettingsError


def choose_device(name: str) -> str:
    """ "auto" is the first CUDA device, or the CPU where there is none. From then on float32 is float32 in this process.

    Raises:
        SettingsError: a device this machine does not have.
    """
    without_tf32()
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


def without_tf32() -> None:
    """Switch TF32 off, which torch has on for convolutions: its 10 bits move features by 1e-3."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
