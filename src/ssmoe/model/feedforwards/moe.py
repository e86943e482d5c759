"""The mixture of experts: a router, then the expert bank (Switch Transformer, arXiv 2101.03961)."""

import torch
from torch import Tensor, nn

from ssmoe.config.model import Activation
from ssmoe.model.feedforwards.router import Router
from ssmoe.model.init import init_weights
from ssmoe.model.layer import LayerOut
from ssmoe.ops import Ops, Segments, load


class Experts(nn.Module):
    """The experts as stacked tensors. up, gate: (e, d_expert, d_model). down: (e, d_model, d_expert)."""

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        d_expert: int,
        activation: Activation = "relu",
        ops: Ops | None = None,
    ) -> None:
        super().__init__()
        self.ops = ops or load("auto")
        self.activation = "silu" if activation == "swiglu" else activation
        self.up = nn.Parameter(torch.empty(num_experts, d_expert, d_model))
        self.gate = (
            nn.Parameter(torch.empty(num_experts, d_expert, d_model)) if activation == "swiglu" else None
        )
        self.down = nn.Parameter(torch.empty(num_experts, d_model, d_expert))
        init_weights(self)

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        """x: (t, d_model), expert: (t, k) int32, weight: (t, k) -> (t, d_model)"""
        return self.ops.expert_mlp(
            x, self.up, self.down, self.gate, expert=expert, weight=weight, activation=self.activation
        )


class MoE(nn.Module):
    """A mixture of experts, without norm and residual; usable on its own: `MoE(512, num_experts=8)(x).x`.

    x: (b, l, d_model) -> (b, l, d_model); the router's losses and counts are in `.stats`. `d_expert` None is
    4 * d_model. With a `capacity_factor`, training drops tokens beyond
    floor(capacity_factor * top_k * tokens / num_experts) an expert, in the order (position, row, rank).
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        d_expert: int | None = None,
        top_k: int = 1,
        activation: Activation = "relu",
        capacity_factor: float | None = None,
        balance_coefficient: float = 0.01,
        z_coefficient: float = 0.0,
        ops: Ops | None = None,
    ) -> None:
        super().__init__()
        if top_k > num_experts:
            raise ValueError(f"top_k={top_k} is more than num_experts={num_experts}: lower it or add experts")
        self.batch_dependent = capacity_factor is not None
        self.router = Router(
            d_model,
            num_experts=num_experts,
            top_k=top_k,
            capacity_factor=capacity_factor,
            balance_coefficient=balance_coefficient,
            z_coefficient=z_coefficient,
        )
        self.experts = Experts(
            d_model,
            num_experts=num_experts,
            d_expert=4 * d_model if d_expert is None else d_expert,
            activation=activation,
            ops=ops,
        )

    def forward(
        self, x: Tensor, state: tuple[()] | None = None, segments: Segments | None = None
    ) -> LayerOut:
        """Each real token through its experts; a dropped token gives zero."""
        del state
        routing = self.router(x, segments)
        y = self.experts(x.reshape(-1, x.shape[-1]), routing.expert, routing.weight)
        return LayerOut(y.view_as(x), (), routing.stats)

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> tuple[()]:
        """Stateless."""
        del batch, capacity, dtype, device
        return ()
