"""The selective scan in CUDA C++ (`scan.cu`, compiled at run time): the custom op and how it is launched."""
# a custom op's fake, its context and its gradient are called by torch with what the op was given
# pyright: basic, reportIndexIssue=false, reportAttributeAccessIssue=false

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.ops.triton import nvrtc
from ssmoe.ops.triton.launch import cdiv, on_device, row_major
from ssmoe.ops.triton.scan_gradient import Sums, carries, fake_outputs, register

SOURCE = Path(__file__).with_name("scan.cu")
WIDTHS = (8, 16, 32)
"""State widths that the kernels are written for; others take the Triton kernels."""
LONGEST = 2**31 - 2**16
SAVED = 3 * 2**27
"""Bytes of saved states that a call keeps for its backward, rather than making more of them anew there."""


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
FORWARD_SPREAD = Cut(4, 1, 4, 128, 16, 3)
BACKWARD = Cut(4, 2, 4, 16, 4, 3)
LONG = 2560
TURN = 16
"""Tiles that a block of the backward walks before another goes on with its channels."""
MULTIPROCESSORS = 128
"""As many as are filled at once: an H200 has 132."""


def covers(x: Tensor, A: Tensor) -> bool:
    """Whether these kernels take the scan; decided before anything is launched."""
    return x.is_cuda and A.shape[-1] in WIDTHS and x.shape[1] <= LONGEST and nvrtc.available()


