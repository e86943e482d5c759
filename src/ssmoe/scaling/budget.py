"""What there is to spend, and the errors for budgets that cannot be."""

from collections.abc import Iterator
from typing import NamedTuple

from ssmoe.scaling.hardware import gpu

BYTES_PER_PARAMETER = 16
"""Weight, gradient and two AdamW moments, each float32."""
MEMORY_FOR_STATE = 0.8
"""Of a GPU's memory; the rest is for activations."""


class Budget(NamedTuple):
    """FLOPs, or GPUs, hours and MFU; and caps. The command's options have the same names."""

    flops: float | None = None
    gpu: str | None = None
    num_gpus: int = 1
    hours: float | None = None
    mfu: float | None = None
    """Measured, a fraction of the peak."""
    max_parameters: float | None = None
    """Every parameter, embedding included."""
    memory_gb: float | None = None
    """For weights, gradients and AdamW on all devices together."""
    max_tokens: float | None = None

    def check(self) -> None:
        """Raise ValueError for what is not positive, contradicts itself or is not enough."""
        for option, value in self._given():
            if not 0 < value < float("inf"):
                raise ValueError(f"{option} {value:g}: give a positive number")
        if self.mfu is not None and self.mfu > 1:
            raise ValueError(f"--mfu {self.mfu:g}: it is a fraction of the peak, such as 0.4")
        if self.flops is not None and self.hours is not None:
            raise ValueError("--flops and --hours both set the compute: give one of them")
        if self.hours is not None and (self.gpu is None or self.mfu is None):
            raise ValueError("--hours needs --gpu and a measured --mfu (`ssmoe bench` measures it)")
        if self.mfu is not None and self.gpu is None:
            raise ValueError("--mfu needs --gpu, whose peak it is a fraction of")
        if self.gpu is not None:
            gpu(self.gpu)
            if self.mfu is None:
                raise ValueError(f"--gpu {self.gpu} needs a measured --mfu (`ssmoe bench` measures it)")
        if self.num_gpus > 1 and self.gpu is None:
            raise ValueError(f"--num-gpus {self.num_gpus} needs --gpu")
        if self.flops is None and self.hours is None:
            self._check_caps()

    def _check_caps(self) -> None:
        if self.gpu is not None and self.max_tokens is None:
            raise ValueError(f"--gpu {self.gpu} needs --hours, --flops or --tokens: how much may it compute?")
        if self.max_tokens is None or self.most_parameters is None:
            raise ValueError(
                "no budget: give --flops, or --gpu, --hours and --mfu, or both a cap on the model "
                "(--params or --memory) and one on the data (--tokens)"
            )

    @property
    def total_flops(self) -> float | None:
        """The compute, or None where only caps are given."""
        speed = self.flops_per_second
        if self.hours is None or speed is None:
            return self.flops
        return self.hours * 3600 * speed

    @property
    def counts_head(self) -> bool:
        """Hours pay for the vocabulary's projection too; the laws' FLOPs leave it out."""
        return self.hours is not None

    @property
    def flops_per_second(self) -> float | None:
        """What the GPUs reach."""
        if self.gpu is None or self.mfu is None:
            return None
        return gpu(self.gpu).peak_flops * self.mfu * self.num_gpus

    @property
    def most_parameters(self) -> float | None:
        """The tightest of the caps on the model."""
        caps = [] if self.max_parameters is None else [self.max_parameters]
        if self.memory_gb is not None:
            caps.append(self.memory_gb * 1e9 / BYTES_PER_PARAMETER)
        elif self.gpu is not None:
            caps.append(self.num_gpus * gpu(self.gpu).memory_bytes * MEMORY_FOR_STATE / BYTES_PER_PARAMETER)
        return min(caps, default=None)

    @property
    def parameter_cap(self) -> str:
        """The option behind `most_parameters`, for messages."""
        if self.max_parameters is not None and self.max_parameters == self.most_parameters:
            return f"--params {self.max_parameters:.3g}"
        if self.memory_gb is not None:
            return f"--memory {self.memory_gb:g}"
        return f"the memory of {self.num_gpus} {self.gpu}"

    def _given(self) -> Iterator[tuple[str, float]]:
        for option, value in (
            ("--flops", self.flops),
            ("--num-gpus", self.num_gpus),
            ("--hours", self.hours),
            ("--mfu", self.mfu),
            ("--params", self.max_parameters),
            ("--memory", self.memory_gb),
            ("--tokens", self.max_tokens),
        ):
            if value is not None:
                yield option, value
