"""The GPU backend: kernels compiled when first used, from Triton, with no CUDA build."""

from ssmoe.ops.triton.selective_scan import selective_scan

__all__ = ["selective_scan"]
