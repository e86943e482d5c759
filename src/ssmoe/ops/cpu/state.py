"""How a CPU op receives its initial state and where the final one goes."""

import torch
from torch import Tensor


def any_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will want a backward of an op with these inputs."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def gathered(
    initial_state: Tensor | None, slots: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor | None:
    """The initial state of each row, taken out of its pool."""
    if initial_state is None:
        return None
    state = initial_state if slots is None else initial_state[slots]
    if state.shape != shape:
        raise ValueError(f"initial_state has shape {tuple(state.shape)}, expected {shape}")
    return state.to(dtype)


def in_place(
    initial_state: Tensor | None,
    out_state: Tensor,
    slots: Tensor | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> bool:
    """Whether a kernel can read and write these states where they lie."""
    states = (out_state,) if initial_state is None else (initial_state, out_state)
    rows = slice(1, None) if slots is not None else slice(None)
    return all(s.dtype == dtype and s.is_contiguous() and s.shape[rows] == shape[rows] for s in states)


def refuse_gradient() -> None:
    """Writing a state in place under autograd is an error."""
    raise ValueError("out_state is for inference: call under torch.no_grad() or leave out_state away")
