"""Names of devices that a person types."""

import pytest
import torch

from cache.errors import SettingsError
from pipeline.devices import choose_device


def test_auto_is_a_gpu_where_there_is_one():
    assert choose_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu") == "cpu"


@pytest.mark.parametrize(
    ("name", "told"), [("gpu", "choose cpu, cuda, cuda:1 or auto"), ("cuda:99", "this machine has .* use cpu or auto")]
)
def test_a_device_that_is_not_there_is_refused(name, told):
    with pytest.raises(SettingsError, match=told):
        choose_device(name)


def test_float32_is_float32(monkeypatch):
    """torch has TF32 on for convolutions."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    choose_device("cpu")
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
