"""The dense feed-forward layer against its formulas."""

import pytest
import torch
import torch.nn.functional as F

from ssmoe.model.feedforwards.dense import Dense


@pytest.mark.parametrize("activation", ["relu", "relu_squared", "swiglu"])
def test_equals_its_formula(activation: str) -> None:
    torch.manual_seed(0)
    block = Dense(6, d_ff=10, activation=activation).double()  # pyright: ignore[reportArgumentType]
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    hidden = x @ block.up.weight.T
    if block.gate is not None:
        hidden = F.silu(x @ block.gate.weight.T) * hidden
    else:
        hidden = F.relu(hidden) ** (2 if activation == "relu_squared" else 1)
    torch.testing.assert_close(block(x).x, hidden @ block.down.weight.T)
    assert block(x).state == ()