def forward_cut(b: int, d: int, n: int, saved_every: int) -> Cut:
    """One channel a lane where that makes between half a wave and all of one.

    Its tiles are half as long for wide states, which need the room, and where many states are saved, which is faster.
    """
    if not 0.5 <= _waves(FORWARD_SPREAD, b, d) <= 1:
        return FORWARD
    halved = n > 16 or 0 < saved_every < 8
    return FORWARD_SPREAD._replace(tile=FORWARD_SPREAD.tile // 2) if halved else FORWARD_SPREAD


def backward_cut(n: int) -> Cut:
    """One channel a lane for wide states, which take as many registers."""
    return BACKWARD if n <= 16 else BACKWARD._replace(channels=1)


def saved_every(x: Tensor, A: Tensor) -> int:
    """Positions between two saved states: the closer they are, the less the backward makes anew."""
    near = BACKWARD.sub
    while near < BACKWARD.tile and 4 * x.numel() * A.shape[1] > near * SAVED:
        near *= 2
    return near


def _waves(cut: Cut, b: int, d: int) -> float:
    return b * cdiv(d, cut.block_channels) / (MULTIPROCESSORS * cut.min_blocks)


def _chunks(cut: Cut, b: int, length: int, d: int) -> int:
    """1, or how many parts the length is cut into: each of the two launches that it takes is whole waves.

    Up to three, as long as parts stay at LONG positions: the more waves, the less their ends are waited for.
    """
    waves = _waves(cut, b, d)
    if waves > 2 / 3:
        return 1
    most = max(1, min(3, int(length * waves / LONG)))
    return max(1, min(1 + int(most / waves), cdiv(length, cut.tile) // 8))


def _turns(cut: Cut, b: int, length: int, d: int) -> int:
    """1, or how many parts the length is taken in by blocks that take turns: where more than one wave is to be
    walked, so that all end together."""
    return 1 if _waves(cut, b, d) <= 1 else max(1, cdiv(length, cut.tile * TURN))


def _whole_chunks(cut: Cut, length: int, chunks: int) -> tuple[int, int]:
    """How many chunks of whole tiles there are, none of them empty, and the tiles of each."""
    tiles = cdiv(length, cut.tile)
    chunk_tiles = cdiv(tiles, chunks)
    return cdiv(tiles, chunk_tiles), chunk_tiles


def _backward_chunks(cut: Cut, length: int, chunks: int) -> tuple[int, int]:
    """The same, the last as long as what is left: half as long, since its launch has less to do beside it."""
    if chunks < 3:
        return _whole_chunks(cut, length, chunks)
    tiles = cdiv(length, cut.tile)
    chunk_tiles = cdiv(2 * tiles, 2 * chunks - 1)
    return cdiv(tiles, chunk_tiles), chunk_tiles


def _type(t: Tensor | None) -> str:
    return "bf16" if t is not None and t.dtype == torch.bfloat16 else "float"


def _aligned(w: int, *tensors: Tensor | None) -> bool:
    """Whether every row of the tensors (b, l, d) can be read in vectors of `w`."""
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


@cache
def _forward_macros(
    cut: Cut, n: int, saved_every: int, aligned: bool, segments: bool, gated: bool, types: tuple[str, ...]
) -> nvrtc.Macros:
    named = dict(zip(("XT", "DT", "ZT", "BT", "CT"), types, strict=True))
    flags = {"FORWARD": 1, "CKPT": saved_every, "ALIGNED": aligned, "SEGMENTS": segments, "HAS_Z": gated}
    return _macros(cut, n, **flags, **named)


def backward_shared(cut: Cut, n: int, aligned: bool, segments: bool, rows: tuple[Tensor, ...]) -> int:
    """Bytes of the backward's `Shared`. rows: x, delta, dy and, where there is one, z."""
    channels, owned = cut.warps * cut.tile * (32 // cut.lanes) * cut.channels, cut.tile // cut.lanes
    own = 1 + segments + (len(rows) > 3)
    staged = 4 * cut.tile * n + cut.warps * (8 // cut.lanes) * cut.tile * (2 * n + 8)
    kept = cut.tile // cut.sub * cut.channels * 32 * cut.warps * (n // cut.lanes)
    packed = [cdiv(t.element_size() * cut.channels, 4) if aligned else cut.channels for t in rows]
    # without a gate one word a lane stands in its place
    raw = owned * sum(packed) + (0 if len(rows) > 3 else cut.channels)
    return 4 * (4 + staged + channels * (3 + own) + kept + raw * 32 * cut.warps)


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
    states, steps = carries(x, n, chunks)
    aligned = _aligned(cut.channels, x, delta, z)
    types = (_type(x), _type(delta), _type(z), _type(B), _type(C))
    macros = _forward_macros(cut, n, saved_every, aligned, flags is not None, z is not None, types)
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
    saved_every: int,
    in_turn: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`scan_gradient.Gradients` from the states before every `saved_every`-th position.

    in_turn: the chunks of a channel are walked one after the other by whatever block is free, all in one launch.
    """
    b, length, d = x.shape
    n = A.shape[1]
    like = {"dtype": torch.float32, "device": x.device}
    x, delta, B, C, dy = (row_major(t) for t in (x, delta, B, C, dy.to(x.dtype)))
    z = None if z is None else row_major(z)
    groups = cdiv(d, cut.block_channels)
    chunks, chunk_tiles = (_whole_chunks if in_turn else _backward_chunks)(cut, length, chunks)
    dx = torch.empty(b, length, d, dtype=x.dtype, device=x.device)
    ddelta = torch.empty(b, length, d, dtype=delta.dtype, device=x.device)
    dz = x.new_empty(0) if z is None else torch.empty(b, length, d, dtype=z.dtype, device=x.device)
    partial = torch.empty(groups, b, length, 2 * n, **like)
    parts = 1 if in_turn else chunks
    sums = Sums.empty(x, n, parts, D, delta_bias, initial)
    states, steps = carries(x, n, chunks if not in_turn else 1)
    if in_turn:
        states = torch.empty(b, d, n, **like)
    blocks = b * groups * (chunks if in_turn else max(1, chunks - 1))
    sizes = [1, b * groups, b * chunks] if in_turn else [0, 0, 0]
    begun, turns, done = torch.zeros(sum(sizes), dtype=torch.int32, device=x.device).split(sizes)
    dB = torch.empty(b, length, n, dtype=B.dtype, device=x.device)
    dC = torch.empty(b, length, n, dtype=C.dtype, device=x.device)
    aligned = _aligned(cut.channels, x, delta, z, dy)
    shared = backward_shared(
        cut, n, aligned, flags is not None, (x, delta, dy) if z is None else (x, delta, dy, z)
    )
    macros = _macros(
        cut, n, BACKWARD=1, CKPT=saved_every, ALIGNED=aligned, SEGMENTS=flags is not None,
        HAS_Z=z is not None, XT=_type(x), DT=_type(delta), ZT=_type(z), BT=_type(B), CT=_type(C),
    )  # fmt: skip
    kept = [_plain(t) for t in (A, D, delta_bias, dfinal)]
    macros += (("SHARED_BYTES", str(shared)),)
    with on_device(x):
        for phase in (3,) if in_turn else (1, 2) if chunks > 1 else (0,):
            words = _words(
                x, delta, kept[0], B, C, kept[1], z, kept[2], flags, saved, dy, kept[3], states, steps,
                dx, ddelta, dz, partial, *sums, begun, turns, done, dB, dC,
                length, d, b, chunks, chunk_tiles, phase,
            )  # fmt: skip
            words += _strides(x, delta, z, B, C, dy)
            nvrtc.launch(
                SOURCE,
                "scan_backward",
                macros,
                blocks,
                32 * cut.warps,
                words,
                shared,
            )
        rows = 0 if in_turn else b * length
        totals = [torch.empty((0,) if t is None else t.shape, **like) for t in (A, D, delta_bias)]
        words = _words(partial, dB, dC, *sums[:3], *totals, groups, rows, b * parts, d)
        blocks = cdiv(d * n, 128) + 2 * cdiv(d, 32) + cdiv(rows * 2 * n, 1024)
        nvrtc.launch(SOURCE, "scan_fold", macros, blocks, 256, words)
    dA, dD, dbias = (
        total if t is None else total.to(t.dtype) for total, t in zip(totals, (A, D, delta_bias), strict=True)
    )
    return dx, ddelta, dA, dB, dC, dD, dz, dbias, sums.dinitial


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
    """(y, final state, the states before every `saved_every`-th position if `save`).

    x, delta, z: (b, l, d); A: (d, n), n in WIDTHS; B, C: (b, l, n); flags: (b, l) int8, bit 0 real, bit 1 reset.
    """
    b, length, d = x.shape
    every = saved_every(x, A) if save else 0
    cut = forward_cut(b, d, A.shape[1], every)
    chunks = _chunks(cut, b, length, d)
    return run_forward(cut, chunks, x, delta, A, B, C, D, z, delta_bias, initial, flags, every)


@scan_cuda.register_fake
def _(x, delta, A, B, C, D, z, delta_bias, initial, flags, save):  # noqa: ARG001
    return fake_outputs(x, A, save, saved_every(x, A), x.dtype)


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
    """`scan_gradient.Gradients`."""
    cut, every = backward_cut(A.shape[1]), saved_every(x, A)
    turns = _turns(cut, *x.shape)
    chunks = turns if turns > 1 else _chunks(cut, *x.shape)
    return run_backward(
        cut, chunks, dy, dfinal, x, delta, A, B, C, D, z, delta_bias, flags, saved, initial, every, turns > 1
    )


register(scan_cuda, scan_cuda_backward)
