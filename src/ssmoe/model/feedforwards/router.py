"""The router: which experts a token goes to, with what weight, and what that says about balance.

p = softmax(W x); a token takes its top k experts with weights p (Switch, arXiv 2101.03961, section 2.1).
Balance loss: E sum_e f_e P_e, f_e the share of assignments, P_e the mean probability (equations 4 to 6).
z-loss: mean of logsumexp(W x)^2 (ST-MoE, arXiv 2202.08906, equation 5).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmoe.model.init import init_weights
from ssmoe.model.layer import RouterStats
from ssmoe.model.norm import Float32Module
from ssmoe.ops import Segments


class Routing(NamedTuple):
    """expert: (t, k) int32, -1 where dropped or padding. weight: (t, k), at least float32."""

    expert: Tensor
    weight: Tensor
    stats: RouterStats


class Router(Float32Module):
    """Token choice, scored in float32 or wider. Dropless in eval mode and without a `capacity_factor`."""

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int = 1,
        capacity_factor: float | None = None,
        balance_coefficient: float = 0.01,
        z_coefficient: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.capacity_factor = num_experts, top_k, capacity_factor
        self.balance_coefficient, self.z_coefficient = balance_coefficient, z_coefficient
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        init_weights(self)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Routing:
        """x: (b, l, d_model) -> Routing of t = b * l tokens."""
        b, length, d_model = x.shape
        logits = F.linear(x.reshape(-1, d_model).to(self.weight.dtype), self.weight)  # (t, e)
        real = torch.ones(b, length, dtype=torch.bool, device=x.device) if segments is None else segments.real
        probabilities = logits.softmax(dim=-1)
        expert = _top_k(probabilities, self.top_k).masked_fill(~real.reshape(-1, 1), -1)  # (t, k)
        weight = probabilities.gather(1, expert.clamp(min=0))
        kept = expert
        if self.training and self.capacity_factor is not None:
            kept = self._drop(expert, b, length, real)
        stats = self._stats(logits, probabilities, expert, kept, real.reshape(-1))
        return Routing(kept.to(torch.int32), weight, stats)

    def _drop(self, expert: Tensor, b: int, length: int, real: Tensor) -> Tensor:
        """Tokens claim room in the order (position, row, rank), so that no later position displaces one."""
        assert self.capacity_factor is not None
        capacity = torch.floor(
            real.sum().to(torch.float64) * self.capacity_factor * self.top_k / self.num_experts
        )
        claims = expert.view(b, length, self.top_k).transpose(0, 1).reshape(-1)
        order = torch.argsort(claims, stable=True)
        counts = torch.bincount(claims + 1, minlength=self.num_experts + 1)
        begin = (counts.cumsum(0) - counts)[claims[order] + 1]
        place = torch.empty_like(claims)
        place[order] = torch.arange(claims.numel(), device=claims.device) - begin
        claims = claims.masked_fill(place >= capacity, -1)
        return claims.view(length, b, self.top_k).transpose(0, 1).reshape(-1, self.top_k)

    def _stats(
        self, logits: Tensor, probabilities: Tensor, expert: Tensor, kept: Tensor, real: Tensor
    ) -> RouterStats:
        tokens = real.sum().clamp(min=1)
        masked = probabilities * real.unsqueeze(-1)
        load = torch.bincount(expert.flatten() + 1, minlength=self.num_experts + 1)[1:]
        share = load.to(masked.dtype) / (tokens * self.top_k)
        balance = self.num_experts * (share * (masked.sum(0) / tokens)).sum()
        z = (logits.logsumexp(dim=-1).square() * real).sum() / tokens
        with torch.no_grad():
            entropy = -(masked * probabilities.clamp(min=1e-30).log()).sum() / tokens
            confidence = masked.amax(dim=-1).sum() / tokens
        return RouterStats(
            balance=self.balance_coefficient * balance,
            z=self.z_coefficient * z,
            load=load,
            dropped=(expert != kept).sum(),
            confidence=confidence,
            entropy=entropy,
        )


def _top_k(probabilities: Tensor, k: int) -> Tensor:
    """(t, e) -> (t, k) experts by falling probability; ties go to the lower expert number."""
    if k == 1:
        return probabilities.argmax(dim=-1, keepdim=True)
    return probabilities.sort(dim=-1, descending=True, stable=True).indices[:, :k]
