"""Expert choice: experts take the tokens that score highest with them (arXiv 2202.09368).

Tokens compete with those at the same position of the other rows (arXiv 2402.07871, section 5), so that no
later position has a say, or, opted in, with all tokens of the batch.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ssmoe.model.feedforwards.moe import Experts
from ssmoe.model.feedforwards.router import Router, Routing, real_tokens
from ssmoe.model.init import init_weights
from ssmoe.model.layer import LayerOut, RouterStats
from ssmoe.model.norm import LayerNorm
from ssmoe.ops import Segments


class ExpertChoice(nn.Module):
    """A mixture of experts in which experts choose, without norm and residual.

    x: (b, l, d_model) -> (b, l, d_model). Of a group of n real tokens each of the bank's e experts takes
    floor(n * k / e), at least one, k = router.top_k. In mode "token_choice" it is an `MoE`.
    """

    def __init__(
        self,
        d_model: int,
        *,
        router: Router,
        experts: Experts,
        output_norm: bool = False,
        group: Literal["position", "batch"] = "position",
        mode: Literal["expert_choice", "token_choice"] = "expert_choice",
    ) -> None:
        super().__init__()
        self.group, self.mode = group, mode
        self.router = router
        self.experts = experts
        self.norm = LayerNorm(d_model, 1e-5) if output_norm else None
        init_weights(self)

    @property
    def batch_dependent(self) -> bool:
        """As token choice each token is alone."""
        return self.mode == "expert_choice"

    def forward(
        self, x: Tensor, state: tuple[()] | None = None, segments: Segments | None = None
    ) -> LayerOut:
        """Each real token through the experts that took it; one that nobody took gives zero, before norm."""
        del state
        flat = x.reshape(-1, x.shape[-1])
        if self.mode == "token_choice":
            routing = self.router(x, segments)
            y = self.experts(flat, routing.expert, routing.weight)
            stats = routing.stats
        else:
            token, routing = self._take(x, segments)
            taken = self.experts(flat[token], routing.expert, routing.weight)
            y, stats = torch.zeros_like(flat).index_add(0, token, taken), routing.stats
        y = y.view_as(x)
        if self.norm is not None:
            y = self.norm(y).to(x.dtype)
        return LayerOut(y, (), stats)

    def _take(self, x: Tensor, segments: Segments | None) -> tuple[Tensor, Routing]:
        """The tokens (m,) int64 that were taken and by whom: a Routing of m tokens and one expert each."""
        b, length, _ = x.shape
        logits, real = self.router.logits(x), real_tokens(x, segments)  # (b, l, e), (b, l)
        scores = self.router.scores(logits)
        tokens = torch.arange(b * length, device=x.device).view(b, length)
        if self.group == "batch":
            grouped, present, tokens = scores.flatten(0, 1).unsqueeze(0), real.view(1, -1), tokens.view(1, -1)
        else:
            grouped, present, tokens = scores.transpose(0, 1), real.t(), tokens.t()  # (l, b, e), (l, b)
        num_groups, size, e = grouped.shape
        most = max(1, size * self.router.top_k // e)
        comparable = grouped.detach().masked_fill(~present.unsqueeze(-1), -1)
        order = comparable.sort(dim=1, descending=True, stable=True).indices[:, :most]  # (groups, most, e)
        room = (present.sum(1) * self.router.top_k // e).clamp(min=1).view(-1, 1, 1)
        rank = torch.arange(most, device=x.device).view(1, -1, 1)
        there = present.unsqueeze(-1).expand(-1, -1, e).gather(1, order) & (rank < room)
        expert = torch.arange(e, device=x.device).expand(num_groups, most, e).masked_fill(~there, -1)
        weight = grouped.gather(1, order) * self.router.weight_scale
        token = tokens.unsqueeze(-1).expand(-1, -1, e).gather(1, order).flatten()
        stats = self._statistics(logits, real, token, there)
        return token, Routing(expert.reshape(-1, 1).to(torch.int32), weight.reshape(-1, 1), stats)

    def _statistics(self, logits: Tensor, real: Tensor, token: Tensor, there: Tensor) -> RouterStats:
        load = there.sum((0, 1))
        times_taken = torch.zeros_like(real.flatten(), dtype=torch.int64)
        times_taken = times_taken.scatter_add_(0, token, there.flatten().long())
        dropped = (real.flatten() & (times_taken == 0)).sum()
        stats = self.router.statistics(self.router.sums(logits, real), real, load, dropped)
        return stats._replace(balance=torch.zeros_like(stats.balance))

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> tuple[()]:
        """Stateless."""
        del batch, capacity, dtype, device
        return ()
