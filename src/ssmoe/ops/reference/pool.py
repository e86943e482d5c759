"""How an op reads its initial state and hands over its final one, pooled or not."""

import torch
from torch import Tensor


def read_state(initial_state: Tensor | None, slots: Tensor | None, zeros: Tensor) -> Tensor:
    """The initial state of each row in the dtype of `zeros`, which stands in where there is none.

    initial_state: (b, ...), or a pool (p, ...) of which row i reads entry slots[i].
    """
    if initial_state is None:
        return zeros
    state = initial_state if slots is None else initial_state[slots]
    if state.shape != zeros.shape:
        raise ValueError(f"initial_state has shape {tuple(state.shape)}, expected {tuple(zeros.shape)}")
    return state.to(zeros.dtype)


def write_state(state: Tensor, slots: Tensor | None, out_state: Tensor | None) -> Tensor:
    """`state` itself, or `out_state` after writing it there, at the rows `slots` of a pool."""
    if out_state is None:
        return state
    if torch.is_grad_enabled() and state.requires_grad:
        raise ValueError("out_state is for inference: call under torch.no_grad() or leave out_state away")
    if slots is None:
        return out_state.copy_(state)
    return out_state.index_copy_(0, slots, state.to(out_state.dtype))
