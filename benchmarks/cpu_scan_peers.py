"""The scans of other packages as (x, delta, A, B, C, D) -> y, softplus of delta included."""

import importlib
import importlib.metadata
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """One row of the table; `missing` says why there is nothing to time."""

    name: str
    scan: Scan | None = None
    missing: str = ""
    backward: bool = True
    slow_start: bool = False  # compiles first: timed only when asked for
    channels_first: bool = False  # wants x and delta to lie as (b, d, l)

    def arrange(self, args: list[Tensor]) -> list[Tensor]:
        """The inputs as this peer gets them from its own layer."""
        if not self.channels_first:
            return args
        return [t.mT.contiguous().mT for t in args[:2]] + args[2:]


def _mambapy() -> Scan:
    pscan = importlib.import_module("mambapy.pscan").pscan

    def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        step = F.softplus(delta).unsqueeze(-1)
        states = pscan(torch.exp(step * A), step * B.unsqueeze(2) * x.unsqueeze(-1))
        return (states @ C.unsqueeze(-1)).squeeze(3) + D * x

    return scan


def _torchmamba() -> Scan:
    loop = importlib.import_module("torchmamba.mamba1.core").selective_scan_loop

    def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        return loop(x, F.softplus(delta), A, B, C, D)[0]

    return scan


def _transformers(mambapy: bool = False, compiled: bool = False) -> Scan:
    """The scan of MambaMixer; `channels_first` inputs make its transposes views, so no copy is timed."""
    inner = importlib.import_module("transformers.models.mamba.modeling_mamba").mamba_selective_scan
    if mambapy:
        importlib.import_module("mambapy.pscan")

    def scan(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
        y = inner(
            x.transpose(1, 2), delta.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2), D,
            delta_softplus=True, use_mambapy=mambapy, use_associative_scan=compiled,
        )  # fmt: skip
        return y.transpose(1, 2)

    return torch.compile(scan) if compiled else scan


def _peer(name: str, make: Callable[[], Scan], **options: bool) -> Peer:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Peer(name, make(), **options)
    except (ImportError, AttributeError) as error:
        return Peer(name, missing=f"not installed: {error}")


def peers() -> list[Peer]:
    """Every peer; the slow path's backward is left out, because it is quadratic in length (hours)."""
    return [
        _peer("mambapy", _mambapy),
        _peer("transformers, slow path", _transformers, backward=False, channels_first=True),
        _peer("torchmamba", _torchmamba),
        _peer("transformers, use_mambapy", lambda: _transformers(mambapy=True), channels_first=True),
        _peer(
            "transformers, associative",
            lambda: _transformers(compiled=True),
            slow_start=True,
            channels_first=True,
        ),
    ]


def versions() -> str:
    """Exact versions of this run."""
    found: list[str] = []
    for name in ("torch", "torchmamba", "mambapy", "transformers"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} absent")
    return ", ".join(found)
