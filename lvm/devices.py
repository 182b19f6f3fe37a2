"""Which device torch computes on."""

from typing import TYPE_CHECKING

from lvm.errors import InputError

if TYPE_CHECKING:
    import torch


def pick_device(device: str = "auto") -> "torch.device":
    """The torch device of a name; "auto" takes CUDA, then MPS, then CPU. Raises InputError on an unknown name."""
    import torch

    if device != "auto":
        try:
            return torch.device(device)
        except RuntimeError as err:
            raise InputError(f"unknown device {device!r}; expected auto, cpu, cuda or mps") from err
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
