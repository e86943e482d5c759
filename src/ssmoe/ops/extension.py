"""The shared library of `csrc/`: whether it is there, and what keeps it away."""

import functools
from pathlib import Path

import torch

PATH = Path(__file__).parent / "cpu" / "_kernels.so"

AGAIN = "pip install --force-reinstall --no-deps --no-cache-dir ssmoe (or the folder it came from)"


@functools.cache
def missing() -> str | None:
    """Why the CPU kernels cannot run here, in one line; None when they can. Loads them, once."""
    if not PATH.exists():
        return f"the CPU kernels were not built ({_reason()}); mend that and install again: {AGAIN}"
    try:
        torch.ops.load_library(PATH)
    except OSError as error:
        return f"the CPU kernels do not load: {str(error).splitlines()[0]}"
    return None


def _reason() -> str:
    """What setup.py noted when it could not build the library."""
    note = PATH.with_name("_not_built.txt")
    return note.read_text().strip() if note.exists() else "no build was tried here"
