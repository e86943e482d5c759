"""What this machine is and whether its kernels compute what they should."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from math import exp, log1p
from typing import NamedTuple

import torch
from torch import Tensor

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
        Check(ops.name, "selective_scan", _error(scan[0], _scan(x[0], delta[0], A, B[0], C[0]))),
        Check(ops.name, "causal_conv1d", _error(conv[0], _conv(x[0], weight))),
        Check(ops.name, "expert_mlp", _error(mixed, _experts(tokens, up, down, expert, share))),
        Check(ops.name, "expert_linear", _error(mapped, _maps(tokens, up, expert, share))),
        Check(ops.name, "linear", _error(ops.linear(tokens, up[0]), _linear(tokens, up[0]))),
    ]


def _error(found: Tensor, expected: list[list[float]]) -> float:
    wanted = torch.tensor(expected, dtype=torch.float64)
    return float((found.double().cpu() - wanted).abs().max() / wanted.abs().max())


def _scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> list[list[float]]:
    """(l, d): the recurrence, one number at a time."""
    d, n = A.shape
    h = [[0.0] * n for _ in range(d)]
    rows: list[list[float]] = []
    for t in range(x.shape[0]):
        row: list[float] = []
        for i in range(d):
            step = log1p(exp(float(delta[t, i])))
            for j in range(n):
                h[i][j] = exp(step * float(A[i, j])) * h[i][j] + step * float(B[t, j]) * float(x[t, i])
            row.append(sum(float(C[t, j]) * h[i][j] for j in range(n)))
        rows.append(row)
    return rows


def _conv(x: Tensor, weight: Tensor) -> list[list[float]]:
    """(l, d): each tap in turn, then SiLU."""
    taps = weight.shape[1]
    rows: list[list[float]] = []
    for t in range(x.shape[0]):
        sums = [
            sum(
                float(weight[i, j]) * float(x[t - taps + 1 + j, i])
                for j in range(taps)
                if t - taps + 1 + j >= 0
            )
            for i in range(x.shape[1])
        ]
        rows.append([value / (1 + exp(-value)) for value in sums])
    return rows


def _experts(x: Tensor, up: Tensor, down: Tensor, expert: Tensor, share: Tensor) -> list[list[float]]:
    """(t, d): each token through its one expert."""
    rows: list[list[float]] = []
    for t in range(x.shape[0]):
        e = int(expert[t, 0])
        if e < 0:
            rows.append([0.0] * x.shape[1])
            continue
        hidden = (up[e].double() @ x[t].double()).clamp(min=0)
        output = float(share[t, 0]) * (down[e].double() @ hidden)
        rows.append([float(value) for value in output])
    return rows


def _maps(x: Tensor, bank: Tensor, expert: Tensor, share: Tensor) -> list[list[float]]:
    """(t, d_out): each token through its one matrix."""
    rows: list[list[float]] = []
    for t in range(x.shape[0]):
        e = int(expert[t, 0])
        output = float(share[t, 0]) * (bank[e].double() @ x[t].double()) * (e >= 0)
        rows.append([float(value) for value in output])
    return rows


def _linear(x: Tensor, weight: Tensor) -> list[list[float]]:
    """(t, d_out): one product after another."""
    return [
        [sum(float(a) * float(b) for a, b in zip(row, column, strict=True)) for column in weight] for row in x
    ]


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
