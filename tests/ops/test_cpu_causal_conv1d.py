"""The CPU convolution against the reference."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ssmoe import ops
from ssmoe.ops import reference
from ssmoe.ops.segments import Segments
from tests.ops.parity import Run, documents, judge, leaf, results, rounded

pytestmark = pytest.mark.skipif(ops.missing("cpu") is not None, reason=str(ops.missing("cpu")))
DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def conv(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return ops.load("cpu").causal_conv1d(*args, **kwargs)


def drawn(b: int, l: int, d: int, k: int, dtype: torch.dtype, full: bool, segments: Segments | None) -> Run:
    x, weight, bias = rounded(b, l, d, dtype=dtype), torch.randn(d, k).double(), torch.randn(d).double()
    state, dy, dstate = (rounded(*s, dtype=dtype) for s in ((b, d, k - 1), (b, l, d), (b, d, k - 1)))

    def run(op: Any, activation: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
        inputs = {"x": leaf(x, activation), "weight": leaf(weight, wide)}
        inputs |= {
            "bias": leaf(bias if full else None, wide),
            "state": leaf(state if full else None, activation),
        }
        y, final = op(
            inputs["x"], inputs["weight"], inputs["bias"], initial_state=inputs["state"], segments=segments
        )
        return results({"y": y, "final": final}, {"y": dy, "final": dstate}, inputs)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("l", "k", "d"), [(1, 4, 5), (2, 4, 33), (20, 6, 16), (63, 3, 17), (100, 4, 130), (1000, 4, 9)]
)
def test_parity(l: int, k: int, d: int, full: bool, dtype: torch.dtype) -> None:
    segments = documents(3, l) if full else None
    judge(lambda: drawn(3, l, d, k, dtype, full, segments), reference.causal_conv1d, conv, dtype)


@pytest.mark.parametrize("l", [1, 2, 7])
def test_a_pool_of_states_is_read_and_written_at_its_slots(l: int) -> None:
    x, weight, bias = torch.randn(3, l, 20), torch.randn(20, 4), torch.randn(20)
    pool, slots = torch.randn(6, 20, 3), torch.tensor([4, 0, 2])
    y, final = reference.causal_conv1d(x, weight, bias, initial_state=pool[slots])
    with torch.no_grad():
        mine = pool.clone()
        found, out = conv(x, weight, bias, initial_state=mine, slots=slots, out_state=mine)
    assert out is mine
    torch.testing.assert_close(found, y)
    assert torch.equal(mine[slots], final)
    assert torch.equal(mine[[1, 3, 5]], pool[[1, 3, 5]])


def test_a_slice_of_a_wider_tensor() -> None:
    wide, weight = torch.randn(2, 9, 40), torch.randn(20, 4)
    expected = conv(wide[..., :20].contiguous(), weight)
    assert torch.equal(conv(wide[..., :20], weight)[0], expected[0])


def test_padding_is_never_read() -> None:
    x, weight = torch.randn(2, 40, 24), torch.randn(24, 4, requires_grad=True)
    segments = documents(2, 40)
    x[~segments.real] = float("nan")
    x.requires_grad_()
    y, final = conv(x, weight, segments=segments)
    (y.sum() + final.sum()).backward()
    for t in (y, final, x.grad, weight.grad):
        assert t is not None
        assert t.isfinite().all()


def test_opcheck() -> None:
    x, weight, bias = torch.randn(2, 37, 11), torch.randn(11, 4), torch.randn(11)
    state = torch.randn(2, 11, 3)
    args = [t.requires_grad_() for t in (x, weight, bias, state)]
    torch.library.opcheck(torch.ops.ssmoe.causal_conv1d, (*args, *documents(2, 37)))
    torch.library.opcheck(torch.ops.ssmoe.causal_conv1d, (*args[:2], None, None, None, None))
    into = (*(t.detach() for t in args), None, None, None, False, torch.zeros(2, 11, 3))
    torch.library.opcheck(torch.ops.ssmoe.causal_conv1d_into, into)


def test_compiles_as_one_graph() -> None:
    x, weight = torch.randn(2, 16, 8, requires_grad=True), torch.randn(8, 4)
    compiled = torch.compile(lambda x: conv(x * 2, weight)[0].sum(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), conv(x * 2, weight)[0].sum())
    compiled(x).backward()
    assert x.grad is not None
