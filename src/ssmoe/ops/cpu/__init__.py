"""C++ kernels for the CPU, sources in `csrc/`: AVX-512, AVX2 or portable, chosen when they are first used.

`SSMOE_CPU_LEVEL` (auto, avx512, avx2 or portable) holds the choice down, for tests.
"""

from ssmoe.ops.extension import missing

if reason := missing():
    raise ModuleNotFoundError(reason)

from ssmoe.ops.cpu.causal_conv1d import causal_conv1d
from ssmoe.ops.cpu.describe import describe
from ssmoe.ops.cpu.expert_linear import expert_linear
from ssmoe.ops.cpu.expert_mlp import expert_mlp
from ssmoe.ops.cpu.linear import linear
from ssmoe.ops.cpu.mamba_step import mamba_step
from ssmoe.ops.cpu.selective_scan import selective_scan
from ssmoe.ops.reference.cross_entropy import cross_entropy
from ssmoe.ops.reference.residual_norm import residual_norm

__all__ = [
    "causal_conv1d",
    "cross_entropy",
    "describe",
    "expert_linear",
    "expert_mlp",
    "linear",
    "mamba_step",
    "residual_norm",
    "selective_scan",
]
