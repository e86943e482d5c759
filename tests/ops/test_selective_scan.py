"""The reference scan against a token-by-token recurrence written independently, in float64."""

from math import exp, log1p

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from ssmoe.ops import Segments
from ssmoe.ops.reference import selective_scan

LENGTHS = (1, 2, 3, 63, 100)


def draw(b: int, length: int, d: int, n: int, *, seed: int = 0, grad: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": normal(b, length, d),
        "delta": normal(b, length, d),
        "A": -normal(d, n).exp(),
        "B": normal(b, length, n),
        "C": normal(b, length, n),
        "D": normal(d),
        "z": normal(b, length, d),
        "delta_bias": normal(d),
        "initial_state": normal(b, d, n),
    }
    return {name: tensor.requires_grad_(grad) for name, tensor in inputs.items()}


def recurrence(
    inputs: dict[str, Tensor], ids: np.ndarray | None = None, starts: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """One number at a time, straight from the definition in the design."""
    a = {name: tensor.detach().numpy() for name, tensor in inputs.items()}
    b, length, d = a["x"].shape
    n = a["A"].shape[1]
    y, h = np.zeros((b, length, d)), a["initial_state"].copy()
    for row in range(b):
        for t in range(length):
            if ids is not None and ids[row, t] < 0:
                continue
            if starts is not None and starts[row, t]:
                h[row] = 0
            for i in range(d):
                step = log1p(exp(a["delta"][row, t, i] + a["delta_bias"][i]))
                total = a["D"][i] * a["x"][row, t, i]
                for j in range(n):
                    h[row, i, j] = (
                        exp(step * a["A"][i, j]) * h[row, i, j] + step * a["B"][row, t, j] * a["x"][row, t, i]
                    )
                    total += a["C"][row, t, j] * h[row, i, j]
                gate = a["z"][row, t, i]
                y[row, t, i] = total * gate / (1 + exp(-gate))
    return torch.from_numpy(y), torch.from_numpy(h)


@pytest.mark.parametrize("length", LENGTHS)
def test_equals_the_recurrence(length: int) -> None:
    inputs = draw(2, length, 3, 4)
    y, state = selective_scan(**inputs)
    expected_y, expected_state = recurrence(inputs)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-10)


def test_without_the_optional_inputs() -> None:
    inputs = draw(2, 5, 3, 4)
    bare = {name: inputs[name] for name in ("x", "delta", "A", "B", "C")}
    y, _ = selective_scan(**bare)
    neutral = {
        **inputs,
        "D": torch.zeros(3, dtype=torch.float64),
        # silu(z) = 1 at this z
        "z": torch.full_like(inputs["z"], 1.2784645427610738),
        "delta_bias": torch.zeros(3, dtype=torch.float64),
        "initial_state": torch.zeros(2, 3, 4, dtype=torch.float64),
    }
    torch.testing.assert_close(y, recurrence(neutral)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 5, 33])
def test_gradients_of_every_input_and_the_final_state(length: int) -> None:
    inputs = draw(2, length, 2, 3, grad=True)
    names = list(inputs)

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(names, values, strict=True)))

    assert gradcheck(scan, tuple(inputs.values()))


def test_gradients_with_segments() -> None:
    inputs = draw(2, 6, 2, 2, grad=True)
    names = list(inputs)
    segments = Segments(*documents())

    def scan(*values: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(**dict(zip(names, values, strict=True)), segments=segments)

    assert gradcheck(scan, tuple(inputs.values()))


def documents() -> tuple[Tensor, Tensor]:
    """Two rows of six: two documents after a continued one; padding on both sides of a start."""
    ids = torch.tensor([[0, 0, 1, 1, 2, 2], [-1, 0, 0, -1, 1, -1]], dtype=torch.int32)
    starts = torch.tensor([[0, 0, 1, 0, 1, 0], [1, 0, 0, 0, 1, 0]], dtype=torch.bool)
    return ids, starts


def test_segments_reset_and_skip() -> None:
    ids, starts = documents()
    inputs = draw(2, 6, 3, 4, seed=1)
    y, state = selective_scan(**inputs, segments=Segments(ids, starts))
    expected_y, expected_state = recurrence(inputs, ids.numpy(), starts.numpy() & (ids.numpy() >= 0))
    torch.testing.assert_close(y, expected_y, rtol=0, atol=1e-10)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=1e-10)


def test_padding_may_hold_anything() -> None:
    ids, starts = documents()
    inputs = draw(2, 6, 3, 4, seed=1)
    expected = selective_scan(**inputs, segments=Segments(ids, starts))
    for name in ("x", "delta", "B", "C", "z"):
        inputs[name][ids < 0] = float("nan")
    found = selective_scan(**inputs, segments=Segments(ids, starts))
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


def test_chunks_of_segments_equal_the_whole() -> None:
    ids, starts = documents()
    inputs = draw(2, 6, 3, 4, seed=2)
    whole = selective_scan(**inputs, segments=Segments(ids, starts))
    state, parts = inputs["initial_state"], []
    for begin, end in ((0, 1), (1, 4), (4, 6)):
        piece = {
            name: tensor[:, begin:end] if name in {"x", "delta", "B", "C", "z"} else tensor
            for name, tensor in inputs.items()
        }
        piece["initial_state"] = state
        y, state = selective_scan(**piece, segments=Segments(ids, starts).slice(begin, end))
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(state, whole[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    inputs = draw(2, 20, 3, 4)
    expected, _ = selective_scan(**inputs)
    narrow = {
        name: t.to(dtype) if name in {"x", "delta", "B", "C", "z"} else t.float()
        for name, t in inputs.items()
    }
    y, state = selective_scan(**narrow)
    assert y.dtype == dtype
    assert state.dtype == torch.float32
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    assert (y.double() - expected).abs().max() <= tolerance * expected.abs().max()


def test_pooled_states() -> None:
    inputs = draw(2, 4, 3, 4)
    expected_y, expected_state = selective_scan(**inputs)
    pool = torch.full((5, 3, 4), 7.0, dtype=torch.float64)
    slots = torch.tensor([3, 1])
    pool[slots] = inputs.pop("initial_state")
    y, returned = selective_scan(**inputs, initial_state=pool, slots=slots, out_state=pool)
    assert torch.equal(y, expected_y)
    assert returned is pool
    assert torch.equal(pool[slots], expected_state)
    assert (pool[[0, 2, 4]] == 7).all()


def test_out_state_without_slots_may_alias() -> None:
    inputs = draw(2, 4, 3, 4)
    expected = selective_scan(**inputs)[1]
    state = inputs["initial_state"]
    assert selective_scan(**inputs, out_state=state)[1] is state
    assert torch.equal(state, expected)


def test_out_state_is_for_inference() -> None:
    inputs = draw(1, 2, 2, 2, grad=True)
    with pytest.raises(ValueError, match="no_grad"):
        selective_scan(**inputs, out_state=torch.zeros(1, 2, 2, dtype=torch.float64))


def test_a_state_of_another_shape_is_refused() -> None:
    inputs = draw(2, 4, 3, 4)
    inputs["initial_state"] = torch.zeros(1, 3, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\(1, 3, 4\), expected \(2, 3, 4\)"):
        selective_scan(**inputs)


def test_extreme_steps_stay_finite() -> None:
    inputs = {name: t.float() for name, t in draw(1, 10, 3, 4).items()}
    for delta in (-1e4, 1e4):
        inputs["delta"] = torch.full((1, 10, 3), delta)
        y, state = selective_scan(**inputs)
        assert torch.isfinite(y).all()
        assert torch.isfinite(state).all()
