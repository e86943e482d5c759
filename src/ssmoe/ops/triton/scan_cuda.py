"""The selective scan in CUDA C++ (`scan.cu`, compiled at run time): the custom op and how it is launched."""
# a custom op's fake, its context and its gradient are called by torch with what the op was given
# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from triton import cdiv

from ssmoe.ops.triton import nvrtc
from ssmoe.ops.triton.launch import on_device, row_major

SOURCE = Path(__file__).with_name("scan.cu")
WIDTHS = (8, 16, 32)
"""State widths that the kernels are written for; others take the Triton kernels."""
LONGEST = 2**31 - 2**16
SAVED_EVERY = 4
"""Positions between two saved states; the backward replays this many from registers."""


class Cut(NamedTuple):
    """How the work is laid out: lanes a channel, channels a lane, warps a block, positions staged and in hand."""

    lanes: int
    channels: int
    warps: int
    tile: int
    sub: int
    min_blocks: int

    @property
    def block_channels(self) -> int:
        return 32 // self.lanes * self.channels * self.warps


FORWARD = Cut(4, 2, 4, 32, 8, 4)
# one channel a lane where that alone fills the GPU
FORWARD_SPREAD = Cut(4, 1, 4, 32, 16, 4)
BACKWARD = Cut(4, 2, 4, 16, SAVED_EVERY, 3)
# fewer instructions a channel, for half the warps
BACKWARD_MANY = Cut(4, 4, 4, 16, SAVED_EVERY, 2)
MULTIPROCESSORS = 128
"""As many as are filled at once: an H200 has 132."""


def covers(x: Tensor, A: Tensor) -> bool:
    """Whether these kernels take the scan; decided before anything is launched."""
    return x.is_cuda and A.shape[-1] in WIDTHS and x.shape[1] <= LONGEST and nvrtc.available()


def forward_cut(b: int, d: int) -> Cut:
    """One channel a lane where that makes between half a wave and all of one."""
    return FORWARD_SPREAD if 0.5 <= _waves(FORWARD_SPREAD, b, d) <= 1 else FORWARD


def backward_cut(b: int, d: int, n: int) -> Cut:
    """Many channels a lane where that fills the GPU.

    Wide states: one channel and fewer positions staged, for registers and 48 KiB of shared memory.
    """
    if n > 16:
        return BACKWARD._replace(channels=1, tile=8)
    return BACKWARD_MANY if _waves(BACKWARD_MANY, b, d) > 1 else BACKWARD


def _waves(cut: Cut, b: int, d: int) -> float:
    return b * cdiv(d, cut.block_channels) / (MULTIPROCESSORS * cut.min_blocks)


