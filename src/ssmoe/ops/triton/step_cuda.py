"""The decode step of few rows in CUDA C++ (`step.cu`, compiled at run time): what it takes, its cut, its launch."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.ops.reference.mamba_step import Layer
from ssmoe.ops.triton import nvrtc
from ssmoe.ops.triton.launch import on_device

SOURCE = Path(__file__).with_name("step.cu")
WARPS = 16
THREADS = 32 * WARPS + 32
MOST_ROWS = 4
MOST_LAYERS = 64
"""Layers of a launch, whose pointers are its parameters; more layers are several launches."""


class Sizes(NamedTuple):
    """d: d_model. c: d_inner. r: dt_rank. n: d_state. taps: of the convolution's past, d_conv - 1."""

    d: int
    c: int
    r: int
    n: int
    taps: int


class Cut(NamedTuple):
    """How the work is laid out: blocks, and tiles (rows, columns) of in_proj and of out_proj."""

    blocks: int
    in_rows: int
    in_columns: int
    out_rows: int
    out_columns: int
    shares: int
    window: int = 2
    copies: int = 2
    naps: int = 0
    most_stages: int = 64
    free: int = 0
    hint: int = 0


def takes(x: Tensor, layers: Sequence[Layer], convs: Sequence[Tensor], ssms: Sequence[Tensor]) -> bool:
    """Whether the kernel takes such tensors, of layers of one shape; what sizes it takes is up to `cut`."""
    if not (x.is_cuda and convs[0].dtype == torch.bfloat16 and _present(x.device.index)):
        return False
    for (
        norm,
        norm_bias,
        in_proj,
        conv,
        shift,
        x_proj,
        delta_proj,
        A_log,
        skip,
        delta_bias,
        out_proj,
    ) in layers:
        if not all(_fits(w, torch.bfloat16) for w in (in_proj, x_proj, delta_proj, out_proj)):
            return False
        if not all(_fits(w, torch.float32) for w in (norm, conv, shift, A_log, skip, delta_bias)):
            return False
        if norm_bias is not None and not _fits(norm_bias, torch.float32):
            return False
    if not all(_fits(s, torch.bfloat16) for s in convs) or not all(_fits(s, torch.float32) for s in ssms):
        return False
    return x.dtype in (torch.float32, torch.bfloat16) and _fits(x, x.dtype)


def _fits(t: Tensor | None, dtype: torch.dtype) -> bool:
    return t is not None and t.dtype == dtype and t.is_contiguous() and t.data_ptr() % 16 == 0


@cache
def _present(device: int) -> bool:
    return nvrtc.available() and torch.cuda.get_device_capability(device) >= (9, 0)


def sizes_of(layer: Layer) -> Sizes:
    """The sizes of a layer."""
    _, _, in_proj, conv, _, _, delta_proj, A_log, _, _, _ = layer
    assert in_proj is not None
    assert conv is not None
    assert delta_proj is not None
    assert A_log is not None
    c, r = delta_proj.shape
    return Sizes(in_proj.shape[1], c, r, A_log.shape[1], conv.shape[1] - 1)


def cut_for(x: Tensor, layer: Layer) -> Cut | None:
    """The cut of such layers for x's GPU."""
    return cut(sizes_of(layer), _processors(x.device))


@cache
def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)  # pyright: ignore


