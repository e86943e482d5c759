"""Where tokens go: the rows of each expert's tokens, whole tiles an expert, with no sort and no wait for the host."""
# Triton types a launch as a call of the kernel itself, and a compile-time constant as a class of its own
# pyright: basic, reportCallIssue=false, reportArgumentType=false, reportIndexIssue=false, reportOperatorIssue=false
# pyright: reportAttributeAccessIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportReturnType=false

from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.ops.triton import expert_kernels as kernels
from ssmoe.ops.triton.launch import cdiv, power_of_two

BLOCK = 256


class Routes(NamedTuple):
    """Who goes where: `rows` (t * k) of each assignment, `assignments` of each row, `tiles` to experts."""

    rows: Tensor
    assignments: Tensor
    tiles: Tensor
    offsets: Tensor  # (e + 1), the first row of each expert


def dispatch(expert: Tensor, e: int, tile: int, y: Tensor | None = None) -> Routes:
    """Where every assignment goes. y (t, d): zeroed where a token's only assignment was dropped."""
    expert = expert.to(torch.int32).contiguous()
    count = expert.numel()
    blocks = cdiv(count, BLOCK)
    bins = max(power_of_two(e + 1), 16)
    device = expert.device
    num_tiles = count // tile + min(e, count)
    counts = torch.empty(bins, blocks, dtype=torch.int32, device=device)
    rows = torch.empty(count, dtype=torch.int32, device=device)
    assignments = torch.empty(num_tiles * tile, dtype=torch.int32, device=device)
    constants = {"E": e, "BINS": bins, "BLOCK": BLOCK, "num_warps": 4}
    kernels.count_kernel[(blocks,)](expert, counts, count, **constants)
    totals = torch.empty(bins, dtype=torch.int32, device=device)
    kernels.before_kernel[(bins,)](counts, totals, blocks, BLOCK=1024, num_warps=4)
    offsets = torch.empty(e + 1, dtype=torch.int32, device=device)
    tiles = torch.empty(num_tiles, dtype=torch.int32, device=device)
    kernels.layout_kernel[(e + 1,)](
        totals,
        offsets,
        tiles,
        assignments,
        num_tiles,
        TILE=tile,
        E=e,
        BINS=bins,
        BLOCK=128,
        num_warps=1 if bins < 1024 else 4,
    )
    cleared = (rows, 0) if y is None else (y, y.shape[1])
    kernels.place_kernel[(blocks,)](
        expert,
        counts,
        offsets,
        rows,
        assignments,
        cleared[0],
        count,
        cleared[1],
        CLEAR=y is not None,
        **constants,
    )
    return Routes(rows, assignments, tiles, offsets)
