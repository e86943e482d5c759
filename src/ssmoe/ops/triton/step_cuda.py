"""The decode step in CUDA C++ (`step.cu`, compiled at run time): which layers it takes, its cut and its launch."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.ops.reference.mamba_step import Layer
from ssmoe.ops.triton import nvrtc
from ssmoe.ops.triton.launch import counters, on_device

SOURCE = Path(__file__).with_name("step.cu")
THREADS = 256
TOGETHER, EARLY = True, True
PROCESSORS = 132
"""Multiprocessors of an H200."""
MOST_ROWS = 64
"""Rows of a launch; more rows are several."""
MOST_LAYERS = 64
"""Layers of a launch, whose pointers are its parameters; more layers are several."""
BLOCKS = 8
"""Blocks of a cluster: more would read each other's sums faster, fewer leave fewer parts of x_proj to add."""
STEPS = 10
"""Terms of a unit of a product, in 32s: as many weights as a warp's registers have room for."""


class Sizes(NamedTuple):
    """d: d_model. c: d_inner. r: dt_rank. n: d_state. taps: of the convolution's past, d_conv - 1."""

    d: int
    c: int
    r: int
    n: int
    taps: int


class Cut(NamedTuple):
    """How the work is laid out.

    blocks: of a cluster. slots: pieces of 8 rows' states that a block holds. The parts in which a block's warps
    share the terms of in_proj and out_proj are 0 where those products are other kernels' work.
    """

    blocks: int
    clusters: int
    slots: int = 8
    enter_parts: int = 0
    out_parts: int = 0


def takes(x: Tensor, layers: Sequence[Layer], convs: Sequence[Tensor], ssms: Sequence[Tensor]) -> bool:
    """Whether these kernels take such tensors, of layers of one shape; what sizes they take is up to `cut`."""
    if not (x.is_cuda and convs[0].dtype == torch.bfloat16 and _present(x.device.index)):
        return False
    for layer in layers:
        norm, _, in_proj, conv, shift, x_proj, delta_proj, A_log, skip, delta_bias, out_proj = layer
        matrices, vectors = (
            (in_proj, x_proj, delta_proj, out_proj),
            (norm, conv, shift, A_log, skip, delta_bias),
        )
        if not all(_fits(w, torch.bfloat16) for w in matrices):
            return False
        if not all(_fits(w, torch.float32) for w in vectors):
            return False
    if not all(_fits(s, torch.bfloat16) for s in convs) or not all(_fits(s, torch.float32) for s in ssms):
        return False
    return _fits(x, x.dtype)


def sizes_of(layer: Layer) -> Sizes:
    """The sizes of a layer."""
    _, _, in_proj, conv, _, _, delta_proj, A_log, _, _, _ = layer
    assert in_proj is not None
    assert conv is not None
    assert delta_proj is not None
    assert A_log is not None
    return Sizes(in_proj.shape[1], *delta_proj.shape, A_log.shape[1], conv.shape[1] - 1)


def _fits(t: Tensor | None, dtype: torch.dtype) -> bool:
    return t is not None and t.dtype == dtype and t.is_contiguous() and t.data_ptr() % 16 == 0


@cache
def _present(device: int) -> bool:
    return nvrtc.available() and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def cut(sizes: Sizes, device: int, whole: bool = True) -> Cut | None:
    """The cut with the most clusters that are on the GPU at once, None where there is none.

    whole: of layers as a whole, else of what is between in_proj and out_proj.
    """
    for clusters in range(32, 0, -1):
        for slots in (8,) if whole else (8, 4, 2, 1):
            found = divided(sizes, BLOCKS, clusters, slots, whole)
            if found is None or shared_bytes(sizes, found, MOST_ROWS) > nvrtc.most_shared(device):
                continue
            # x's type and the number of layers do not count here
            built = macros(sizes, found, MOST_ROWS, bfloat16=False, layers=MOST_LAYERS if whole else 1)
            shared = shared_bytes(sizes, found, MOST_ROWS)
            with torch.cuda.device(device):
                fit = nvrtc.clusters_at_once(
                    SOURCE, kernel(found), built, BLOCKS * clusters, THREADS, shared, BLOCKS
                )
            if fit >= clusters:
                return found
    return None


def kernel(found: Cut) -> str:
    """The name of the kernel of a cut."""
    return "steps" if found.enter_parts else "middle_step"


