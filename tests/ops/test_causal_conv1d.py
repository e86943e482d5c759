"""The reference convolution against single numbers, windows shorter and longer than the row, segments."""

from math import exp

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from ssmoe.ops import Segments
from ssmoe.ops.reference import causal_conv1d


def draw(b: int, length: int, d: int, k: int, *, grad: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (b, length, d), "weight": (d, k), "bias": (d,), "initial_state": (b, d, k - 1)}
    return {
        name: torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_(grad)
        for name, shape in shapes.items()
    }


def by_hand(inputs: dict[str, Tensor], ids: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Keep each row's window of real tokens of the current document in a list."""
    x, weight, bias, past = (inputs[name] for name in ("x", "weight", "bias", "initial_state"))
    b, length, d = x.shape
    k = weight.shape[1]
    y, state = torch.zeros_like(x), torch.zeros_like(past)
    for row in range(b):
        for i in range(d):
            window = [float(v) for v in past[row, i]]
            for t in range(length):
                if ids[row, t] < 0:
                    continue
                if starts[row, t]:
                    window = [0.0] * (k - 1)
                full = [*window, float(x[row, t, i])]
                total = sum(float(w) * v for w, v in zip(weight[i], full, strict=True)) + float(bias[i])
                y[row, t, i] = total / (1 + exp(-total))
                window = full[1:]
            state[row, i] = torch.tensor(window, dtype=torch.float64)
    return y, state


@pytest.mark.parametrize("length", [1, 2, 3, 63])
@pytest.mark.parametrize("k", [1, 2, 4, 7])
def test_equals_single_numbers(length: int, k: int) -> None:
    inputs = draw(2, length, 3, k)
    ids = torch.zeros(2, length, dtype=torch.int32)
    expected = by_hand(inputs, ids, torch.zeros_like(ids, dtype=torch.bool))
    found = causal_conv1d(**inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    segmented = causal_conv1d(**inputs, segments=Segments(ids, torch.zeros_like(ids, dtype=torch.bool)))
    torch.testing.assert_close(segmented, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_segments_with_padding_anywhere(k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    inputs = draw(3, 12, 2, k)
    ids = torch.randint(-1, 3, (3, 12), generator=generator, dtype=torch.int32)
    ids[2] = -1  # a row of nothing but padding
    starts = torch.rand(3, 12, generator=generator) < 0.3
    expected = by_hand(inputs, ids, starts)
    inputs["x"] = inputs["x"].masked_fill((ids < 0).unsqueeze(-1), float("nan"))
    found = causal_conv1d(**inputs, segments=Segments(ids, starts))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_no_state_is_a_zero_state() -> None:
    inputs = draw(2, 5, 3, 4)
    inputs["initial_state"] = torch.zeros(2, 3, 3, dtype=torch.float64)
    expected = causal_conv1d(**inputs)
    del inputs["initial_state"]
    torch.testing.assert_close(causal_conv1d(**inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("length", [1, 2, 6])
@pytest.mark.parametrize("segmented", [False, True])
def test_gradients_states_included(length: int, segmented: bool) -> None:
    inputs = draw(2, length, 2, 4, grad=True)
    ids = torch.tensor([[0, 0, -1, 1, 1, 1], [-1, 0, 0, 0, 0, -1]], dtype=torch.int32)[:, :length]
    starts = torch.tensor([[0, 0, 0, 1, 0, 0], [0, 0, 1, 0, 0, 0]], dtype=torch.bool)[:, :length]
    segments = Segments(ids, starts) if segmented else None
    names = list(inputs)

    def conv(*values: Tensor) -> tuple[Tensor, Tensor]:
        return causal_conv1d(**dict(zip(names, values, strict=True)), segments=segments)

    assert gradcheck(conv, tuple(inputs.values()))


def test_pooled_states() -> None:
    inputs = draw(2, 3, 2, 4)
    expected_y, expected_state = causal_conv1d(**inputs)
    pool = torch.full((4, 2, 3), 7.0, dtype=torch.float64)
    slots = torch.tensor([2, 0])
    pool[slots] = inputs.pop("initial_state")
    y, returned = causal_conv1d(**inputs, initial_state=pool, slots=slots, out_state=pool)
    assert returned is pool
    assert torch.equal(y, expected_y)
    assert torch.equal(pool[slots], expected_state)
    assert (pool[[1, 3]] == 7).all()


def test_bfloat16_keeps_its_dtype() -> None:
    inputs = {name: t.bfloat16() for name, t in draw(2, 9, 3, 4).items()}
    expected, _ = causal_conv1d(**{name: t.double() for name, t in inputs.items()})
    y, state = causal_conv1d(**inputs)
    assert y.dtype == state.dtype == torch.bfloat16
    assert (y.double() - expected).abs().max() < 2e-2 * expected.abs().max()
