"""`mamba_step` of the Triton backend beside the reference, on any device.

Run as a module under TRITON_INTERPRET=1, it prints the errors of every small case as JSON, as `triton_cases`.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ssmoe.ops import load
from ssmoe.ops.reference.mamba_step import Layer
from tests.ops.triton_cases import BF16, F32, Errors, normals, poisoned


class Case(NamedTuple):
    """The sizes of a step."""

    b: int
    d_model: int
    d_inner: int
    d_state: int
    d_conv: int
    dt_rank: int


def inputs(case: Case, dtype: torch.dtype, device: str = "cpu", *, bias: bool = False) -> dict[str, Any]:
    """The arguments of a step; products' weights and the convolution's state are of `dtype`."""
    b, d, c, n, k, r = case
    normal = normals(device)
    return {
        "x": normal(b, d),
        "norm_weight": 1 + 0.1 * normal(d),
        "in_proj": (normal(2 * c, d) / d**0.5).to(dtype),
        "conv_weight": 0.5 * normal(c, k),
        "conv_bias": 0.1 * normal(c),
        "x_proj": (normal(r + 2 * n, c) / c**0.5).to(dtype),
        "delta_proj": (normal(c, r) / r**0.5).to(dtype),
        "A_log": 0.5 * normal(c, n),
        "D": normal(c),
        "delta_bias": normal(c) - 3,
        "out_proj": (normal(d, c) / c**0.5).to(dtype),
        "norm_eps": 1e-5,
        "norm_bias": 0.1 * normal(d) if bias else None,
        "conv_state": normal(b, c, k - 1).to(dtype),
        "ssm_state": normal(b, c, n),
    }


@torch.no_grad()
def errors(given: dict[str, Any], *, in_place: bool = False) -> Errors:
    """Every output of the Triton backend and of the reference in the same dtype, against float64."""
    step, reference = load("triton").mamba_step, load("reference").mamba_step
    wide = {name: t.double() if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    truth, eager = reference(**wide), reference(**given)
    if in_place:
        given = {**given, "conv_state": given["conv_state"].clone(), "ssm_state": given["ssm_state"].clone()}
        given |= {"out_conv": given["conv_state"], "out_ssm": given["ssm_state"]}
    with poisoned():
        found = step(**given)
    if in_place:
        assert found[1] is given["conv_state"]
        assert found[2] is given["ssm_state"]
    result: Errors = {}
    for name, value, theirs, ours in zip(("y", "conv", "ssm"), truth, eager, found, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        scale = value.norm().clamp(min=1e-30)
        result[name] = (
            float((ours.double() - value).norm() / scale),
            float((theirs.double() - value).norm() / scale),
        )
    return result


NAMES = (
    "norm_weight", "norm_bias", "in_proj", "conv_weight", "conv_bias", "x_proj", "delta_proj", "A_log", "D",
    "delta_bias", "out_proj",
)  # fmt: skip
Steps = Callable[..., tuple[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor]]]


def in_turn(given: list[dict[str, Any]], steps: Steps) -> list[torch.Tensor]:
    """y, then every layer's new convolution states, then its scan states, in memory that nothing else wrote.

    given: the arguments of every layer's step, of which the first one's x counts. steps: as `mamba_steps`.
    """
    layers: list[Layer] = [tuple(layer[name] for name in NAMES) for layer in given]
    convs, ssms = ([layer[name] for layer in given] for name in ("conv_state", "ssm_state"))
    outs = [[torch.full_like(state, float("nan")) for state in states] for states in (convs, ssms)]
    with poisoned():
        y, new_convs, new_ssms = steps(
            given[0]["x"], layers, norm_eps=given[0]["norm_eps"], conv_states=convs, ssm_states=ssms,
            out_convs=outs[0], out_ssms=outs[1],
        )  # fmt: skip
    return [y, *new_convs, *new_ssms]


@torch.no_grad()
def chain_errors(given: list[dict[str, Any]], steps: Steps) -> list[tuple[float, float]]:
    """Each output of `in_turn`: our error and that of the reference in the same dtype, against float64."""
    reference = load("reference").mamba_steps
    wide = [
        {k: t.double() if isinstance(t, torch.Tensor) else t for k, t in layer.items()} for layer in given
    ]
    found = zip(in_turn(given, steps), in_turn(given, reference), in_turn(wide, reference), strict=True)
    return [
        (float((ours - truth).norm() / truth.norm()), float((eager - truth).norm() / truth.norm()))
        for ours, eager, truth in found
    ]


def small(b: int, d: int, c: int, n: int, k: int, r: int, dtype: torch.dtype, **options: bool) -> Errors:
    bias = options.pop("bias", False)
    return errors(inputs(Case(b, d, c, n, k, r), dtype, bias=bias), **options)


SMALL: dict[str, Callable[[], Errors]] = {
    "one row": lambda: small(1, 24, 40, 16, 4, 3, F32),
    "one row in place": lambda: small(1, 33, 70, 4, 4, 5, F32, in_place=True),
    "two rows, layernorm": lambda: small(2, 33, 70, 4, 3, 5, F32, bias=True),
    "four rows, no convolution": lambda: small(4, 20, 33, 5, 1, 1, F32),
    "five rows in place": lambda: small(5, 24, 40, 16, 4, 3, F32, in_place=True),
    "many rows, layernorm": lambda: small(19, 33, 70, 5, 2, 5, F32, bias=True),
    "five rows, no convolution": lambda: small(5, 20, 33, 4, 1, 1, F32),
    "five rows, wide state": lambda: small(5, 16, 20, 70, 4, 2, F32, in_place=True),
    "one row, bfloat16": lambda: small(1, 24, 40, 16, 4, 3, BF16, in_place=True),
    "three rows, bfloat16": lambda: small(3, 33, 70, 4, 4, 5, BF16, bias=True),
    "six rows, bfloat16": lambda: small(6, 70, 96, 4, 2, 9, BF16, in_place=True),
    "many rows, bfloat16": lambda: small(18, 33, 40, 16, 4, 5, BF16, bias=True),
}


if __name__ == "__main__":
    print(json.dumps({name: case() for name, case in SMALL.items()}))
