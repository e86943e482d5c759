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
"""Of a block: the warps that multiply, one that streams weights."""
MOST_ROWS = 4
MOST_LAYERS = 64
"""Layers of a launch, whose pointers are its parameters; more layers are several launches."""
COPIES = 2
"""Of what all blocks read, so that fewer of them meet at one place."""
WINDOW = 3
"""Stages of weights under way at a time, of a ring that may have more: what else a block reads waits behind them."""
LEAST_STAGES = 4


class Sizes(NamedTuple):
    """d: d_model. c: d_inner. r: dt_rank. n: d_state. taps: of the convolution's past, d_conv - 1."""

    d: int
    c: int
    r: int
    n: int
    taps: int


class Tile(NamedTuple):
    """Of a product's weights, as many as a stage of the ring holds."""

    rows: int
    columns: int


class Cut(NamedTuple):
    """How the work is laid out: blocks, tiles of in_proj and of out_proj, stages of the ring of weights."""

    blocks: int
    enter: Tile
    out: Tile
    stages: int


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
    """The cut for x and layers like this one on x's GPU."""
    processors, memory = _limits(x.device)
    return cut(sizes_of(layer), x.shape[0], layer[1] is not None, processors, memory)


@cache
def _limits(device: torch.device) -> tuple[int, int]:
    found = torch.cuda.get_device_properties(device)  # pyright: ignore
    return int(found.multi_processor_count), int(found.shared_memory_per_block_optin)  # pyright: ignore


@cache
def cut(sizes: Sizes, rows: int, layernorm: bool, processors: int, memory: int) -> Cut | None:
    """The cut for a GPU of so many multiprocessors with so many bytes of shared memory for a block.

    None where the sizes do not divide into equal parts or do not fit.
    """
    d, c, r, n, taps = sizes
    p, step, threads = r + 2 * n, 16 * WARPS, 32 * WARPS
    blocks = next((g for g in range(processors, 0, -1) if not (c % g or d % g or c // g % 4)), 0)
    if not blocks or p % -(-p // blocks) or n != 16 or r % 8 or not 1 <= taps <= 7 or d % step or c % step:
        return None
    own, outs = c // blocks, d // blocks
    if max(8 * own, p, MOST_ROWS * own, MOST_ROWS * outs) > threads:
        return None
    enter, out = _tile(own, d), _tile(outs, c)
    found = Cut(blocks, enter, out, 0)
    stages = (memory - shared_bytes(sizes, found, rows, layernorm)) // (_slot(sizes, found) + 16)
    return found._replace(stages=stages) if stages >= LEAST_STAGES else None


def _tile(rows: int, columns: int) -> Tile:
    """The largest of equal tiles of up to 24 rows and two steps of columns."""
    step = 16 * WARPS
    most = max(k for k in range(1, 25) if rows % k == 0)
    return Tile(most, 2 * step if columns % (2 * step) == 0 else step)


def _slot(sizes: Sizes, found: Cut) -> int:
    """Bytes of a stage."""
    own, narrow = sizes.c // found.blocks, -(-(sizes.r + 2 * sizes.n) // found.blocks)
    tiles = (found.enter, found.out, Tile(narrow, sizes.c))
    return max(*(tile.rows * (2 * tile.columns + 16) for tile in tiles), 2 * own * sizes.r)


def shared_bytes(sizes: Sizes, found: Cut, rows: int, layernorm: bool) -> int:
    """The source's END: bytes of shared memory that a block takes."""
    d, c, r, n, taps = sizes
    own, outs, p = c // found.blocks, d // found.blocks, r + 2 * n

    def sums(outputs: int) -> int:
        return -(-4 * outputs * rows * (WARPS + 1) // 16) * 16

    total = found.stages * (_slot(sizes, found) + 16) + 32
    total += 4 * d * (1 + layernorm) + 4 * own * (taps + 4 + n + rows * n) + rows * (2 * (c + d) + 32)
    return total + sums(max(2 * own, outs)) + sums(-(-p // found.blocks)) + 4 * rows * (own + p + 2 * WARPS)


def macros(
    sizes: Sizes, found: Cut, rows: int, *, bfloat16: bool, layernorm: bool, layers: int
) -> nvrtc.Macros:
    d, c, r, n, taps = sizes
    values = {
        "D": d, "C": c, "R": r, "N": n, "TAPS": taps, "ROWS": rows, "G": found.blocks, "XBF": int(bfloat16),
        "LAYERNORM": int(layernorm), "MAXL": layers, "RI": found.enter.rows, "KI": found.enter.columns,
        "RO": found.out.rows, "KO": found.out.columns, "STAGES": found.stages,
        "WINDOW": min(WINDOW, found.stages), "COPIES": COPIES,
        "SHARED_BYTES": shared_bytes(sizes, found, rows, layernorm),
    }  # fmt: skip
    return tuple((key, str(value)) for key, value in values.items())


_words: dict[tuple[torch.device, int], Tensor] = {}


def _exchange(x: Tensor, size: int) -> Tensor:
    """At least `size` 64-bit words through which blocks exchange numbers; one set a stream, whose kernels run in turn.

    They begin as zeros. The first counts the layers so far, by which a launch knows its own numbers. A launch that is
    being captured has words of its own, which its graph clears at each replay: graphs may be replayed side by side.
    """
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.zeros(size, dtype=torch.int64, device=x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    found = _words.get((x.device, stream))
    if found is None or found.numel() < size:
        found = _words[x.device, stream] = torch.zeros(size, dtype=torch.int64, device=x.device)
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
) -> Tensor:
    """`mamba_steps` for what `takes` accepts; the new states go to out_convs and out_ssms, dense as the old ones.

    A row's bits depend on no other row: every sum has one order, whatever the number of rows.
    """
    (b, d), sizes, layernorm = x.shape, sizes_of(layers[0]), layers[0][1] is not None
    p = sizes.r + 2 * sizes.n
    words = _exchange(x, 2 + b * COPIES * (d + sizes.c + p))
    with on_device(x):
        for first in range(0, len(layers), MOST_LAYERS):
            span = slice(first, first + MOST_LAYERS)
            out, count = torch.empty_like(x), len(layers[span])
            most = 1 if count == 1 else MOST_LAYERS
            given = [x.data_ptr(), out.data_ptr(), words.data_ptr(), count, nvrtc.double_bits(eps)]
            kept = zip(layers[span], convs[span], out_convs[span], ssms[span], out_ssms[span], strict=True)
            for weights, *states in kept:
                given += [0 if t is None else t.data_ptr() for t in (*weights, *states)]
            given += [0] * (15 * (most - count))
            built = macros(
                sizes, found, b, bfloat16=x.dtype == torch.bfloat16, layernorm=layernorm, layers=most
            )
            shared = shared_bytes(sizes, found, b, layernorm)
            nvrtc.launch(SOURCE, "steps", built, found.blocks, THREADS, given, shared, together=True)
            x = out
    return x
