"""What the scan's kernels in Triton and in CUDA C++ share: buffers, and the gradient of their custom ops."""
# a custom op's fake, its context and its gradient are called by torch with what the op was given
# pyright: basic

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""Of x, delta, A, B, C, D, z, delta_bias and the initial state, empty where there is no input."""


def carries(x: Tensor, n: int, chunks: int) -> tuple[Tensor, Tensor]:
    """What leaves each chunk of the length: its state (b, chunks, d, n), the sum of its steps (b, chunks, d)."""
    b, _, d = x.shape
    b = b if chunks > 1 else 0
    states = x.new_empty((b, chunks, d, n), dtype=torch.float32)
    return states, x.new_empty((b, chunks, d), dtype=torch.float32)


class Sums(NamedTuple):
    """Gradients that every chunk of the length makes its part of, float32, empty where there is no input.

    dA: (b * chunks, d, n); dskip, dbias: (b * chunks, d); dinitial: (b, d, n).
    """

    dA: Tensor
    dskip: Tensor
    dbias: Tensor
    dinitial: Tensor

    @classmethod
    def empty(
        cls, x: Tensor, n: int, chunks: int, D: Tensor | None, delta_bias: Tensor | None, initial: bool
    ) -> "Sums":
        b, _, d = x.shape
        parts = b * chunks
        shapes = (
            (parts, d, n), (parts, d) if D is not None else (0,), (parts, d) if delta_bias is not None else (0,),
            (b, d, n) if initial else (0,),
        )  # fmt: skip
        return cls(*(x.new_empty(shape, dtype=torch.float32) for shape in shapes))

    def totals(self, A: Tensor, D: Tensor | None, delta_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of A, D and delta_bias."""
        dD = self.dskip if D is None else self.dskip.sum(0).to(D.dtype)
        dbias = self.dbias if delta_bias is None else self.dbias.sum(0).to(delta_bias.dtype)
        return self.dA.sum(0).to(A.dtype), dD, dbias


def fake_outputs(
    x: Tensor, A: Tensor, save: bool, every: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(y in `dtype`, the final state, the states before every `every`-th position if `save`)."""
    b, length, d = x.shape
    n = A.shape[1]
    y = torch.empty(b, length, d, dtype=dtype, device=x.device)
    final = x.new_empty((b, d, n), dtype=torch.float32)
    blocks = (length + every - 1) // every
    return y, final, x.new_empty((b, blocks, d, n) if save else (0,), dtype=torch.float32)


def register(forward: Any, backward: Callable[..., Gradients]) -> None:
    """Give `forward` its gradient: the op `backward`, whose fake this registers too.

    forward(x, delta, A, B, C, D, z, delta_bias, initial, flags, ...) -> (y, final, saved)
    backward(dy, dfinal, x, delta, A, B, C, D, z, delta_bias, flags, saved, initial: bool) -> Gradients
    """

    def save(ctx, inputs, output):
        *tensors, initial, flags = inputs[:10]
        ctx.save_for_backward(*tensors, flags, output[2])
        ctx.initial, ctx.settings = initial is not None, len(inputs) - 10
        ctx.mark_non_differentiable(output[2])
        # no zeros as large as the saved states for the gradient that they do not have
        ctx.set_materialize_grads(False)

    def grads(ctx, dy, dfinal, _):
        given = ctx.saved_tensors  # once: recomputation gives each saved tensor out a single time
        x, _, A, _, _, D, z, delta_bias, *_ = given
        dy = torch.zeros_like(x) if dy is None else dy
        dfinal = x.new_zeros((x.shape[0], *A.shape), dtype=torch.float32) if dfinal is None else dfinal
        found = backward(dy, dfinal, *given, ctx.initial)
        present = (True,) * 5 + (D is not None, z is not None, delta_bias is not None, ctx.initial)
        kept = [grad if there else None for grad, there in zip(found, present, strict=True)]
        return *kept, None, *(None for _ in range(ctx.settings))

    def fake(dy, dfinal, x, delta, A, B, C, D, z, delta_bias, flags, saved, initial):  # noqa: ARG001
        def like(t, shape, present=True):
            return torch.empty(shape if present else (0,), dtype=t.dtype, device=x.device)

        return (
            like(x, x.shape), like(delta, delta.shape), like(A, A.shape), like(B, B.shape), like(C, C.shape),
            like(saved if D is None else D, A.shape[:1], D is not None),
            like(x if z is None else z, x.shape, z is not None),
            like(saved if delta_bias is None else delta_bias, A.shape[:1], delta_bias is not None),
            like(saved, (x.shape[0], *A.shape), initial),
        )  # fmt: skip

    backward.register_fake(fake)  # pyright: ignore
    forward.register_autograd(grads, setup_context=save)
