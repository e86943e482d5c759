"""The router: which experts a token goes to, with what weight, and what that says about balance.

s = softmax(W x) or sigmoid(W x); a token takes the k experts of largest s + bias with weights s (Switch,
arXiv 2101.03961, section 2.1), or s over the sum of the chosen (Mixtral, DeepSeek-V3).
Balance loss: E sum_e f_e P_e, f_e the share of assignments, P_e the mean of s_e / sum s (equations 4 to 6).
Loss-free balance: the bias moves against the load once an optimiser step (arXiv 2408.15664, algorithm 1).
z-loss: mean of logsumexp(W x)^2 (ST-MoE, arXiv 2202.08906, equation 5).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmoe.config.model import Balance, BiasUpdate, Score
from ssmoe.model.init import init_weights
from ssmoe.model.layer import RouterStats
from ssmoe.model.norm import Float32Module
from ssmoe.ops import Ops, Segments, load
from ssmoe.ops.reference.route import Routed, count, scores_of


class Routing(NamedTuple):
    """expert: (t, k) int32, -1 where dropped or padding. weight: (t, k), at least float32.

    x: what was routed, where known. Going on with it adds its gradients where they are made.
    """

    expert: Tensor
    weight: Tensor
    stats: RouterStats
    x: Tensor | None = None


class Router(Float32Module):
    """Token choice, scored in float32 or wider. Dropless in eval mode and without a `capacity_factor`.

    The arguments are those of `MoEConfig`; num_experts and top_k are the bank's. ops: by default the
    definitions.
    """

    bias: Tensor | None

    def __init__(
        self,
        d_model: int,
        *,
        num_experts: int,
        top_k: int = 1,
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
        self.ops = ops or load("reference")
        self.num_experts, self.top_k, self.capacity_factor = num_experts, top_k, capacity_factor
        self.score, self.normalise_weights, self.weight_scale = score, normalise_weights, weight_scale
        self.balance_coefficient = balance_coefficient if balance == "auxiliary" else 0.0
        self.bias_update, self.bias_rate = bias_update, bias_rate
        self.z_coefficient, self.jitter = z_coefficient, jitter
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        # saved with the weights, moved by `rebalance` alone
        self.register_buffer("bias", torch.zeros(num_experts) if balance == "bias" else None)
        init_weights(self)

    def forward(self, x: Tensor, segments: Segments | None = None) -> Routing:
        """x: (b, l, d_model) -> Routing of t = b * l tokens."""
        tokens = x.shape[0] * x.shape[1] if segments is None else None
        if self.training and self.jitter > 0:
            logits = self.logits(x)
        else:
            x, logits = self.ops.fork_wide(x, self.weight)
        return self.choose(logits, real_tokens(x, segments), tokens)._replace(x=x)

    def choose(self, logits: Tensor, real: Tensor, tokens: int | None = None) -> Routing:
        """logits: (b, l, e). real: (b, l) bool, false on padding. tokens: how many are real, where known."""
        b, length, _ = logits.shape
        routed = self.sums(logits, real)
        expert = kept = routed.expert  # (t, k)
        if self.training and self.capacity_factor is not None:
            kept = self._drop(expert.long(), b, length, real).to(torch.int32)
        dropped = routed.load.new_zeros(()) if kept is expert else (expert != kept).sum()
        stats = self.statistics(routed, real, routed.load, dropped, tokens)
        weight = routed.weight if self.weight_scale == 1 else routed.weight * self.weight_scale
        return Routing(kept, weight, stats)

    def sums(self, logits: Tensor, real: Tensor) -> Routed:
        """logits: (b, l, e). real: (b, l). The choices and what `statistics` needs."""
        return self.ops.route(
            logits.reshape(-1, logits.shape[-1]),
            real.reshape(-1),
            self.bias,
            top_k=self.top_k,
            score=self.score,
            normalise=self.normalise_weights,
        )

    def logits(self, x: Tensor) -> Tensor:
        """x: (..., d_model) -> (..., e) in float32 or wider, with jitter in training."""
        if self.training and self.jitter > 0:
            x = x.to(self.weight.dtype)
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        return self.ops.wide_linear(x, self.weight)

    def scores(self, logits: Tensor) -> Tensor:
        """(..., e) -> (..., e), positive."""
        return scores_of(logits, self.score)

    @torch.no_grad()
    def rebalance(self, load: Tensor) -> None:
        """Move the bias, if there is one, against `load` (e,), the assignments of a whole optimiser step.

        Its mean is then taken off, which changes no choice and keeps it from drifting.
        """
        if self.bias is None:
            return
        counts = load.to(self.bias.dtype)
        error = counts.mean() - counts
        step = error.sign() if self.bias_update == "sign" else error / counts.mean().clamp(min=1)
        self.bias.add_(step, alpha=self.bias_rate)
        self.bias.sub_(self.bias.mean())

    def _drop(self, expert: Tensor, b: int, length: int, real: Tensor) -> Tensor:
        """Tokens claim room in the order (position, row, rank), so that no later position displaces one."""
        assert self.capacity_factor is not None
        capacity = torch.floor(
            real.sum().to(torch.float64) * self.capacity_factor * self.top_k / self.num_experts
        )
        claims = expert.view(b, length, self.top_k).transpose(0, 1).reshape(-1)
        order = torch.argsort(claims, stable=True)
        counts = count(claims + 1, self.num_experts + 1)
        begin = (counts.cumsum(0) - counts)[claims[order] + 1]
        place = torch.empty_like(claims)
        place[order] = torch.arange(claims.numel(), device=claims.device) - begin
        claims = claims.masked_fill(place >= capacity, -1)
        return claims.view(length, b, self.top_k).transpose(0, 1).reshape(-1, self.top_k)

    def statistics(
        self, routed: Routed, real: Tensor, load: Tensor, dropped: Tensor, tokens: int | None = None
    ) -> RouterStats:
        """What happened to tokens that are real (...), of which the experts got `load` (e,).

        tokens: how many are real, where the host knows it, which saves a GPU many small kernels.
        """
        share = 1 / real.sum().clamp(min=1).to(routed.shares.dtype) if tokens is None else 1 / max(1, tokens)
        # the fractions of assignments and of probability, each over all tokens
        balance = (load * routed.shares).sum()
        return RouterStats(
            balance=balance * (self.balance_coefficient * self.num_experts / self.top_k * share * share),
            z=routed.z * (self.z_coefficient * share) if self.z_coefficient else torch.zeros_like(routed.z),
            load=load,
            dropped=dropped,
            confidence=routed.confidence * share,
            entropy=routed.entropy * share,
        )


def real_tokens(x: Tensor, segments: Segments | None) -> Tensor:
    """(b, l) bool, false on padding."""
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if segments is None else segments.real


def rebalance(layer: nn.Module, load: Tensor) -> None:
    """Give every router of `layer` its row of `load` (e,) or (r, e), the assignments of an optimiser step."""
    routers = [module for module in layer.modules() if isinstance(module, Router)]
    for router, counts in zip(routers, load.reshape(-1, load.shape[-1]), strict=True):
        router.rebalance(counts)
