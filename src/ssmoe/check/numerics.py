"""Whether every op of a backend computes what it should, in a second: against arithmetic in Python floats.

The sizes are small and odd, and such that every backend has a path for them.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.check import plain
from ssmoe.ops import Ops
from ssmoe.ops.reference.muon_step import Iteration
from ssmoe.ops.reference.route import Routed

TOLERANCE = 1e-5
"""Largest error of a float32 result relative to the largest float64 one."""
NARROW = 5e-2
"""The same for Muon, which multiplies in bfloat16 where that is native, on purpose."""

Draw = Callable[..., Tensor]


class Check(NamedTuple):
    """One op of one backend against a plain float64 computation."""

    backend: str
    op: str
    error: float
    tolerance: float = TOLERANCE

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.error <= self.tolerance


def self_check(ops: Ops, device: str) -> list[Check]:
    """Compare each of a backend's ops, in float32 on `device`, with arithmetic in Python floats."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    with torch.no_grad():
        errors = {
            **_sequences(ops, draw),
            **_experts(ops, draw),
            **_products(ops, draw),
            **_norm_and_head(ops, draw),
            **_mamba_step(ops, draw),
            "attention_step": _attention_step(ops, draw),
            "argmax": _argmax(ops, draw),
            "adamw_step": _adamw_step(ops, draw),
            "muon_step": _muon_step(ops, draw),
        }
    return [
        Check(ops.name, op, error, NARROW if op == "muon_step" else TOLERANCE) for op, error in errors.items()
    ]


def _sequences(ops: Ops, draw: Draw) -> dict[str, float]:
    x, delta, B, C, A = draw(1, 9, 3), draw(1, 9, 3), draw(1, 9, 4), draw(1, 9, 4), -draw(3, 4).exp()
    scan, _ = ops.selective_scan(x, delta, A, B, C)
    weight = draw(3, 4)
    conv, _ = ops.causal_conv1d(x, weight)
    return {
        "selective_scan": _error(scan[0], plain.scan(x[0], delta[0], A, B[0], C[0])),
        "causal_conv1d": _error(conv[0], plain.conv(x[0], weight)),
    }


def _experts(ops: Ops, draw: Draw) -> dict[str, float]:
    """Experts of chosen numbers, the choice itself, and both as one op."""
    x, up, down, matrix = draw(7, 6), draw(3, 5, 6), draw(3, 6, 5), draw(3, 6)
    expert = torch.tensor([0, 2, 2, -1, 0, 2, 0], dtype=torch.int32, device=x.device).view(7, 1)
    share, logits, bias = draw(7, 1).exp(), draw(7, 3), draw(3)
    real = torch.ones(7, dtype=torch.bool, device=x.device)
    routed = ops.route(logits, real, bias, top_k=2, score="sigmoid", normalise=True)
    step = ops.moe_step(
        x, matrix, bias, up, down, top_k=2, score="softmax", normalise=False, scale=1.5, activation="relu"
    )
    mixed = ops.expert_mlp(x, up, down, expert=expert, weight=share, activation="relu")
    mapped = ops.expert_linear(x, up, expert=expert, weight=share)
    chosen = plain.route(plain.sigmoid(logits), bias, 2, normalise=True)
    shares = plain.route(plain.softmax(plain.linear(x, matrix)), bias, 2, normalise=False)
    return {
        "expert_mlp": _error(mixed, plain.experts(x, up, down, plain.spread(expert, share, 3))),
        "expert_linear": _error(mapped, plain.maps(x, up, plain.spread(expert, share, 3))),
        "route": _error(_weights_and_load(routed), plain.with_load(chosen)),
        "moe_step": _error(step, plain.experts(x, up, down, [[1.5 * w for w in row] for row in shares])),
    }


def _weights_and_load(routed: Routed) -> Tensor:
    """(t + 1, e): each token's weight at each expert, then how many tokens each has."""
    t, e = routed.expert.shape[0], routed.load.shape[0]
    weights = routed.weight.new_zeros(t, e).scatter(1, routed.expert.long(), routed.weight)
    return torch.cat((weights, routed.load.to(weights.dtype).unsqueeze(0)))


def _products(ops: Ops, draw: Draw) -> dict[str, float]:
    x, weight = draw(7, 6), draw(5, 6)
    product = plain.linear(x, weight)
    both = [[*row, *plain.vector(old)] for row, old in zip(product, x, strict=True)]
    kept, forked = ops.fork_linear(x, weight)
    whole, widened = ops.fork_wide(x, weight)
    rows = [plain.vector(row) for row in x]
    return {
        "embedding": _error(ops.embedding(torch.arange(7, device=x.device), x), rows),
        "linear": _error(ops.linear(x, weight), product),
        "split_linear": _error(torch.cat(ops.split_linear(x, weight, (2, 3)), dim=1), product),
        "fork_linear": _error(torch.cat((forked, kept), dim=1), both),
        "wide_linear": _error(ops.wide_linear(x, weight), product),
        "fork_wide": _error(torch.cat((widened, whole), dim=1), both),
    }


