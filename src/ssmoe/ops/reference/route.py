"""Token choice: the experts of each token, their weights, and the sums that say how balanced that is.

s = softmax(logits) or sigmoid(logits); a token takes the k experts of largest s + bias, with weights s or s
over the sum of the chosen. The formulas' sources are in `ssmoe.model.feedforwards.router`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

SMALLEST = 1e-20
"""What sums are divided by at least."""
_FEW = 16
"""Up to so many choices, taking the best one by one is quicker than sorting."""


class Routed(NamedTuple):
    """Choices of t tokens, and sums over the real ones.

    expert: (t, k) int32 by falling s + bias, -1 on padding. weight: (t, k), 0 on padding, differentiable.
    load: (e,) int64 assignments. shares: (e,) sums of each expert's probability, sigmoid scores made one by
    their sum; differentiable. z: () sum of logsumexp^2, differentiable. entropy, confidence: () sums of the
    probabilities' entropies in nats and of the largest probabilities, not differentiable.
    """

    expert: Tensor
    weight: Tensor
    load: Tensor
    shares: Tensor
    z: Tensor
    entropy: Tensor
    confidence: Tensor


def route(
    logits: Tensor, real: Tensor, bias: Tensor | None = None, *, top_k: int, score: str, normalise: bool
) -> Routed:
    """logits: (t, e), float32 or wider. real: (t,) bool, false on padding. bias: (e,), for the choice alone.

    score: "softmax" or "sigmoid". Of equal experts the lower number is taken.
    """
    scores = scores_of(logits, score)
    choice = scores if bias is None else scores + bias
    padding = ~real.unsqueeze(-1)
    expert = _top_k(choice.detach(), top_k)  # (t, k)
    weight = scores.gather(1, expert)
    if normalise:
        weight = weight / weight.sum(dim=-1, keepdim=True).clamp(min=SMALLEST)
    expert = expert.masked_fill(padding, -1)
    shares = scores if score == "softmax" else scores / scores.sum(-1, keepdim=True).clamp(min=SMALLEST)
    masked = shares * real.unsqueeze(-1)
    with torch.no_grad():
        entropy = -(masked * shares.clamp(min=1e-30).log()).sum()
        confidence = masked.amax(dim=-1).sum()
    return Routed(
        expert=expert.to(torch.int32),
        weight=weight.masked_fill(padding, 0),
        load=count(expert.flatten() + 1, logits.shape[1] + 1)[1:],
        shares=masked.sum(0),
        z=(logits.logsumexp(dim=-1).square() * real).sum(),
        entropy=entropy,
        confidence=confidence,
    )


def scores_of(logits: Tensor, score: str) -> Tensor:
    """(..., e) -> (..., e), positive."""
    return logits.softmax(dim=-1) if score == "softmax" else logits.sigmoid()


def count(values: Tensor, size: int) -> Tensor:
    """How often each of 0 to size - 1 occurs, without waiting for the device as bincount does."""
    ones = torch.ones_like(values)
    return torch.zeros(size, dtype=values.dtype, device=values.device).scatter_add_(0, values, ones)


def _top_k(scores: Tensor, k: int) -> Tensor:
    """(t, e) -> (t, k) experts by falling score; ties go to the lower expert number."""
    if k > _FEW:
        return scores.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    first = scores.argmax(dim=-1, keepdim=True)  # of equal ones the first
    chosen = [first]
    for _ in range(k - 1):
        scores = scores.scatter(1, chosen[-1], float("-inf"))
        chosen.append(scores.argmax(dim=-1, keepdim=True))
    return torch.cat(chosen, dim=-1)
