"""Kernels in CUDA C++ compiled for a CPU, by one of the emulators beside this file."""

import ctypes
import shutil
import subprocess
from pathlib import Path

from ssmoe.ops.triton import nvrtc

COMPILER = shutil.which("g++")
FLAGS = ("-std=c++17", "-O1", "-w", "-shared", "-fPIC")


def build(emulator: str, source: Path, macros: nvrtc.Macros, library: Path) -> ctypes.CDLL:
    """`source` compiled into `library` around the emulator of that name, which includes it."""
    options = [f"-D{key}={value}" for key, value in macros]
    here = Path(__file__).with_name(emulator)
    command = [str(COMPILER), *FLAGS, f'-DSOURCE="{source}"', *options, "-o", str(library), str(here)]
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))
