"""What accelerators can do: dense bfloat16 peak and memory, from their makers' data sheets."""

from difflib import get_close_matches
from typing import NamedTuple


class Gpu(NamedTuple):
    """Peak FLOPs a second without sparsity, and memory."""

    peak_flops: float
    memory_bytes: float


GPUS = {
    "B200": Gpu(2250e12, 180e9),
    "H200": Gpu(989e12, 141e9),
    "H100": Gpu(989e12, 80e9),
    "A100-80GB": Gpu(312e12, 80e9),
    "A100-40GB": Gpu(312e12, 40e9),
    "L40S": Gpu(362e12, 48e9),
    "A10": Gpu(125e12, 24e9),
    "L4": Gpu(121e12, 24e9),
    "RTX4090": Gpu(165e12, 24e9),
    "RTX3090": Gpu(71e12, 24e9),
}
"""The PCIe variants of H100 and A100 reach less; a measured MFU says so."""


def gpu(name: str) -> Gpu:
    """A GPU by name in any case; ValueError names the nearest."""
    for known, value in GPUS.items():
        if known.lower() == name.lower():
            return value
    near = get_close_matches(name.upper(), GPUS, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"unknown GPU {name!r}{hint or '.'} Known: {', '.join(GPUS)}; for another give --flops")
