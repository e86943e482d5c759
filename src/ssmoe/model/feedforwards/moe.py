"""The mixture of experts: a router, then the expert bank (Switch Transformer, arXiv 2101.03961)."""

import torch
from torch import Tensor, nn

from ssmoe.config.model import Activation, Balance, BiasUpdate, MoEConfig, Score, split_experts
from ssmoe.model.feedforwards.dense import Dense
from ssmoe.model.feedforwards.router import Router
from ssmoe.model.init import init_weights
from ssmoe.model.layer import LayerOut, check_input, check_options
from ssmoe.model.norm import LayerNorm
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
    4 * d_model. `granularity` G makes num_experts * G experts of d_expert / G and takes top_k * G of them.
    With a `capacity_factor`, training drops tokens beyond floor(capacity_factor * top_k * tokens /
    num_experts) an expert, in the order (position, row, rank). `MoEConfig` says what the other options mean.

    In a training loop of your own nothing keeps the load even by itself: add `out.stats.balance` and
    `out.stats.z`, () each, to what you minimise, and with balance = "bias" call
    `moe.router.rebalance(out.stats.load)` after every optimiser step. `ssmoe.train` does both.
    """

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        d_expert: int | None = None,
        top_k: int = 1,
        granularity: int = 1,
        num_shared_experts: int = 0,
        activation: Activation = "relu",
        output_norm: bool = False,
        capacity_factor: float | None = None,
        score: Score = "softmax",
        normalise_weights: bool = False,
        weight_scale: float = 1.0,
        balance: Balance = "auxiliary",
        balance_coefficient: float = 0.01,
        bias_update: BiasUpdate = "sign",
        bias_rate: float = 1e-3,
        z_coefficient: float = 0.0,
        jitter: float = 0.0,
        ops: Ops | None = None,
    ) -> None:
        super().__init__()
        d_expert = 4 * d_model if d_expert is None else d_expert
        check_options(
            MoEConfig, d_model, num_experts=num_experts, d_expert=d_expert, top_k=top_k,
            granularity=granularity, num_shared_experts=num_shared_experts, activation=activation,
            capacity_factor=capacity_factor, score=score, normalise_weights=normalise_weights,
            weight_scale=weight_scale, balance=balance, balance_coefficient=balance_coefficient,
            bias_update=bias_update, bias_rate=bias_rate, z_coefficient=z_coefficient, jitter=jitter,
        )  # fmt: skip
        bank, width, num_choices = split_experts(num_experts, d_expert, top_k, granularity)
        self.batch_dependent = capacity_factor is not None
        self.router = Router(
            d_model,
            num_experts=bank,
            top_k=num_choices,
            capacity_factor=capacity_factor,
            score=score,
            normalise_weights=normalise_weights,
            weight_scale=weight_scale,
            balance=balance,
            balance_coefficient=balance_coefficient,
            bias_update=bias_update,
            bias_rate=bias_rate,
            z_coefficient=z_coefficient,
            jitter=jitter,
            ops=ops,
        )
        self.experts = Experts(d_model, num_experts=bank, d_expert=width, activation=activation, ops=ops)
        self.norm = LayerNorm(d_model, 1e-5) if output_norm else None
        # shared experts of weight 1 are one wider network
        self.shared = (
            Dense(d_model, d_ff=num_shared_experts * width, activation=activation)
            if num_shared_experts
            else None
        )
        init_weights(self)

    def forward(
        self, x: Tensor, state: tuple[()] | None = None, segments: Segments | None = None
    ) -> LayerOut:
        """Each real token through its experts; a dropped one gives zero, before norm and sharing."""
        del state
        check_input(x, self.router.weight.shape[1], self.experts.ops)
        routing = self.router(x, segments)
        x = x if routing.x is None else routing.x
        y = self.experts(x.reshape(-1, x.shape[-1]), routing.expert, routing.weight).view_as(x)
        if self.norm is not None:
            y = self.norm(y).to(x.dtype)
        if self.shared is not None:
            y = y + self.shared(x).x
        return LayerOut(y, (), routing.stats)

    def step(self, x: Tensor) -> Tensor:
        """(b, 1, d_model) -> the same, dropless and without statistics; inference only."""
        router, experts = self.router, self.experts
        y = experts.ops.moe_step(
            x.flatten(0, 1),
            router.weight,
            router.bias,
            experts.up,
            experts.down,
            experts.gate,
            top_k=router.top_k,
            score=router.score,
            normalise=router.normalise_weights,
            scale=router.weight_scale,
            activation=experts.activation,
        ).view_as(x)
        if self.norm is not None:
            y = self.norm(y).to(x.dtype)
        return y if self.shared is None else y + self.shared(x).x

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> tuple[()]:
        """Stateless."""
        del batch, capacity, dtype, device
        return ()
