"""A mixture of experts for one position a row: the router's choice and the experts, without statistics."""

from collections.abc import Callable

import torch
from torch import Tensor

from ssmoe.ops.reference.expert_mlp import expert_mlp
from ssmoe.ops.reference.route import Routed, route
from ssmoe.ops.reference.wide_linear import wide_linear


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
    """`wide_linear`, `route`, then `expert_mlp` with the weights times `scale`; inference only.

    x: (t, d) -> (t, d). router: (e, d). The rest as in those three.
    """
    return compose(x, router, bias, up, down, gate, top_k, score, normalise, scale, activation, expert_mlp)


def compose(
    x: Tensor,
    router: Tensor,
    bias: Tensor | None,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    top_k: int,
    score: str,
    normalise: bool,
    scale: float,
    activation: str,
    experts: Callable[..., Tensor],
    linear: Callable[[Tensor, Tensor], Tensor] = wide_linear,
    choose: Callable[..., Routed] = route,
) -> Tensor:
    """The three ops of a backend, one after another."""
    real = torch.ones(x.shape[0], dtype=torch.bool, device=x.device)
    routed = choose(linear(x, router), real, bias, top_k=top_k, score=score, normalise=normalise)
    return experts(
        x, up, down, gate, expert=routed.expert, weight=routed.weight * scale, activation=activation
    )
