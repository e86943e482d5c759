"""A Mamba block in which projections are mixtures of experts.

Either as in arXiv 2401.04081, section 5.2 and table 3 (two-layer experts, a router for each projection), or
as RoM, arXiv 2506.18145 (linear experts, one routing decision for the block), or the other two combinations.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmoe.config.model import Projection
from ssmoe.model.feedforwards.router import Router, Routing
from ssmoe.model.init import init_weights
from ssmoe.model.layer import LayerOut, RouterStats
from ssmoe.model.mixers.mamba import Conv, MambaState
from ssmoe.model.mixers.scan import SSMParameters, scan
from ssmoe.model.norm import Linear
from ssmoe.ops import Ops, Segments


class LinearExperts(nn.Module):
    """A bank of linear maps. weight: (e, d_out, d_in)."""

    def __init__(self, d_in: int, d_out: int, *, num_experts: int, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.weight = nn.Parameter(torch.empty(num_experts, d_out, d_in))

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        """x: (t, d_in), expert: (t, k) int32, weight: (t, k) -> (t, d_out)"""
        return self.ops.expert_linear(x, self.weight, expert=expert, weight=weight)


class NetworkExperts(nn.Module):
    """A bank of two-layer ReLU networks. up: (e, d_expert, d_in). down: (e, d_out, d_expert)."""

    def __init__(
        self, d_in: int, d_out: int, *, num_experts: int, d_expert: int, squared: bool, ops: Ops
    ) -> None:
        super().__init__()
        self.ops, self.squared = ops, squared
        self.up = nn.Parameter(torch.empty(num_experts, d_expert, d_in))
        self.down = nn.Parameter(torch.empty(num_experts, d_out, d_expert))

    def forward(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        """x: (t, d_in), expert: (t, k) int32, weight: (t, k) -> (t, d_out)"""
        t, k = expert.shape
        each, ones = expert.reshape(-1, 1), torch.ones_like(weight).reshape(-1, 1)
        hidden = F.relu(
            self.ops.expert_linear(x.repeat_interleave(k, dim=0), self.up, expert=each, weight=ones)
        )
        if self.squared:
            hidden = hidden.square()
        y = self.ops.expert_linear(hidden, self.down, expert=each, weight=weight.reshape(-1, 1))
        return y.view(t, k, -1).sum(1)


class MambaExperts(nn.Module):
    """A Mamba mixer with experts, without norm and residual. x: (b, l, d_model) -> (b, l, d_model).

    projections: what each of conv, gate and out is, a Linear or a bank of experts. routers: one for each
    bank, "for_conv" and so on, or one alone, "shared", which decides on the block's input for all. A shared
    decision weighs the block once: the routing weights multiply the out projection where it has experts.
    """

    batch_dependent = False

    def __init__(
        self,
        *,
        d_inner: int,
        d_state: int,
        d_conv: int,
        dt_rank: int,
        delta_range: tuple[float, float],
        projections: Mapping[Projection, Linear | LinearExperts | NetworkExperts],
        routers: Mapping[str, Router],
        learned_state: bool = False,
        ops: Ops,
    ) -> None:
        super().__init__()
        self.ops, self.d_inner = ops, d_inner
        self.d_state, self.d_conv, self.dt_rank = d_state, d_conv, dt_rank
        self.conv_proj, self.gate_proj = projections["conv"], projections["gate"]
        self.out_proj = projections["out"]
        self.routers = nn.ModuleDict(routers)
        self.conv = Conv(d_inner, d_conv)
        self.x_proj = Linear(d_inner, dt_rank + 2 * d_state)
        self.delta_proj = Linear(dt_rank, d_inner)
        self.ssm = SSMParameters(d_inner, d_state, delta_range, learned_state=learned_state)
        init_weights(self)

    def forward(
        self, x: Tensor, state: MambaState | None = None, segments: Segments | None = None
    ) -> LayerOut:
        """Mix along l; `state` None is `init_state`."""
        conv, ssm = (None, None) if state is None else state
        taken: dict[str, Routing] = {}
        if "shared" in self.routers:
            taken["shared"] = self.routers["shared"](x, segments)
        inner = self._project("conv", self.conv_proj, x, taken, segments)
        z = self._project("gate", self.gate_proj, x, taken, segments)
        inner, conv = self.ops.causal_conv1d(
            inner, self.conv.weight, self.conv.bias, initial_state=conv, segments=segments
        )
        delta, B, C = self.x_proj(inner).split((self.dt_rank, self.d_state, self.d_state), dim=-1)
        y, ssm = scan(
            self.ops, self.ssm, inner, self.delta_proj(delta), B, C, z, state=ssm, segments=segments
        )
        y = self._project("out", self.out_proj, y, taken, segments)
        stats = [taken[name].stats for name in self.routers]
        return LayerOut(y, MambaState(conv, ssm), _join(stats))

    def _project(
        self,
        name: Projection,
        projection: nn.Module,
        x: Tensor,
        taken: dict[str, Routing],
        segments: Segments | None,
    ) -> Tensor:
        """Through a plain projection, or through the experts that the name's router chooses."""
        if isinstance(projection, Linear):
            return projection(x)
        if "shared" not in self.routers:
            taken[f"for_{name}"] = self.routers[f"for_{name}"](x, segments)
        routing = taken["shared" if "shared" in taken else f"for_{name}"]
        weight = routing.weight
        if "shared" in taken and name != "out" and not isinstance(self.out_proj, Linear):
            weight = torch.full_like(weight, 1 / weight.shape[-1])
        y: Tensor = projection(x.reshape(-1, x.shape[-1]), routing.expert, weight)
        return y.view(*x.shape[:-1], -1)

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> MambaState:
        """Zeros and the scan's initial state; the size does not depend on `capacity`."""
        del capacity
        wide = torch.promote_types(dtype, torch.float32)
        return MambaState(
            torch.zeros(batch, self.d_inner, self.d_conv - 1, dtype=dtype, device=device),
            self.ssm.start(batch, wide, device),
        )


def _join(stats: Sequence[RouterStats]) -> RouterStats:
    """Losses and drops added up, loads stacked (r, e), the others averaged."""
    if len(stats) == 1:
        return stats[0]
    return RouterStats(
        balance=torch.stack([s.balance for s in stats]).sum(),
        z=torch.stack([s.z for s in stats]).sum(),
        load=torch.stack([s.load for s in stats]),
        dropped=torch.stack([s.dropped for s in stats]).sum(),
        confidence=torch.stack([s.confidence for s in stats]).mean(),
        entropy=torch.stack([s.entropy for s in stats]).mean(),
    )
