"""Memories of several texts into one: mean, weighted mean, sum, norm kept, in sequence, in no order.

Scan states are mixed; a convolution's window means nothing when it is, so it is the last memory's.
"""

from collections.abc import Callable, Sequence
from math import comb, isfinite
from typing import Literal, get_args

import torch
from torch import Tensor

from ssmoe.model.lm import LM
from ssmoe.model.mixers.mamba import MambaState
from ssmoe.soup.capture import Memory, beginnings, scan_state, transitions

Method = Literal["mean", "sum", "norm-kept", "decay", "any-order"]
METHODS: tuple[str, ...] = get_args(Method)


def mix(
    model: LM, memories: Sequence[Memory], method: Method = "mean", weights: Sequence[float] | None = None
) -> Memory:
    """One memory of all.

    mean, sum: of the scan states; `weights` are for mean only and need not add up to 1. norm-kept: the mean,
    scaled in each layer and row to the mean of the norms. decay: the texts in the given order, each decayed
    by all that follow it. any-order: the mean of decay over all orders. A learned initial state counts once
    in each of these. Raises ValueError for no memories, an unknown method, or weights that do not fit.
    """
    if not memories:
        raise ValueError("there is nothing to mix: give at least one memory")
    if method not in METHODS:
        raise ValueError(f"method={method!r} is not one of: {', '.join(METHODS)}")
    if weights is not None and (
        method != "mean" or len(weights) != len(memories) or not isfinite(sum(weights)) or sum(weights) == 0
    ):
        raise ValueError(
            f"{len(weights)} weights {list(weights)} for {method} of {len(memories)} memories: give one a "
            "memory, finite and not adding up to 0, and only with mean"
        )
    shares = [1.0] * len(memories) if weights is None else list(weights)
    shares = [share / sum(shares) for share in shares]
    rules: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "mean": lambda h, _: _weighted(h, shares),
        "sum": _sum,
        "norm-kept": lambda h, _: _norm_kept(h),
        "decay": _in_sequence,
        "any-order": _in_any_order,
    }
    return _mix(model, memories, rules[method], total=method in {"sum", "decay", "any-order"})


def _mix(
    model: LM, memories: Sequence[Memory], rule: Callable[[Tensor, Tensor], Tensor], *, total: bool
) -> Memory:
    layers: list[tuple[Tensor, ...]] = []
    steps: list[Tensor | None] = []
    for i, (A, beginning) in enumerate(zip(transitions(model), beginnings(model), strict=True)):
        if A is None:
            layers.append(())
            steps.append(None)
            continue
        states = torch.stack([scan_state(memory, i).ssm for memory in memories])  # (k, b, d, n)
        taken = torch.stack([_steps(memory, i) for memory in memories])  # (k, b, d)
        decay = torch.exp(taken.unsqueeze(-1) * A)
        if beginning is None or not total:
            mixed = rule(states, decay)
        else:
            # what the texts add to their beginning is mixed, and the beginning itself is there once
            rest = torch.ones_like(decay[0]) if rule is _sum else decay.prod(0)
            mixed = rule(states - decay * beginning, decay) + rest * beginning
        layers.append(MambaState(scan_state(memories[-1], i).conv, mixed))
        steps.append(taken.sum(0) if total else taken.mean(0))
    return Memory(tuple(layers), tuple(steps), sum(memory.tokens for memory in memories))


def _steps(memory: Memory, layer: int) -> Tensor:
    found = memory.steps[layer]
    if found is None:
        raise ValueError(f"the memory has no steps for layer {layer}: it is of another model")
    return found


def _weighted(h: Tensor, shares: Sequence[float]) -> Tensor:
    return torch.stack([share * state for share, state in zip(shares, h, strict=True)]).sum(0)


def _sum(h: Tensor, decay: Tensor) -> Tensor:
    del decay
    return h.sum(0)


def _norm_kept(h: Tensor) -> Tensor:
    mean = h.mean(0)  # (b, d, n)
    wanted = h.flatten(2).square().sum(-1).sqrt().mean(0)  # (b,)
    found = mean.flatten(1).square().sum(-1).sqrt()
    return mean * (wanted / found.clamp(min=1e-30))[:, None, None]


def _in_sequence(h: Tensor, decay: Tensor) -> Tensor:
    mixed = h[0]
    for state, after in zip(h[1:], decay[1:], strict=True):
        mixed = after * mixed + state
    return mixed


def _in_any_order(h: Tensor, decay: Tensor) -> Tensor:
    """Others come after text i as each set of k with probability 1 / (n comb(n - 1, k)) (PICASO, 2502.17605).

    So its weight is the sum over k of the others' elementary symmetric polynomial of degree k times that.
    """
    n = len(h)
    mixed = torch.zeros_like(h[0])
    for i in range(n):
        polynomials = [torch.ones_like(h[0]), *[torch.zeros_like(h[0]) for _ in range(n - 1)]]
        for j in (j for j in range(n) if j != i):
            for k in range(n - 1, 0, -1):
                polynomials[k] = polynomials[k] + decay[j] * polynomials[k - 1]
        weight = torch.stack([p / (n * comb(n - 1, k)) for k, p in enumerate(polynomials)]).sum(0)
        mixed = mixed + weight * h[i]
    return mixed