def _chunks(cut: Cut, b: int, length: int, d: int) -> int:
    """1, or how many parts the length is cut into, so that each of the two launches that it takes is one wave."""
    waves = _waves(cut, b, d)
    return 1 if waves > 2 / 3 else max(1, min(1 + int(1 / waves), cdiv(length, cut.tile) // 8))


def _whole_chunks(cut: Cut, length: int, chunks: int) -> tuple[int, int]:
    """How many chunks of whole tiles there are, none of them empty, and the tiles of each."""
    tiles = cdiv(length, cut.tile)
    chunk_tiles = cdiv(tiles, chunks)
    return cdiv(tiles, chunk_tiles), chunk_tiles


def _type(t: Tensor | None) -> str:
    return "bf16" if t is not None and t.dtype == torch.bfloat16 else "float"


def _aligned(cut: Cut, *tensors: Tensor | None) -> bool:
    """Whether every row of the tensors (b, l, d) can be read in vectors of `cut.channels`."""
    w = cut.channels
    return all(
        t.shape[2] % w == 0
        and t.stride(0) % w == 0
        and t.stride(1) % w == 0
        and t.data_ptr() % (w * t.element_size()) == 0
        for t in tensors
        if t is not None
    )


def _macros(cut: Cut, n: int, **values: object) -> nvrtc.Macros:
    cut_values = {
        "N": n, "K": cut.lanes, "CH": cut.channels, "WARPS": cut.warps, "TILE": cut.tile, "SUB": cut.sub,
        "MIN_BLOCKS": cut.min_blocks,
    }  # fmt: skip
    return tuple((k, str(int(v) if isinstance(v, bool) else v)) for k, v in (cut_values | values).items())


def _words(*values: Tensor | int | None) -> list[int]:
    """Addresses and numbers, 0 for an absent or empty tensor."""
    return [v if isinstance(v, int) else v.data_ptr() if v is not None and v.numel() else 0 for v in values]


def _strides(*tensors: Tensor | None) -> list[int]:
    return [0 if t is None else t.stride(axis) for t in tensors for axis in (0, 1)]


def _plain(t: Tensor | None) -> Tensor | None:
    """A parameter as dense float32."""
    return None if t is None else t.to(torch.float32).contiguous()


def run_forward(
    cut: Cut,
    chunks: int,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    flags: Tensor | None,
    saved_every: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the state before every `saved_every`-th position (none if 0)."""
    b, length, d = x.shape
    n = A.shape[1]
    like = {"dtype": torch.float32, "device": x.device}
    x, delta, B, C = (row_major(t) for t in (x, delta, B, C))
    z = None if z is None else row_major(z)
    y = torch.empty(b, length, d, dtype=x.dtype, device=x.device)
    final = torch.empty(b, d, n, **like)
    saved = torch.empty((b, cdiv(length, saved_every), d, n) if saved_every else (0,), **like)
    chunks, chunk_tiles = _whole_chunks(cut, length, chunks)
    states = torch.empty((b, chunks, d, n) if chunks > 1 else (0,), **like)
    steps = torch.empty((b, chunks, d) if chunks > 1 else (0,), **like)
    macros = _macros(
        cut, n, FORWARD=1, CKPT=saved_every, ALIGNED=_aligned(cut, x, delta, z), SEGMENTS=flags is not None,
        HAS_Z=z is not None, XT=_type(x), DT=_type(delta), ZT=_type(z), BT=_type(B), CT=_type(C),
    )  # fmt: skip
    kept = [_plain(t) for t in (A, D, delta_bias, initial)]
    with on_device(x):
        for phase in (1, 2) if chunks > 1 else (0,):
            words = _words(
                x, delta, kept[0], B, C, kept[1], z, kept[2], kept[3], flags, y, final, saved, states, steps,
                length, d, chunks, chunk_tiles, phase,
            )  # fmt: skip
            blocks = b * max(1, chunks - 1) * cdiv(d, cut.block_channels)
            words += _strides(x, delta, z, B, C)
            nvrtc.launch(SOURCE, "scan_forward", macros, blocks, 32 * cut.warps, words)
    return y, final, saved


def run_backward(
    cut: Cut,
    chunks: int,
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    flags: Tensor | None,
    saved: Tensor,
    initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, delta, A, B, C, D, z, delta_bias and the initial state, empty where there is no input."""
    b, length, d = x.shape
    n = A.shape[1]
    like = {"dtype": torch.float32, "device": x.device}
    x, delta, B, C, dy = (row_major(t) for t in (x, delta, B, C, dy.to(x.dtype)))
    z = None if z is None else row_major(z)
    groups = cdiv(d, cut.block_channels)
    chunks, chunk_tiles = _whole_chunks(cut, length, chunks)
    dx = torch.empty(b, length, d, dtype=x.dtype, device=x.device)
    ddelta = torch.empty(b, length, d, dtype=delta.dtype, device=x.device)
    dz = x.new_empty(0) if z is None else torch.empty(b, length, d, dtype=z.dtype, device=x.device)
    partial = torch.empty(groups, b, length, 2 * n, **like)
    dA = torch.empty(b * chunks, d, n, **like)
    dskip = torch.empty((b * chunks, d) if D is not None else (0,), **like)
    dbias = torch.empty((b * chunks, d) if delta_bias is not None else (0,), **like)
    dinitial = torch.empty((b, d, n) if initial else (0,), **like)
    states = torch.empty((b, chunks, d, n) if chunks > 1 else (0,), **like)
    steps = torch.empty((b, chunks, d) if chunks > 1 else (0,), **like)
    dB = torch.empty(b, length, n, dtype=B.dtype, device=x.device)
    dC = torch.empty(b, length, n, dtype=C.dtype, device=x.device)
    macros = _macros(
        cut, n, BACKWARD=1, ALIGNED=_aligned(cut, x, delta, z, dy), SEGMENTS=flags is not None,
        HAS_Z=z is not None, XT=_type(x), DT=_type(delta), ZT=_type(z), BT=_type(B), CT=_type(C),
    )  # fmt: skip
    kept = [_plain(t) for t in (A, D, delta_bias, dfinal)]
    with on_device(x):
        for phase in (1, 2) if chunks > 1 else (0,):
            words = _words(
                x, delta, kept[0], B, C, kept[1], z, kept[2], flags, saved, dy, kept[3], states, steps,
                dx, ddelta, dz, partial, dA, dskip, dbias, dinitial, length, d, b, chunks, chunk_tiles, phase,
            )  # fmt: skip
            words += _strides(x, delta, z, B, C, dy)
            nvrtc.launch(
                SOURCE, "scan_backward", macros, b * max(1, chunks - 1) * groups, 32 * cut.warps, words
            )
        blocks = cdiv(b * length * 2 * n, 256)
        nvrtc.launch(SOURCE, "scan_fold", macros, blocks, 256, _words(partial, dB, dC, groups, b * length))
    dD = dskip.sum(0).to(D.dtype) if D is not None else dskip
    dbias = dbias.sum(0).to(delta_bias.dtype) if delta_bias is not None else dbias
    return dx, ddelta, dA.sum(0).to(A.dtype), dB, dC, dD, dz, dbias, dinitial


@torch.library.custom_op("ssmoe::scan_cuda", mutates_args=())
def scan_cuda(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial: Tensor | None,
    flags: Tensor | None,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, final state, the states before every SAVED_EVERY-th position if `save`).

    x, delta, z: (b, l, d); A: (d, n), n in WIDTHS; B, C: (b, l, n); flags: (b, l) int8, bit 0 real, bit 1 reset.
    """
    b, length, d = x.shape
    cut = forward_cut(b, d)
    chunks = _chunks(cut, b, length, d)
    every = SAVED_EVERY if save else 0
    return run_forward(cut, chunks, x, delta, A, B, C, D, z, delta_bias, initial, flags, every)


@scan_cuda.register_fake
def _(x, delta, A, B, C, D, z, delta_bias, initial, flags, save):  # noqa: ARG001
    b, length, d = x.shape
    n = A.shape[1]
    blocks = (length + SAVED_EVERY - 1) // SAVED_EVERY
    y = torch.empty(b, length, d, dtype=x.dtype, device=x.device)
    final = x.new_empty((b, d, n), dtype=torch.float32)
    return y, final, x.new_empty((b, blocks, d, n) if save else (0,), dtype=torch.float32)


@torch.library.custom_op("ssmoe::scan_cuda_backward", mutates_args=())
def scan_cuda_backward(
    dy: Tensor,
    dfinal: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    flags: Tensor | None,
    saved: Tensor,
    initial: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients in the order of `run_backward`."""
    cut = backward_cut(x.shape[0], *A.shape)
    chunks = _chunks(cut, *x.shape)
    return run_backward(cut, chunks, dy, dfinal, x, delta, A, B, C, D, z, delta_bias, flags, saved, initial)


@scan_cuda_backward.register_fake
def _(dy, dfinal, x, delta, A, B, C, D, z, delta_bias, flags, saved, initial):  # noqa: ARG001
    def like(t, shape, present=True):
        return torch.empty(shape if present else (0,), dtype=t.dtype, device=x.device)

    return (
        like(x, x.shape), like(delta, delta.shape), like(A, A.shape), like(B, B.shape), like(C, C.shape),
        like(saved if D is None else D, A.shape[:1], D is not None),
        like(x if z is None else z, x.shape, z is not None),
        like(saved if delta_bias is None else delta_bias, A.shape[:1], delta_bias is not None),
        like(saved, (x.shape[0], *A.shape), initial),
    )  # fmt: skip


def _save(ctx, inputs, output):
    x, delta, A, B, C, D, z, delta_bias, initial, flags, _ = inputs
    ctx.save_for_backward(x, delta, A, B, C, D, z, delta_bias, flags, output[2])
    ctx.initial = initial is not None
    ctx.mark_non_differentiable(output[2])
    # no zeros as large as the saved states for the gradient that they do not have
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, dfinal, _):
    x, delta, A, B, C, D, z, delta_bias, flags, saved = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dfinal = x.new_zeros((x.shape[0], *A.shape), dtype=torch.float32) if dfinal is None else dfinal
    grads = scan_cuda_backward(dy, dfinal, x, delta, A, B, C, D, z, delta_bias, flags, saved, ctx.initial)
    dx, ddelta, dA, dB, dC, dD, dz, dbias, dinitial = grads
    return (
        dx, ddelta, dA, dB, dC, dD if D is not None else None, dz if z is not None else None,
        dbias if delta_bias is not None else None, dinitial if ctx.initial else None, None, None,
    )  # fmt: skip


scan_cuda.register_autograd(_backward, setup_context=_save)
