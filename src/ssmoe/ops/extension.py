"""The shared library of `csrc/`: whether it is there, and what keeps it away."""

import functools
from pathlib import Path

import torch

PATH = Path(__file__).parent / "cpu" / "_kernels.so"


@functools.cache
def missing() -> str | None:
    """Why the CPU kernels cannot run here, in one line; None when they can. Loads them, once."""
    if not PATH.exists():
        return "the CPU kernels were not built: with a C++ compiler and torch present, install ssmoe again"
    try:
        torch.ops.load_library(PATH)
    except OSError as error:
        return f"the CPU kernels do not load: {str(error).splitlines()[0]}"
    return None
