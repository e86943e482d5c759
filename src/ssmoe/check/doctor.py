"""What this machine is and whether its kernels compute what they should."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

import torch

from ssmoe.check.numerics import Check, self_check
from ssmoe.ops import BACKENDS, describe, load, missing, resolve

PACKAGES = ("ssmoe", "torch", "numpy", "triton", "safetensors", "tokenizers", "pydantic", "matplotlib")


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
