"""Muon's update on a CPU: a few matrices at a time, in bfloat16 where it multiplies that in hardware.

Each thread works on matrices of its own. Threads inside every product would wait for one another a thousand
times a step, which is slow as soon as another process takes a core.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from threading import Barrier
from typing import Any

import torch
from torch import Tensor

from ssmoe.ops.cpu.describe import describe
from ssmoe.ops.reference import muon_step as definition
from ssmoe.ops.reference.muon_step import Iteration

AT_ONCE = 2**20
"""Values updated together unless one matrix has more: all passes over them stay in the second cache."""

_Triple = tuple[Tensor, Tensor, Tensor]


def muon_step(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    rate: float | Tensor,
    decay: float,
    mu: float,
    iteration: Iteration,
) -> None:
    """`ssmoe.ops.reference.muon_step`; parameters and momenta keep their dtype.

    Of many small matrices a product in float32 is three to four times slower where bfloat16 is native, and
    without it the opposite holds, so the level decides.
    """
    native = describe()["level"] == "Avx512Bf16" and parameters[0].dtype == torch.float32
    update = partial(
        _update,
        rate=rate,
        decay=decay,
        mu=mu,
        iteration=iteration,
        products=torch.bfloat16 if native else None,
    )
    batches = list(_batches(parameters, gradients, momenta))
    threads = torch.get_num_threads()
    if threads == 1 or len(batches) == 1:
        for batch in batches:
            update(batch)
    else:
        list(_workers(threads).map(update, batches))


@torch.no_grad()
def _update(batch: list[_Triple], **options: Any) -> None:
    parameters, gradients, momenta = zip(*batch, strict=True)
    definition(parameters, gradients, momenta, **options)


@cache
def _workers(threads: int) -> ThreadPoolExecutor:
    """So many threads, each of which does its products alone."""
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    started = Barrier(threads)

    def start(_: int) -> None:
        started.wait()

    list(pool.map(start, range(threads)))
    # a worker's call also says with how many any new thread begins
    torch.set_num_threads(threads)
    return pool


def _batches(*tensors: Sequence[Tensor]) -> Iterator[list[_Triple]]:
    """Parameter, gradient and momentum in pieces of banks, together up to AT_ONCE values."""
    first = tensors[0][0]
    most = max(1, AT_ONCE // (first.shape[1] * first.shape[2]))
    batch: list[_Triple] = []
    held = 0
    for bank in zip(*tensors, strict=True):
        for piece in zip(*(t.split(most) for t in bank), strict=True):
            if batch and held + len(piece[0]) > most:
                yield batch
                batch, held = [], 0
            batch.append(piece)
            held += len(piece[0])
    yield batch
