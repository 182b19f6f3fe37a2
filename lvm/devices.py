"""The choice of torch device: GPU or CPU."""

from typing import TYPE_CHECKING

from lvm.errors import InputError

if TYPE_CHECKING:
    import torch


def pick_device(device: "str | torch.device" = "auto", reserved: bool = True) -> "torch.device":
    """The torch device of this name; "auto" is CUDA, then MPS, then CPU. Raises InputError on an unknown name.

    reserved: False if the scheduler assigned this process no GPU. "auto" is then the CPU, although the process can
    see the node's GPUs: they belong to others.
    """
    import torch

    if str(device) != "auto":
        try:
            picked = torch.device(device)
            if picked.type not in ("cpu", "cuda", "mps"):
                raise TypeError(picked.type)
        except (RuntimeError, TypeError) as err:
            raise InputError(f"unknown device {device!r}; expected auto, cpu, cuda or mps") from err
        return picked
    return torch.device(seen_gpu() if reserved and seen_gpu() else "cpu")


def usable_device(device: "str | torch.device" = "auto") -> "torch.device":
    """As `pick_device`. Raises InputError if torch cannot allocate there, too."""
    import torch

    picked = pick_device(device)
    if str(device) == "auto":
        return picked
    try:
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError, NotImplementedError) as err:
        raise InputError(f"torch cannot use device {str(device)!r} here; auto takes what there is") from err
    return picked


def seen_gpu() -> str:
    """The kind of GPU that torch sees, "cuda" or "mps", or ""."""
    import torch

    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else ""


def device_for_mini(device: "str | torch.device" = "auto", reserved: bool = True) -> "torch.device":
    """As `pick_device`, but "auto" is the CPU on a Mac: `mini`'s networks are so small that call overhead dominates,
    and it is lower on the CPU than on an Apple GPU."""
    picked = pick_device(device, reserved)
    return pick_device("cpu") if picked.type == "mps" and str(device) == "auto" else picked


def has_complex(device: "torch.device") -> bool:
    """Whether torch fully supports complex numbers on this device; MPS lacks some operations."""
    return device.type != "mps"
