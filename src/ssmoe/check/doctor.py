"""What this machine is and whether its kernels compute what they should."""

import os
import platform
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.check import plain
from ssmoe.ops import BACKENDS, Ops, describe, load, missing, resolve

PACKAGES = ("ssmoe", "torch", "numpy", "triton", "safetensors", "tokenizers", "pydantic", "matplotlib")

TOLERANCE = 1e-5
"""Largest error of a float32 result relative to the largest float64 one."""


class Check(NamedTuple):
    """One op of one backend against a plain float64 computation."""

    backend: str
    op: str
    error: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.error <= TOLERANCE


class Diagnosis(NamedTuple):
    """versions: of packages, "not installed" where absent. backends: what "auto" means on a device type."""

    versions: dict[str, str]
    devices: list[str]
    threads: int
    backends: dict[str, str]
    checks: list[Check]

    @property
    def healthy(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)


def diagnose() -> Diagnosis:
    """Look at packages and devices and run every backend's self-check; about two seconds."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Diagnosis(
        versions={"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        devices=[f"cpu: {platform.machine()}, {os.cpu_count()} cores", *(f"cuda: {name}" for name in gpus)],
        threads=torch.get_num_threads(),
        backends={device: _auto(device) for device in ("cpu", *(["cuda"] if gpus else []))},
        checks=[
            check
            for backend in BACKENDS
            if not missing(backend) and (_device(backend) == "cpu" or gpus)
            for check in self_check(load(backend), _device(backend))
        ],
    )


def self_check(ops: Ops, device: str) -> list[Check]:
    """Compare a backend's ops in float32 on `device` with token-by-token arithmetic in Python floats."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    x, delta, B, C, A = draw(1, 9, 3), draw(1, 9, 3), draw(1, 9, 4), draw(1, 9, 4), -draw(3, 4).exp()
    scan, _ = ops.selective_scan(x, delta, A, B, C)
    weight = draw(3, 4)
    conv, _ = ops.causal_conv1d(x, weight)
    up, down, tokens = draw(3, 5, 6), draw(3, 6, 5), draw(7, 6)
    expert, share = torch.tensor([0, 2, 2, -1, 0, 2, 0], dtype=torch.int32).view(7, 1), draw(7, 1).exp()
    placed = expert.to(device)
    mixed = ops.expert_mlp(tokens, up, down, expert=placed, weight=share, activation="relu")
    mapped = ops.expert_linear(tokens, up, expert=placed, weight=share)
    return [
        Check(ops.name, "selective_scan", _error(scan[0], plain.scan(x[0], delta[0], A, B[0], C[0]))),
        Check(ops.name, "causal_conv1d", _error(conv[0], plain.conv(x[0], weight))),
        Check(ops.name, "expert_mlp", _error(mixed, plain.experts(tokens, up, down, expert, share))),
        Check(ops.name, "expert_linear", _error(mapped, plain.maps(tokens, up, expert, share))),
        Check(ops.name, "linear", _error(ops.linear(tokens, up[0]), plain.linear(tokens, up[0]))),
        *_check_norm_and_head(ops, tokens, up[0], draw(6), draw(5)),
        _check_step(ops, draw),
    ]


def _check_norm_and_head(ops: Ops, x: Tensor, matrix: Tensor, scale: Tensor, shift: Tensor) -> list[Check]:
    _, normed = ops.residual_norm(x, scale, scale, eps=1e-5, dtype=torch.float32)
    targets = torch.arange(x.shape[0], device=x.device) % matrix.shape[0]
    loss = ops.head_cross_entropy(x, matrix, shift, targets)
    return [
        Check(ops.name, "residual_norm", _error(normed, plain.norm(x, scale, scale, 1e-5))),
        Check(
            ops.name,
            "head_cross_entropy",
            _error(loss.view(1, 1), plain.cross_entropy(x, matrix, shift, targets)),
        ),
    ]


def _check_step(ops: Ops, draw: Callable[..., Tensor]) -> Check:
    """Two rows through a layer of 8 channels, 16 inside, 4 states: the sizes every backend has a path for."""
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
    with torch.no_grad():
        y, _, _ = ops.mamba_step(x, **weights, norm_eps=1e-5, conv_state=window, ssm_state=state)
    return Check(ops.name, "mamba_step", _error(y, plain.step(x, weights, window, state, 1e-5)))


def _error(found: Tensor, expected: list[list[float]]) -> float:
    wanted = torch.tensor(expected, dtype=torch.float64)
    return float((found.double().cpu() - wanted).abs().max() / wanted.abs().max())


def _device(backend: str) -> str:
    """Where a backend's kernels run."""
    return "cuda" if backend == "triton" else "cpu"


def _auto(device: str) -> str:
    """What "auto" means on a device, and why."""
    try:
        backend = resolve("auto", device)
    except ValueError as error:
        return str(error)
    match backend:
        case "cpu":
            details = ", ".join(f"{key} {value}" for key, value in describe(backend).items())
            return f"cpu, for every op ({details})"
        case "reference":
            return f"reference, for every op, and slow: {missing(device)}"
        case _:
            return f"{backend}, for every op"


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
