"""Which device torch computes on: the single place where it is decided."""

from typing import TYPE_CHECKING

from lvm.errors import InputError

if TYPE_CHECKING:
    import torch


def pick_device(device: "str | torch.device" = "auto", reserved: bool = True) -> "torch.device":
    """The torch device of a name; "auto" is CUDA, then MPS, then CPU. Raises InputError on an unknown name.

    reserved: False if a scheduler runs this process without a GPU. "auto" is then the CPU, since the process would
    still see all of the node's GPUs and use memory that belongs to others.
    """
    import torch

    if str(device) != "auto":
        try:
            return torch.device(device)
        except RuntimeError as err:
            raise InputError(f"unknown device {device!r}; expected auto, cpu, cuda or mps") from err
    return torch.device(seen_gpu() if reserved and seen_gpu() else "cpu")


def seen_gpu() -> str:
    """The kind of GPU that torch sees here, "cuda" or "mps"; "" where it sees none."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else ""


def device_for_mini(device: "str | torch.device" = "auto", reserved: bool = True) -> "torch.device":
    """As `pick_device`, but "auto" is the CPU on a Mac: `mini`'s networks are small, so their time goes into the number
    of calls, which cost less on the CPU than on an Apple GPU."""
    picked = pick_device(device, reserved)
    return pick_device("cpu") if picked.type == "mps" and str(device) == "auto" else picked


def has_complex(device: "torch.device") -> bool:
    """Whether torch fully supports complex numbers there; MPS has only some operations."""
    return device.type != "mps"