@cache
def cut(sizes: Sizes, processors: int) -> Cut | None:
    """The cut for a GPU of so many multiprocessors, None where these sizes do not divide into equal parts."""
    d, c, r, n, taps = sizes
    p, step = r + 2 * n, 16 * WARPS
    blocks = next((g for g in range(processors, 0, -1) if not (c % g or d % g or c // g % 4)), 0)
    if not blocks or p % -(-p // blocks) or n != 16 or r % 8 or not 1 <= taps <= 7 or d % step or c % step:
        return None
    own = c // blocks
    if 8 * own > 32 * WARPS or own * MOST_ROWS > 32 * WARPS or p > 32 * WARPS or own * r % 8:
        return None
    columns = [next(k for k in (2 * step, step) if m % k == 0) for m in (d, c)]
    rows = [next(k for k in range(24, 0, -1) if m % k == 0) for m in (own, d // blocks)]
    shares = next(k for k in (4, 2, 1) if own % (4 * k) == 0 and p * k <= 32 * WARPS)
    return Cut(blocks, rows[0], columns[0], rows[1], columns[1], shares)


def layout(sizes: Sizes, found: Cut, rows: int, layernorm: bool, most_shared: int) -> tuple[int, int]:
    """(stages, bytes) of shared memory: as many stages as fit."""
    d, c, r, n, taps = sizes
    own, outs, p = c // found.blocks, d // found.blocks, r + 2 * n
    narrow = -(-p // found.blocks)
    slot = max(
        found.in_rows * (2 * found.in_columns + 16), found.out_rows * (2 * found.out_columns + 16), 2 * own * r,
        narrow * (2 * c + 16),
    )
    rest = 16 + 4 * d * (1 + layernorm) + 4 * own * (taps + 4 + n + rows * n) + rows * (2 * (c + d) + 32)
    rest += sum(-(-4 * o * rows * (WARPS + 1) // 16) * 16 for o in (max(2 * own, outs), narrow))
    rest += 4 * rows * (own + p + 2 * WARPS)
    stages = min((most_shared - rest) // (slot + 16), found.most_stages)
    return stages, stages * (slot + 16) + rest


def macros(
    sizes: Sizes, found: Cut, rows: int, *, bfloat16: bool, layernorm: bool, layers: int, most_shared: int
) -> nvrtc.Macros:
    d, c, r, n, taps = sizes
    stages, shared = layout(sizes, found, rows, layernorm, most_shared)
    values = {
        "D": d, "C": c, "R": r, "N": n, "TAPS": taps, "ROWS": rows, "G": found.blocks, "XBF": int(bfloat16),
        "LAYERNORM": int(layernorm), "MAXL": layers, "RI": found.in_rows, "KI": found.in_columns,
        "RO": found.out_rows, "KO": found.out_columns, "STAGES": stages, "WINDOW": min(found.window, stages), "COPIES": found.copies, "NAPS": found.naps, "FREE": found.free, "HINT": found.hint,
        "SHARED_BYTES": shared,
    }  # fmt: skip
    return tuple((key, str(value)) for key, value in values.items())


_words: dict[tuple[torch.device, int], Tensor] = {}


def exchange(x: Tensor, size: int) -> Tensor:
    """At least `size` 64-bit words through which blocks exchange numbers; one set a stream, whose kernels run in turn.

    They begin as zeros, and later launches know their own numbers by the count of layers in the first word.
    """
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    found = _words.get((x.device, stream))
    if found is None or found.numel() < size:
        found = torch.zeros(size, dtype=torch.int64, device=x.device)
        # memory taken during a capture belongs to its graph, which clears it each time
        if not (x.is_cuda and torch.cuda.is_current_stream_capturing()):
            _words[x.device, stream] = found
    return found


def steps(
    x: Tensor,
    layers: Sequence[Layer],
    found: Cut,
    eps: float,
    convs: Sequence[Tensor],
    ssms: Sequence[Tensor],
    out_convs: Sequence[Tensor],
    out_ssms: Sequence[Tensor],
    stamped: int | None = None,
) -> Tensor:
    """`mamba_steps` for what `takes` accepts; the new states go to out_convs and out_ssms, dense as the old ones.

    A row's bits depend on no other row: every sum has one order, whatever the number of rows.
    """
    (b, d), sizes = x.shape, sizes_of(layers[0])
    p = sizes.r + 2 * sizes.n
    words = exchange(x, 2 + MOST_ROWS * found.copies * (d + sizes.c + p) + 64)
    most_shared = nvrtc.most_shared(x.device.index) if x.is_cuda else 232448
    with on_device(x):
        for first in range(0, len(layers), MOST_LAYERS):
            span = slice(first, first + MOST_LAYERS)
            out, count = torch.empty_like(x), len(layers[span])
            most = 1 if count == 1 else MOST_LAYERS
            given = [x.data_ptr(), out.data_ptr(), words.data_ptr(), count, nvrtc.double_bits(eps)]
            states = zip(layers[span], convs[span], out_convs[span], ssms[span], out_ssms[span], strict=True)
            for weights, *kept in states:
                given += [0 if t is None else t.data_ptr() for t in (*weights, *kept)]
            given += [0] * (15 * (most - count))
            built = macros(
                sizes, found, b, bfloat16=x.dtype == torch.bfloat16, layernorm=layers[0][1] is not None,
                layers=most, most_shared=most_shared,
            )  # fmt: skip
            if stamped is not None:
                built = (*built, ("STAMPED", str(stamped)))
            shared = int(dict(built)["SHARED_BYTES"])
            nvrtc.launch(SOURCE, "steps", built, found.blocks, THREADS, given, shared, together=True)
            x = out
    return x
