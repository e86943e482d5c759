"""One token's attention on the kernels beside the reference: used by the interpreter's tests and the GPU's.

Run as a module under TRITON_INTERPRET=1, it prints the errors of every small case as JSON.
"""

import json
import sys
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from ssmoe.ops import load

Errors = dict[str, tuple[float, float]]
"""For each output: the kernels' error and eager torch's, both against float64."""
F32, BF16 = torch.float32, torch.bfloat16
TOKENS = 3


def errors(
    b: int,
    h: int,
    room: int,
    d: int,
    dtype: torch.dtype,
    rope_base: float | None,
    device: str = "cpu",
    backend: str = "triton",
) -> Errors:
    """Some tokens after pasts of every length, the shortest none; what is not in use is NaN."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    length = torch.linspace(room - TOKENS, 0, b, device=device).long()
    used = torch.arange(room, device=device) < length[:, None]
    cache = [normal(b, h, room, d).masked_fill(~used[:, None, :, None], float("nan")) for _ in range(2)]
    tokens = [normal(b, 3 * h * d) for _ in range(TOKENS)]
    found = [
        run(name, cache, length, tokens, wide, rope_base)
        for name, wide in ((backend, dtype), ("reference", dtype), ("reference", torch.float64))
    ]
    ours, eager, exact = found
    assert torch.equal(ours["length"], length + TOKENS)
    return {name: (apart(ours[name], exact[name]), apart(eager[name], exact[name])) for name in exact}


def run(
    backend: str,
    cache: list[Tensor],
    length: Tensor,
    tokens: list[Tensor],
    dtype: torch.dtype,
    rope_base: float | None,
) -> dict[str, Tensor]:
    """What each token sees, and the cache in the end, its free room as zeros."""
    keys, values = (t.to(dtype, copy=True) for t in cache)
    length, step = length.clone(), load(backend, str(length.device.type)).attention_step
    seen = [step(qkv.to(dtype), keys, values, length, rope_base=rope_base) for qkv in tokens]
    free = torch.arange(keys.shape[2], device=keys.device) >= length[:, None]
    assert bool(keys.isnan().any(3).eq(free[:, None]).all())
    return {
        "y": torch.stack(seen),
        "keys": keys.nan_to_num(),
        "values": values.nan_to_num(),
        "length": length,
    }


def apart(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))


def in_pieces(programs: int, case: Callable[[], Errors]) -> Errors:
    """With another number of programs, so that a past is cut into more or fewer pieces."""
    with mock.patch("ssmoe.ops.triton.attention_step.PROGRAMS", programs):
        return case()


SMALL: dict[str, Callable[[], Errors]] = {
    "one row": lambda: errors(1, 1, 70, 4, F32, 1e4),
    "one piece": lambda: in_pieces(1, lambda: errors(3, 2, 200, 8, F32, 1e4)),
    "seven pieces, five rows": lambda: in_pieces(70, lambda: errors(5, 2, 333, 16, F32, 100.0)),
    "an odd head without rotation": lambda: errors(2, 3, 130, 5, F32, None),
    "bfloat16": lambda: errors(3, 2, 300, 64, BF16, 1e4),
    "bfloat16, one piece, no rotation": lambda: in_pieces(1, lambda: errors(3, 2, 150, 33, BF16, None)),
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump({name: case() for name, case in SMALL.items()}, sys.stdout)
