"""The expert bank against a loop over single tokens; empty experts, dropped tokens, every gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck

from ssmoe.ops.reference import expert_mlp

ACTIVATIONS: dict[str, Any] = {"relu": F.relu, "relu_squared": lambda x: F.relu(x) ** 2, "silu": F.silu}


def draw(t: int, k: int, *, e: int = 5, d: int = 4, f: int = 3, gated: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(t * 10 + k)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {"x": normal(t, d), "up": normal(e, f, d), "down": normal(e, d, f), "weight": normal(t, k).exp()}
    # expert 2 gets nothing; -1 is dropped
    choice = torch.randint(-1, e - 1, (t, k), generator=generator, dtype=torch.int32)
    inputs["expert"] = torch.where(choice == 2, e - 1, choice).to(torch.int32)
    return inputs | ({"gate": normal(e, f, d)} if gated else {})


def one_by_one(inputs: dict[str, Tensor], activation: str) -> Tensor:
    act, rows = ACTIVATIONS[activation], []
    for token, experts, weights in zip(inputs["x"], inputs["expert"], inputs["weight"], strict=True):
        y = torch.zeros_like(token)
        for e, weight in zip(experts.tolist(), weights, strict=True):
            if e >= 0:
                hidden = inputs["up"][e] @ token
                hidden = act(inputs["gate"][e] @ token) * hidden if "gate" in inputs else act(hidden)
                y = y + weight * (inputs["down"][e] @ hidden)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("t", "k"), [(1, 1), (2, 3), (17, 2)])
def test_equals_one_token_at_a_time(activation: str, gated: bool, t: int, k: int) -> None:
    inputs = draw(t, k, gated=gated)
    found = expert_mlp(**inputs, activation=activation)
    torch.testing.assert_close(found, one_by_one(inputs, activation), rtol=0, atol=1e-12)


def test_gradients_of_every_input() -> None:
    inputs = draw(6, 2, gated=True)
    expert = inputs.pop("expert")
    names = list(inputs)

    def mlp(*values: Tensor) -> Tensor:
        return expert_mlp(**dict(zip(names, values, strict=True)), expert=expert, activation="silu")

    assert gradcheck(mlp, tuple(t.requires_grad_() for t in inputs.values()))


@pytest.mark.parametrize("all_dropped", [False, True])
def test_an_empty_expert_has_a_zero_gradient(all_dropped: bool) -> None:
    inputs = draw(6, 1)
    expert = torch.full((6, 1), -1, dtype=torch.int32) if all_dropped else inputs["expert"]
    up, down = inputs["up"].requires_grad_(), inputs["down"].requires_grad_()
    y = expert_mlp(inputs["x"], up, down, expert=expert, weight=inputs["weight"], activation="relu")
    y.sum().backward()
    for bank in (up, down):
        assert bank.grad is not None
        assert torch.isfinite(bank.grad).all()
        assert (bank.grad[2] == 0).all()
        assert bool(bank.grad.any()) is not all_dropped
    if all_dropped:
        assert (y == 0).all()


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ValueError, match="'gelu' is not one of: relu, relu_squared, silu"):
        expert_mlp(**draw(2, 1), activation="gelu")


def test_bfloat16_is_added_up_in_float32() -> None:
    inputs = draw(32, 3)
    narrow = {n: t if t.dtype == torch.int32 else t.bfloat16() for n, t in inputs.items()}
    y = expert_mlp(**narrow, activation="relu")
    expected = one_by_one({n: t.double() if n != "expert" else t for n, t in narrow.items()}, "relu")
    assert y.dtype == torch.bfloat16
    assert (y.double() - expected).abs().max() < 2e-2 * expected.abs().max()
