"""The decode step of every backend on the CPU against the reference in float64."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmoe.ops import BACKENDS, load, missing
from ssmoe.ops.reference import mamba_step as reference
from tests.ops.parity import Run, judge, rounded

ON_CPU = [name for name in BACKENDS if name not in ("reference", "triton") and not missing(name)]
SHAPES = [
    # b, d_model, d_inner, d_state, d_conv, dt_rank
    (1, 64, 128, 16, 4, 4),
    (1, 33, 49, 5, 3, 3),
    (2, 96, 192, 16, 4, 6),
    (3, 24, 40, 4, 1, 2),
    (8, 48, 96, 16, 4, 3),
    (13, 16, 36, 24, 6, 1),
    (1, 7, 9, 1, 2, 1),
    (40, 24, 48, 64, 4, 2),
]
Shape = tuple[int, int, int, int, int, int]
NARROW = ("in_proj", "x_proj", "delta_proj", "out_proj", "conv_state")
"""What has the compute dtype; the rest is float32 or wider."""


def inputs(
    b: int, d: int, inner: int, n: int, k: int, rank: int, dtype: torch.dtype, *, bias: bool = False
) -> dict[str, Tensor]:
    """Float64 values that the narrow dtype holds exactly where it is used."""
    drawn = {
        "x": rounded(b, d, dtype=dtype),
        "norm_weight": 1 + 0.1 * torch.randn(d).double(),
        "in_proj": rounded(2 * inner, d, dtype=dtype) / 8,
        "conv_weight": torch.randn(inner, k).double(),
        "conv_bias": torch.randn(inner).double(),
        "x_proj": rounded(rank + 2 * n, inner, dtype=dtype) / 8,
        "delta_proj": rounded(inner, rank, dtype=dtype) / 8,
        "A_log": torch.randn(inner, n).float().double(),
        "D": torch.randn(inner).float().double(),
        "delta_bias": torch.randn(inner).float().double(),
        "out_proj": rounded(d, inner, dtype=dtype) / 8,
        "conv_state": rounded(b, inner, k - 1, dtype=dtype),
        "ssm_state": torch.randn(b, inner, n).float().double(),
    }
    if bias:
        drawn["norm_bias"] = torch.randn(d).double()
    return drawn


def cast(drawn: dict[str, Tensor], narrow: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(narrow if name in NARROW else wide) for name, t in drawn.items()}


def step(op: Any, tensors: dict[str, Tensor], **changes: Any) -> dict[str, Tensor]:
    with torch.no_grad():
        found = op(**{"norm_eps": 1e-5, **tensors, **changes})
    return {name: t for name, t in zip(("y", "conv", "ssm"), found, strict=True) if t.numel()}


def random_step(shape: Shape, dtype: torch.dtype, residual: torch.dtype, *, bias: bool) -> Run:
    tensors = inputs(*shape, dtype, bias=bias)

    def run(op: Any, narrow: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
        typed = cast(tensors, narrow, wide)
        typed["x"] = typed["x"].to(torch.promote_types(residual, narrow) if narrow == dtype else wide)
        return step(op, typed)

    return run


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("bias", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize(
    ("dtype", "residual"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_parity(shape: Shape, dtype: torch.dtype, residual: torch.dtype, bias: bool, backend: str) -> None:
    # what one draw loses depends on where its sums cancel, so few draws say little of a single row
    draws = 3 if shape[0] > 2 else 12
    op = load(backend).mamba_step
    judge(lambda: random_step(shape, dtype, residual, bias=bias), reference, op, dtype, draws)


@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_written_where_asked(dtype: torch.dtype, backend: str) -> None:
    op = load(backend).mamba_step
    tensors = cast(inputs(3, 32, 64, 16, 4, 2, dtype), dtype, torch.float32)
    before = {name: t.clone() for name, t in tensors.items()}
    expected = step(op, tensors)
    for name, t in tensors.items():
        assert torch.equal(t, before[name]), f"{name} was changed"
    for fresh in (True, False):
        out_conv = torch.empty_like(tensors["conv_state"]) if fresh else tensors["conv_state"]
        out_ssm = torch.empty_like(tensors["ssm_state"]) if fresh else tensors["ssm_state"]
        found = step(op, tensors, out_conv=out_conv, out_ssm=out_ssm)
        assert found["conv"] is out_conv
        assert found["ssm"] is out_ssm
        for name, t in expected.items():
            assert torch.equal(found[name], t), name


@pytest.mark.parametrize("backend", ["reference", *ON_CPU])
def test_what_it_cannot_do_is_named(backend: str) -> None:
    op = load(backend).mamba_step
    tensors = cast(inputs(2, 16, 32, 4, 4, 1, torch.float32), torch.float32, torch.float32)
    with pytest.raises(ValueError, match="no gradient"):
        op(**{**tensors, "x": tensors["x"].requires_grad_()}, norm_eps=1e-5)
    tensors["x"] = tensors["x"].detach()
    for name in set(tensors) - {"x"}:
        wrong = tensors[name][..., :-1] if name != "ssm_state" else tensors[name][:, :-1]
        with pytest.raises(ValueError, match="mamba_step"):
            step(op, {**tensors, name: wrong})
    with pytest.raises(ValueError, match="mamba_step"):
        step(op, tensors, norm_bias=torch.zeros(3))
    with pytest.raises(ValueError, match="out_conv"):
        step(op, tensors, out_conv=torch.empty(2, 32, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="out_ssm"):
        step(op, tensors, out_ssm=torch.empty(2, 32, 5))


@pytest.mark.skipif(bool(missing("cpu")), reason=str(missing("cpu")))
@pytest.mark.parametrize("bias", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype: torch.dtype, bias: bool) -> None:
    load("cpu")
    t = cast(inputs(2, 33, 49, 16, 4, 6, dtype, bias=bias), dtype, torch.float32)
    states, norm_bias = (t["conv_state"], t["ssm_state"]), t.get("norm_bias")
    norm, *matrices = (t[name] for name in t if name not in ("x", "norm_bias", "conv_state", "ssm_state"))
    arguments = (t["x"], norm, norm_bias, 1e-5, *matrices, *states)
    torch.library.opcheck(torch.ops.ssmoe.mamba_step, arguments)
    fresh = tuple(torch.empty_like(state) for state in states)
    torch.library.opcheck(torch.ops.ssmoe.mamba_step_into, (*arguments, *fresh))
    weights = [norm, *matrices, *([] if norm_bias is None else [norm_bias])]
    both = ([states[0]] * 2, [states[1]] * 2)
    torch.library.opcheck(torch.ops.ssmoe.mamba_steps, (t["x"], weights * 2, bias, 1e-5, *both))


@pytest.mark.parametrize("backend", ON_CPU)
def test_compiles_as_one_graph(backend: str) -> None:
    op = load(backend).mamba_step
    tensors = cast(inputs(2, 32, 64, 16, 4, 2, torch.bfloat16), torch.bfloat16, torch.float32)
    expected = step(op, tensors)
    found = step(torch.compile(op, fullgraph=True, backend="aot_eager"), tensors)
    for name, t in expected.items():
        assert torch.equal(found[name], t), name
    layer = tuple(
        tensors.get(name)
        for name in (
            "norm_weight", "norm_bias", "in_proj", "conv_weight", "conv_bias", "x_proj", "delta_proj",
            "A_log", "D", "delta_bias", "out_proj",
        )
    )  # fmt: skip

    def twice(x: Tensor, conv: Tensor, ssm: Tensor) -> Tensor:
        states: dict[str, Any] = {"conv_states": [conv] * 2, "ssm_states": [ssm] * 2}
        return load(backend).mamba_steps(x, [layer] * 2, norm_eps=1e-5, **states)[0]

    arguments = (tensors["x"], tensors["conv_state"], tensors["ssm_state"])
    with torch.no_grad():
        compiled = torch.compile(twice, fullgraph=True, backend="aot_eager")(*arguments)
        assert torch.equal(compiled, twice(*arguments))
