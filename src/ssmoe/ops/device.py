"""Where a model lives, and which kernels cannot run there."""

import os

import torch


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device that is meant: None is the CPU, "auto" cuda where present, else the CPU.

    Raises ValueError, with the remedy, for a device that is not there.
    """
    if device is None or device == "auto":
        return torch.device("cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={str(device)!r} is no device: use auto, cpu or cuda") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r} but torch sees no GPU here: use device=cpu")
    try:
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"device={str(device)!r} cannot be used here ({reason}): use auto, cpu or cuda"
        ) from error
    return chosen


def check_home(backend: str, device: str) -> None:
    """Raise ValueError for kernels that do not run on a device of the type `device`.

    Triton's interpreter runs the GPU's on any.
    """
    if backend == "triton" and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend='triton' has kernels for a GPU and the device is {device!r}: use backend='auto', "
            "or device='cuda' where torch sees a GPU"
        )
    if backend == "cpu" and device != "cpu":
        raise ValueError(
            f"backend='cpu' has kernels for a CPU and the device is {device!r}: use backend='auto', "
            "or device='cpu'"
        )
