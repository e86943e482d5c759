"""A mixture of experts for one position a row on a CPU: the ops of this backend, one after another."""

from torch import Tensor

from ssmoe.ops.cpu.expert_mlp import expert_mlp
from ssmoe.ops.reference.moe_step import compose


def moe_step(
    x: Tensor,
    router: Tensor,
    bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None = None,
    *,
    top_k: int,
    score: str,
    normalise: bool,
    scale: float,
    activation: str,
) -> Tensor:
    """`ssmoe.ops.reference.moe_step`."""
    return compose(x, router, bias, up, down, gate, top_k, score, normalise, scale, activation, expert_mlp)
