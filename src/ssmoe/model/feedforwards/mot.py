"""Mixture of Tokens: an expert works on one mixture of a group of tokens (arXiv 2310.15961, section 3).

w_ie = softmax_i((W x_i)_e / T) over the tokens i of a group; y_i = sum_e w_ie FFN_e(sum_j w_je x_j)
"""

from typing import Literal

import torch
from torch import Tensor, nn

from ssmoe.model.feedforwards.moe import Experts
from ssmoe.model.feedforwards.router import Router, real_tokens
from ssmoe.model.init import init_weights
from ssmoe.model.layer import LayerOut
from ssmoe.ops import Segments


class MixtureOfTokens(nn.Module):
    """A feed-forward layer over mixtures, without norm and residual. x: (b, l, d_model) -> (b, l, d_model).

    A group is `group` rows at one position, rows i, i + b / group, i + 2 b / group, ..., or with axis
    "sequence" `group` neighbours in a row. In mode "token_choice" it is an `MoE` of the same weights. The
    statistics are those of token choice in both modes: they say how ready a mixture is for the transition.
    """

    def __init__(
        self,
        *,
        router: Router,
        experts: Experts,
        group: int = 32,
        axis: Literal["batch", "sequence"] = "batch",
        temperature: float = 1.0,
        mode: Literal["mixture", "token_choice"] = "mixture",
    ) -> None:
        super().__init__()
        self.group, self.axis, self.temperature, self.mode = group, axis, temperature, mode
        self.router = router
        self.experts = experts
        init_weights(self)

    @property
    def batch_dependent(self) -> bool:
        """As token choice, or in a group of its own, each token is alone."""
        return self.mode == "mixture" and self.group > 1

    def forward(
        self, x: Tensor, state: tuple[()] | None = None, segments: Segments | None = None
    ) -> LayerOut:
        """Raises ValueError for rows (or, along the sequence, a length) that do not fill whole groups."""
        del state
        if self.mode == "token_choice":
            routing = self.router(x, segments)
            y = self.experts(x.reshape(-1, x.shape[-1]), routing.expert, routing.weight)
            return LayerOut(y.view_as(x), (), routing.stats)
        logits, real = self.router.logits(x), real_tokens(x, segments)
        routing = self.router.choose(logits, real)
        # (g, groups, d), (g, groups, e)
        tokens, grouped, present = (self._group(t) for t in (x, logits, real.unsqueeze(-1)))
        # padding is mixed into nothing; a group of padding alone gives zero
        weight = (grouped / self.temperature).masked_fill(~present, -1e30).softmax(dim=0) * present
        y = self._ungroup(self._mix(tokens, weight.to(x.dtype)), x)
        return LayerOut(y, (), routing.stats._replace(balance=torch.zeros_like(routing.stats.balance)))

    def _mix(self, tokens: Tensor, weight: Tensor) -> Tensor:
        """tokens: (g, p, d), weight: (g, p, e) -> (g, p, d)"""
        mixtures = torch.einsum("gpd,gpe->ped", tokens, weight)
        p, e, d = mixtures.shape
        expert = torch.arange(e, dtype=torch.int32, device=tokens.device).repeat(p).unsqueeze(1)
        ones = torch.ones(p * e, 1, device=tokens.device, dtype=self.router.weight.dtype)
        outputs = self.experts(mixtures.view(p * e, d), expert, ones)
        return torch.einsum("ped,gpe->gpd", outputs.view(p, e, d), weight)

    def _group(self, values: Tensor) -> Tensor:
        """(b, l, n) -> (g, b * l / g, n)"""
        b, length, n = values.shape
        whole, what = (b, "rows") if self.axis == "batch" else (length, "positions")
        if whole % self.group:
            raise ValueError(
                f"{whole} {what} do not fill groups of {self.group}: give a multiple of {self.group}, or set "
                f'group=1 or mode="token_choice"'
            )
        if self.axis == "batch":
            return values.reshape(self.group, -1, n)
        return values.reshape(-1, self.group, n).transpose(0, 1)

    def _ungroup(self, values: Tensor, x: Tensor) -> Tensor:
        return (values if self.axis == "batch" else values.transpose(0, 1)).reshape(x.shape)

    def init_state(self, batch: int, capacity: int, dtype: torch.dtype, device: torch.device) -> tuple[()]:
        """Stateless."""
        del batch, capacity, dtype, device
        return ()
