"""One position of a mixture of experts beside the reference: used by the interpreter's tests and the GPU's.

Run as a module under TRITON_INTERPRET=1, it prints the errors of every small case as JSON.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ssmoe.ops import load

Errors = dict[str, tuple[float, float]]
"""The kernels' error and eager torch's, both against float64."""
F32, BF16 = torch.float32, torch.bfloat16


def inputs(
    t: int, d: int, f: int, e: int, dtype: torch.dtype, *, gated: bool, biased: bool, device: str
) -> dict[str, Any]:
    """Scores that lie apart, so that rounding changes nobody's experts."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return {
        "x": normal(t, d).to(dtype),
        "router": normal(e, d),
        "bias": normal(e) * 0.1 if biased else None,
        "up": (normal(e, f, d) / d**0.5).to(dtype),
        "down": (normal(e, d, f) / f**0.5).to(dtype),
        "gate": (normal(e, f, d) / d**0.5).to(dtype) if gated else None,
    }


def errors(
    t: int, d: int, f: int, e: int, k: int, dtype: torch.dtype, *, gated: bool = False, biased: bool = False,
    device: str = "cpu", backend: str = "triton", **options: Any,
) -> Errors:  # fmt: skip
    """options: of `moe_step`, in place of the defaults here."""
    given = inputs(t, d, f, e, dtype, gated=gated, biased=biased, device=device)
    options = {
        "score": "softmax",
        "normalise": False,
        "scale": 1.0,
        "activation": "relu",
        **options,
        "top_k": k,
    }
    exact_given = {name: None if v is None else v.double() for name, v in given.items()}
    ours, eager = (load(name, device).moe_step(**given, **options) for name in (backend, "reference"))
    exact = load("reference").moe_step(**exact_given, **options)
    assert ours.dtype == dtype
    return {"y": (apart(ours, exact), apart(eager, exact))}


def apart(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


SMALL: dict[str, Callable[[], Errors]] = {
    "one row": lambda: errors(1, 24, 12, 8, 1, F32),
    "three rows, top-4 of 20": lambda: errors(3, 40, 24, 20, 4, F32, normalise=True, scale=2.5),
    "sigmoid, biased, SwiGLU": lambda: errors(
        2, 33, 17, 9, 2, F32, gated=True, biased=True, score="sigmoid", normalise=True, activation="silu"
    ),
    "wider than a tile, squared": lambda: errors(2, 600, 530, 5, 2, F32, activation="relu_squared"),
    "rows that share their experts": lambda: errors(20, 24, 16, 3, 2, F32),
    "bfloat16": lambda: errors(3, 64, 48, 16, 4, BF16),
    "more choices than the kernels take": lambda: errors(2, 24, 12, 20, 17, F32),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({name: case() for name, case in SMALL.items()}, sys.stdout)
