"""Cross-entropy and its gradient in CUDA C++: long rows of bfloat16 on a Hopper GPU or later (`cross_entropy.cu`)."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from ssmoe.ops.reference.cross_entropy import IGNORE
from ssmoe.ops.triton import nvrtc
from ssmoe.ops.triton.launch import on_device

SOURCE = Path(__file__).with_name("cross_entropy.cu")
THREADS, STAGES = 512, 4
SHORTEST, LONGEST = 8192, 65536
"""Columns: fewer leave threads idle, more do not fit their registers."""
MEMORY = 224 * 1024
"""Bytes of shared memory for rows, half a row a stage."""


def covers(logits: Tensor) -> bool:
    """Whether the kernel takes these rows (t, width); decided before anything is launched."""
    width, stride = logits.shape[1], logits.stride(0)
    fits = logits.dtype == torch.bfloat16 and SHORTEST <= width <= LONGEST and width % 16 == 0
    aligned = logits.stride(1) == 1 and stride % 8 == 0 and logits.data_ptr() % 16 == 0
    return logits.is_cuda and fits and aligned and _has_clusters(logits.device) and nvrtc.available()


@cache
def _has_clusters(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


def clusters(device: torch.device) -> int:
    """Of two blocks each, on every multiprocessor one block."""
    return _multiprocessors(device) // 2


@cache
def _multiprocessors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)  # pyright: ignore


def overwrite(logits: Tensor, targets: Tensor, loss: Tensor, vocab: int, sums: Tensor | None) -> None:
    """`cross_entropy.overwrite` with a gradient; sums: (at least `clusters`, width), added to.

    vocab: all of the width but fewer than 64 columns.
    """
    assert logits.shape[1] - vocab < 64
    (t, width), count = logits.shape, clusters(logits.device)
    vectors = -(-width // (16 * THREADS))
    stages = min(STAGES, MEMORY // width)
    shared = width * stages + 8 * 2 * 2 * (THREADS // 32)
    macros = (
        ("THREADS", str(THREADS)),
        ("VECTORS", str(vectors)),
        ("WIDTH", str(width // 16)),
        ("PADDED", str(int(vocab < width))),
        ("STAGES", str(stages)),
        ("SUMS", str(int(sums is not None))),
        ("SHARED_BYTES", str(shared)),
    )
    words = [
        logits.data_ptr(), targets.data_ptr(), loss.data_ptr(), 0 if sums is None else sums.data_ptr(),
        t, vocab, width, logits.stride(0), count, IGNORE,
    ]  # fmt: skip
    with on_device(logits):
        nvrtc.launch(SOURCE, "cross_entropy", macros, 2 * count, THREADS, words, shared)