def _norm_and_head(ops: Ops, draw: Draw) -> dict[str, float]:
    x, scale, matrix, shift = draw(7, 6), draw(6), draw(5, 6), draw(5)
    _, normed = ops.residual_norm(x, scale, scale, eps=1e-5, dtype=torch.float32)
    targets = torch.arange(7, device=x.device) % 5
    loss = ops.head_cross_entropy(x, matrix, shift, targets)
    added = [[a + b for a, b in zip(plain.vector(row), plain.vector(scale), strict=True)] for row in x]
    return {
        "residual_norm": _error(normed, plain.norm(x, scale, scale, 1e-5)),
        "residual_sum": _error(ops.residual_sum(x, scale.expand_as(x), dtype=torch.float32), added),
        "head_cross_entropy": _error(loss.view(1, 1), plain.cross_entropy(x, matrix, shift, targets)),
    }


def _mamba_step(ops: Ops, draw: Draw) -> dict[str, float]:
    """Two rows through a layer of 8 channels, 16 inside, 4 states, and through it twice."""
    d, inner, n, rank = 8, 16, 4, 2
    weights = {
        "norm_weight": draw(d),
        "in_proj": draw(2 * inner, d),
        "conv_weight": draw(inner, 4),
        "conv_bias": draw(inner),
        "x_proj": draw(rank + 2 * n, inner),
        "delta_proj": draw(inner, rank),
        "A_log": draw(inner, n),
        "D": draw(inner),
        "delta_bias": draw(inner),
        "out_proj": draw(d, inner),
    }
    x, window, state = draw(2, d), draw(2, inner, 3), draw(2, inner, n)
    once = plain.step(x, weights, window, state, 1e-5)
    twice = plain.step(torch.tensor(once), weights, window, state, 1e-5)
    y, _, _ = ops.mamba_step(x, **weights, norm_eps=1e-5, conv_state=window.clone(), ssm_state=state.clone())
    norm_weight, *rest = weights.values()
    z, _, _ = ops.mamba_steps(
        x,
        [(norm_weight, None, *rest)] * 2,
        norm_eps=1e-5,
        conv_states=[window.clone(), window.clone()],
        ssm_states=[state.clone(), state.clone()],
    )
    return {"mamba_step": _error(y, once), "mamba_steps": _error(z, twice)}


def _attention_step(ops: Ops, draw: Draw) -> float:
    """Two rows of different pasts, two heads of 8 channels, with rotary positions."""
    qkv, keys, values = draw(2, 48), draw(2, 2, 6, 8), draw(2, 2, 6, 8)
    length = torch.tensor([5, 2], device=qkv.device)
    expected = plain.attention(qkv, keys, values, [5, 2], 100.0)
    return _error(ops.attention_step(qkv, keys, values, length, rope_base=100.0), expected)


def _argmax(ops: Ops, draw: Draw) -> float:
    """Two equal largest numbers in one row, and a last column that is the largest in another."""
    x = draw(3, 9)
    x[0, 3] = x[0, 7] = 50.0
    x[1, 8] = 60.0
    found = ops.argmax(x).view(3, 1)
    return _error(found, [[float(max(range(9), key=row.__getitem__))] for row in map(plain.vector, x)])


def _adamw_step(ops: Ops, draw: Draw) -> float:
    value, gradient, mean, square = draw(2, 3), draw(2, 3), draw(2, 3), draw(2, 3).square()
    step, betas = torch.tensor(3.0, device=value.device), (0.9, 0.95)
    expected = plain.adamw(value, gradient, mean, square, 3, rate=0.1, betas=betas, eps=1e-8, decay=0.1)
    ops.adamw_step([value], [gradient], [mean], [square], [step], rate=0.1, betas=betas, eps=1e-8, decay=0.1)
    return _error(torch.cat((value, mean, square)), expected)


def _muon_step(ops: Ops, draw: Draw) -> float:
    """From zeros, so that what is compared is the update alone."""
    gradient, momentum = draw(4, 6), draw(4, 6)
    passes = (3.4445, -4.775, 2.0315), (1.875, -1.25, 0.375)
    expected = plain.muon(gradient, momentum, passes, rate=0.5, mu=0.9)
    value, iteration = torch.zeros_like(gradient).unsqueeze(0), Iteration(passes, tight=True)
    ops.muon_step(
        [value], [gradient.unsqueeze(0)], [momentum.unsqueeze(0)],
        rate=0.5, decay=0.1, mu=0.9, iteration=iteration,
    )  # fmt: skip
    return _error(value[0], expected)


def _error(found: Tensor, expected: plain.Rows) -> float:
    wanted = torch.tensor(expected, dtype=torch.float64)
    return float((found.double().cpu() - wanted).abs().max() / wanted.abs().max())
