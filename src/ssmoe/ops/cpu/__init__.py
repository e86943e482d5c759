"""C++ kernels for the CPU, sources in `csrc/`: AVX-512 (with BF16 or without), AVX2 or portable, chosen once.

`SSMOE_CPU_LEVEL` (auto, avx512bf16, avx512, avx2 or portable) holds the choice down, for tests.
"""

from ssmoe.ops.extension import missing

if reason := missing():
    raise ModuleNotFoundError(reason)

from ssmoe.ops.cpu.attention_step import attention_step
from ssmoe.ops.cpu.causal_conv1d import causal_conv1d
from ssmoe.ops.cpu.describe import describe
from ssmoe.ops.cpu.expert_linear import expert_linear
from ssmoe.ops.cpu.expert_mlp import expert_mlp
from ssmoe.ops.cpu.head_cross_entropy import head_cross_entropy
from ssmoe.ops.cpu.linear import fork_linear, linear, split_linear
from ssmoe.ops.cpu.mamba_step import mamba_step, mamba_steps
from ssmoe.ops.cpu.moe_step import moe_step
from ssmoe.ops.cpu.muon_step import muon_step
from ssmoe.ops.cpu.residual_norm import residual_norm
from ssmoe.ops.cpu.selective_scan import selective_scan
from ssmoe.ops.reference.adamw_step import adamw_step
from ssmoe.ops.reference.argmax import argmax
from ssmoe.ops.reference.embedding import embedding
from ssmoe.ops.reference.residual_sum import residual_sum
from ssmoe.ops.reference.route import route
from ssmoe.ops.reference.wide_linear import fork_wide, wide_linear

__all__ = [
    "adamw_step",
    "argmax",
    "attention_step",
    "causal_conv1d",
    "describe",
    "embedding",
    "expert_linear",
    "expert_mlp",
    "fork_linear",
    "fork_wide",
    "head_cross_entropy",
    "linear",
    "mamba_step",
    "mamba_steps",
    "moe_step",
    "muon_step",
    "residual_norm",
    "residual_sum",
    "route",
    "selective_scan",
    "split_linear",
    "wide_linear",
]
