"""The CPU expert bank against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmoe import ops
from ssmoe.ops import reference
from tests.ops.parity import Run, judge, leaf, results, rounded

pytestmark = pytest.mark.skipif(ops.missing("cpu") is not None, reason=str(ops.missing("cpu")))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def experts(*args: Any, **kwargs: Any) -> Tensor:
    return ops.load("cpu").expert_mlp(*args, **kwargs)


def drawn(t: int, d: int, f: int, e: int, k: int, dtype: torch.dtype, activation: str, gated: bool) -> Run:
    x, dy = rounded(t, d, dtype=dtype), rounded(t, d, dtype=dtype)
    up, gate, down = ((torch.randn(e, *s) / s[1] ** 0.5).to(dtype).double() for s in ((f, d), (f, d), (d, f)))
    # the last expert gets nothing, some assignments are dropped
    expert, weight = torch.randint(-1, e - 1, (t, k), dtype=torch.int32), torch.rand(t, k).double()

    def run(op: Any, narrow: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
        inputs = {n: leaf(v, narrow) for n, v in {"x": x, "up": up, "down": down}.items()}
        inputs |= {"gate": leaf(gate if gated else None, narrow), "weight": leaf(weight, wide)}
        y = op(
            inputs["x"], inputs["up"], inputs["down"], inputs["gate"],
            expert=expert, weight=inputs["weight"], activation=activation,
        )  # fmt: skip
        return results({"y": y}, {"y": dy}, inputs)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("activation", "gated"), [("relu", False), ("relu_squared", False), ("silu", True), ("silu", False)]
)
@pytest.mark.parametrize(
    ("t", "d", "f", "e", "k"),
    [(1, 8, 16, 4, 1), (37, 24, 40, 5, 2), (200, 37, 53, 40, 4), (300, 64, 96, 3, 1)],
)
def test_parity(
    t: int, d: int, f: int, e: int, k: int, activation: str, gated: bool, dtype: torch.dtype
) -> None:
    judge(lambda: drawn(t, d, f, e, k, dtype, activation, gated), reference.expert_mlp, experts, dtype)


def bank(t: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    return {
        "x": torch.randn(t, 16, dtype=dtype),
        "up": torch.randn(3, 24, 16),
        "down": torch.randn(3, 16, 24),
        "gate": None,
        "expert": torch.randint(0, 2, (t, 2), dtype=torch.int32),
        "weight": torch.rand(t, 2),
        "activation": "relu",
    }


def test_an_empty_expert_gets_a_zero_gradient() -> None:
    args = bank(5)
    args["up"].requires_grad_()
    experts(**args).sum().backward()
    assert (args["up"].grad[2] == 0).all()
    assert (args["up"].grad[:2] != 0).any()


def test_all_dropped_and_no_tokens() -> None:
    args = bank(4)
    args["expert"].fill_(-1)
    args["x"].requires_grad_()
    y = experts(**args)
    assert (y == 0).all()
    y.sum().backward()
    assert (args["x"].grad == 0).all()
    assert experts(**bank(0)).shape == (0, 16)


def test_parameters_follow_the_activations_dtype() -> None:
    args = bank(6, torch.bfloat16)
    y = experts(**args)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, reference.expert_mlp(**args), rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("gated", [False, True])
def test_wide_weights_under_bfloat16_are_read_once_and_get_wide_gradients(gated: bool) -> None:
    def draw() -> Run:
        run = drawn(90, 70, 45, 6, 2, torch.bfloat16, "silu", gated)

        def mixed(op: Any, narrow: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
            def widened(x: Tensor, up: Tensor, down: Tensor, gate: Tensor | None, **kwargs: Any) -> Tensor:
                banks = [None if t is None else t.to(wide) for t in (up, down, gate)]
                return op(x, *banks, **kwargs)

            return run(widened, narrow, wide)

        return mixed

    judge(draw, reference.expert_mlp, experts, torch.bfloat16)
    args = bank(6, torch.bfloat16)
    args["up"].requires_grad_()
    experts(**args).sum().backward()
    assert args["up"].grad.dtype == torch.float32
    assert (args["up"].grad != args["up"].grad.bfloat16()).any()


def test_nothing_is_kept_without_a_gradient() -> None:
    args = bank(6)
    values = [args["expert"], args["weight"], 0, False]
    y, _, hidden, gates = torch.ops.ssmoe.expert_mlp(args["x"], args["up"], args["down"], None, *values)
    assert hidden.numel() == gates.numel() == 0
    torch.testing.assert_close(y, experts(**args))


@pytest.mark.parametrize(
    ("t", "d", "f", "e", "k", "dtype"),
    [
        # several pieces along every dimension; gradients that bypass the caches
        (500, 544, 1120, 6, 1, torch.bfloat16),
        (300, 544, 1120, 4, 1, torch.float32),
        # the same, but lines of the gradients' rows do not begin where the machine's do
        (300, 530, 1090, 4, 2, torch.float32),
        # one expert has half of the tokens: many tasks of it, and gradients summed in pieces
        (2400, 130, 300, 2, 1, torch.bfloat16),
        (2400, 130, 300, 2, 1, torch.float32),
    ],
)
def test_parity_of_large_banks(t: int, d: int, f: int, e: int, k: int, dtype: torch.dtype) -> None:
    judge(lambda: drawn(t, d, f, e, k, dtype, "silu", True), reference.expert_mlp, experts, dtype, repeats=1)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="activation='gelu' is not one of"):
        experts(**{**bank(3), "activation": "gelu"})
    with pytest.raises(RuntimeError, match="expert 7 is not between"):
        experts(**{**bank(3), "expert": torch.full((3, 2), 7, dtype=torch.int32)})
    with pytest.raises(RuntimeError, match="disagree"):
        experts(**{**bank(3), "down": torch.randn(3, 16, 20)})


@pytest.mark.parametrize("gated", [False, True])
def test_opcheck(gated: bool) -> None:
    args = bank(9)
    gate = torch.randn(3, 24, 16, requires_grad=True) if gated else None
    x, up, down, weight = (args[n].requires_grad_() for n in ("x", "up", "down", "weight"))
    torch.library.opcheck(torch.ops.ssmoe.expert_mlp, (x, up, down, gate, args["expert"], weight, 2, True))


def test_compiles_as_one_graph() -> None:
    args = bank(9)
    args["up"].requires_grad_()
    compiled = torch.compile(lambda: experts(**args).sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), experts(**args).sum())
    compiled().backward()
    assert args["up"].grad is not None


@pytest.mark.parametrize("gated", [False, True])
def test_few_tokens_read_a_wide_bank_as_if_it_were_cast_whole(gated: bool) -> None:
    args = bank(5)
    args["x"] = args["x"].bfloat16()
    wide = {"up": args["up"], "down": args["down"], "gate": torch.randn(3, 24, 16) if gated else None}
    narrow = {name: None if t is None else t.bfloat16() for name, t in wide.items()}
    with torch.no_grad():
        assert torch.equal(experts(**{**args, **wide}), experts(**{**args, **narrow}))
        tensors = (args["x"], args["up"], args["down"], wide["gate"], args["expert"], args["weight"], 2)
        torch.library.opcheck(torch.ops.ssmoe.expert_step, tensors)