@cache
def divided(sizes: Sizes, blocks: int, clusters: int, slots: int = 8, whole: bool = True) -> Cut | None:
    """The cut of these sizes for so many clusters of so many blocks, None where they do not divide."""
    d, c, r, n, taps = sizes
    if n != 16 or r % 8 or not 1 <= taps <= 7 or -(-(r + 2 * n) // blocks) > 128:
        return None
    if c % (32 * clusters) or c // clusters % (8 * blocks):
        return None
    if not whole:
        return Cut(blocks, clusters, slots)
    if d % (16 * clusters) or d // clusters % blocks or d % (32 * blocks) or c % (32 * blocks):
        return None
    enter, out = _parts(d // blocks // 32), _parts(c // blocks // 32)
    return None if enter is None or out is None else Cut(blocks, clusters, slots, enter, out)


def _parts(steps: int) -> int | None:
    """The fewest equal parts of so many steps that a warp's registers have room for."""
    return next((parts for parts in range(1, 9) if steps % parts == 0 and steps // parts <= STEPS), None)


def _stride(terms: int) -> int:
    return terms if 2 * terms % 128 == 64 else terms + 32


def shared_bytes(sizes: Sizes, found: Cut, rows: int) -> int:
    """The source's END: bytes of shared memory that a block takes."""
    d, c, r, n, taps = sizes
    whole, ch, dg = bool(found.enter_parts), c // found.clusters, d // found.clusters
    cc, p, rp = ch // found.blocks, r + 2 * n, -(-r // 32) * 32
    ps = -(-(p // 2) // found.blocks) * 2
    tiles = -(-ps // 16)
    held = min(found.slots, rows // 8)
    column = 4 * cc * (rows + 1)

    def after(at: int, size: int) -> int:
        return -(-(at + size) // 16) * 16

    at = after(8 * held, 0)
    for size in (
        2 * rows * (cc * taps + 2), 4 * cc * (taps + 1), 4 * cc, 4 * cc, 4 * cc, 4 * cc * n,
        4 * d // found.blocks if whole else 0, 4 * rows, 32 * held * cc * n,
    ):  # fmt: skip
        at = after(at, size)
    h = at
    widen = after(after(after(h, column), column), 2 * rows * (cc + 4))
    norm = 2 * rows * _stride(d // found.blocks) if whole else 0
    sums = after(max(h + norm, widen + 2 * cc * _stride(rp)), 0)
    delta = after(after(after(sums, 4 * ps * rows), 2 * rows * _stride(rp)), 8 * rows * n)
    out = after(h, 2 * rows * _stride(c // found.blocks))
    middle = max(sums + 64 * max(1, 8 // tiles) * tiles * rows, sums + 2 * rows * _stride(ch), delta + column)
    enter = sums + 8 * found.enter_parts * ch * rows
    return max(middle, enter, out + 4 * found.out_parts * dg * rows) if whole else middle


def macros(sizes: Sizes, found: Cut, rows: int, *, bfloat16: bool, layers: int) -> nvrtc.Macros:
    d, c, r, n, taps = sizes
    values = {
        "D": d, "C": c, "R": r, "N": n, "TAPS": taps, "NT": rows // 8, "CS": found.blocks, "G": found.clusters,
        "KI": found.enter_parts, "KO": found.out_parts, "XBF": int(bfloat16), "MAXL": layers, "SLOTS": found.slots,
        "WHOLE": int(found.enter_parts > 0), "PER_SM": 1 if found.enter_parts else 2,
    }  # fmt: skip
    return tuple((key, str(value)) for key, value in values.items())


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
    out = torch.empty_like(x)
    with on_device(x):
        for row in range(0, x.shape[0], MOST_ROWS):
            rows = slice(row, min(row + MOST_ROWS, x.shape[0]))
            source = x[rows]
            for first in range(0, len(layers), MOST_LAYERS):
                span = slice(first, first + MOST_LAYERS)
                states = [[s[rows] for s in group[span]] for group in (convs, out_convs, ssms, out_ssms)]
                _launch(source, out[rows], None, layers[span], found, eps, states)
                source = out[rows]
    return out


def middle(
    mixed: Tensor, layer: Layer, found: Cut, conv: Tensor, ssm: Tensor, out_conv: Tensor, out_ssm: Tensor
) -> Tensor:
    """From in_proj's output (b, 2 d_inner), bfloat16, to out_proj's input (b, d_inner), of one layer."""
    y = torch.empty(mixed.shape[0], mixed.shape[1] // 2, dtype=mixed.dtype, device=mixed.device)
    for row in range(0, mixed.shape[0], MOST_ROWS):
        rows = slice(row, min(row + MOST_ROWS, mixed.shape[0]))
        states = [[s[rows]] for s in (conv, out_conv, ssm, out_ssm)]
        _launch(mixed[rows], mixed, y[rows], [layer], found, 0.0, states)
    return y


def _launch(
    x: Tensor,
    out: Tensor,
    y: Tensor | None,
    layers: Sequence[Layer],
    found: Cut,
    eps: float,
    states: list[list[Tensor]],
) -> None:
    sizes, (b, device) = sizes_of(layers[0]), (x.shape[0], x.device)
    rows = next(rows for rows in (8, 16, 32, 64) if rows >= b)
    most = 1 if len(layers) == 1 else MOST_LAYERS
    parts = torch.empty(found.clusters, sizes.r + 2 * sizes.n, rows, dtype=torch.float32, device=device)
    if y is None:
        y = torch.empty(b, sizes.c, dtype=torch.bfloat16, device=device)
    tensors: list[Tensor] = [x, out, parts, y, counters(x, 1)]
    words = [*(t.data_ptr() for t in tensors), b, len(layers), nvrtc.double_bits(eps)]
    for (norm, _, *rest), *kept in zip(layers, *states, strict=True):
        words += [t.data_ptr() for t in (norm, *rest, *kept) if t is not None]
    words += [0] * (14 * (most - len(layers)))
    nvrtc.launch(
        SOURCE, kernel(found), macros(sizes, found, rows, bfloat16=x.dtype == torch.bfloat16, layers=most),
        found.blocks * found.clusters, THREADS, words, shared_bytes(sizes, found, rows),
        cluster=found.blocks, together=TOGETHER, early=EARLY and not found.enter_parts,
    )  # fmt: skip


class ProductCut(NamedTuple):
    """blocks: of a cluster, which share the terms. warps: of a block, each with 16 outputs. together: blocks an SM."""

    blocks: int
    warps: int
    together: int


def product_cuts(terms: int, width: int, most_shared: int) -> list[ProductCut]:
    """The cuts of a product, those with the most blocks first, up to PROCESSORS, and then the smallest clusters."""
    found: list[tuple[int, int, ProductCut]] = []
    for blocks in (2, 4, 8):
        for warps in range(3, 13):
            if width % (16 * warps) or terms % (32 * blocks) or 4 * warps % blocks:
                continue
            cut = ProductCut(blocks, warps, 1)
            shared = product_shared(terms, width, cut, MOST_ROWS)
            if shared > most_shared:
                continue
            if 2 * (shared + 1024) <= most_shared and warps <= 8:
                cut = cut._replace(together=2)
            count = width // (16 * warps) * blocks
            if count <= PROCESSORS * cut.together:
                found.append((min(count, PROCESSORS), -blocks, cut))
    return [cut for *_, cut in sorted(found, reverse=True)]


@cache
def product_cut(terms: int, width: int, device: int) -> ProductCut | None:
    """The first of the cuts whose clusters are all on the GPU at once, None without one."""
    if not _present(device):
        return None
    for found in product_cuts(terms, width, nvrtc.most_shared(device)):
        built = _product_macros(terms, width, found, MOST_ROWS, bfloat16=True, residual=True)
        shared, count = product_shared(terms, width, found, MOST_ROWS), width // (16 * found.warps)
        if 3 * count * found.blocks < PROCESSORS:
            continue
        with torch.cuda.device(device):
            fit = nvrtc.clusters_at_once(
                SOURCE, "product", built, count * found.blocks, 32 * found.warps, shared, found.blocks
            )
        if fit >= count:
            return found
    return None


def _product_macros(
    terms: int, width: int, found: ProductCut, rows: int, *, bfloat16: bool, residual: bool
) -> nvrtc.Macros:
    values = {
        "PRODUCT": 1, "TERMS": terms, "WIDTH": width, "RESIDUAL": int(residual), "XBF": int(bfloat16),
        "NT": rows // 8, "CS": found.blocks, "WARPS": found.warps, "PER_SM": found.together,
    }  # fmt: skip
    return tuple((key, str(value)) for key, value in values.items())


def product_shared(terms: int, width: int, found: ProductCut, rows: int) -> int:
    """The source's END for a product: bytes of shared memory that a block takes."""
    cluster = 16 * found.warps
    sums = 4 * cluster * rows + 4 * rows * (cluster // found.blocks + 8)
    return max(2 * rows * _stride(terms // found.blocks), sums)


def product(
    a: Tensor, w: Tensor, residual: Tensor | None, out: Tensor, found: ProductCut, early: bool
) -> None:
    """out = a w^T (+ residual): a (b, terms) and w (width, terms) bfloat16, residual and out float32 or bfloat16.

    early: w was not made just now, so that it may be read before the kernels before this one have ended.
    """
    (b, terms), width = a.shape, w.shape[0]
    for row in range(0, b, MOST_ROWS):
        some = slice(row, min(row + MOST_ROWS, b))
        rows = next(rows for rows in (8, 16, 32, 64) if rows >= some.stop - row)
        built = _product_macros(
            terms, width, found, rows, bfloat16=out.dtype == torch.bfloat16, residual=residual is not None
        )
        shared = product_shared(terms, width, found, rows)
        tensors = (a[some], w, out[some] if residual is None else residual[some], out[some])
        nvrtc.launch(
            SOURCE, "product", built,
            width // (16 * found.warps) * found.blocks, 32 * found.warps,
            [*(t.data_ptr() for t in tensors), some.stop - row], shared, cluster=found.blocks, early=early,
        )  # fmt: skip
