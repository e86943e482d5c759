"""The CPU scan against the reference: forward, final state, every gradient, and what surrounds an op."""

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


def scan(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return ops.load("cpu").selective_scan(*args, **kwargs)


def drawn(b: int, l: int, d: int, n: int, dtype: torch.dtype, full: bool, segments: Segments | None) -> Run:
    x, z, B, C = (rounded(b, l, w, dtype=dtype) for w in (d, d, n, n))
    delta = (torch.randn(b, l, d) - 3).to(dtype).double()
    A, D, bias = -torch.randn(d, n).exp().double(), rounded(d, dtype=dtype), rounded(d, dtype=dtype)
    state, dy, dstate = (
        torch.randn(b, d, n).double(),
        rounded(b, l, d, dtype=dtype),
        torch.randn(b, d, n).double(),
    )

    def run(op: Any, activation: torch.dtype, wide: torch.dtype) -> dict[str, Tensor]:
        inputs = {k: leaf(v, activation) for k, v in {"x": x, "delta": delta, "B": B, "C": C}.items()}
        inputs |= {
            k: leaf(v if full else None, wide) for k, v in {"D": D, "bias": bias, "state": state}.items()
        }
        inputs |= {"A": leaf(A, wide), "z": leaf(z if full else None, activation)}
        y, final = op(
            *(inputs[k] for k in ("x", "delta", "A", "B", "C", "D", "z", "bias")),
            initial_state=inputs["state"],
            segments=segments,
        )
        return results({"y": y, "final": final}, {"y": dy, "final": dstate}, inputs)

    return run


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    ("l", "n", "d"), [(1, 16, 37), (2, 4, 16), (63, 1, 33), (63, 64, 7), (100, 16, 130), (100, 24, 50)]
)
def test_parity(l: int, n: int, d: int, full: bool, dtype: torch.dtype) -> None:
    segments = documents(2, l) if full else None
    judge(lambda: drawn(2, l, d, n, dtype, full, segments), reference.selective_scan, scan, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("n", [1, 5, 16, 24, 30])
def test_parity_of_whole_vectors_without_a_gate(n: int, segmented: bool, dtype: torch.dtype) -> None:
    """Their outputs are written from the recurrence itself, by the last of the states."""
    segments = documents(2, 41) if segmented else None
    judge(lambda: drawn(2, 41, 32, n, dtype, False, segments), reference.selective_scan, scan, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 4, 16, 24, 64])
def test_parity_of_long_rows(n: int, dtype: torch.dtype) -> None:
    segments = documents(2, 1000)
    judge(
        lambda: drawn(2, 1000, 21, n, dtype, True, segments), reference.selective_scan, scan, dtype, repeats=1
    )


def inputs(b: int, l: int, d: int, n: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    x, delta, z = (torch.randn(b, l, d, dtype=dtype) for _ in range(3))
    B, C = torch.randn(b, l, n, dtype=dtype), torch.randn(b, l, n, dtype=dtype)
    return [x, delta, -torch.rand(d, n) - 0.1, B, C, torch.randn(d), z, torch.randn(d)]


@pytest.mark.parametrize("skip", [False, True])
def test_the_skip_with_and_without_a_gate(skip: bool) -> None:
    x, delta, A, B, C, D, z, bias = inputs(2, 35, 32, 16)
    D = D if skip else None
    for gate in (None, z):
        expected, _ = reference.selective_scan(x, delta, A, B, C, D, gate, bias)
        torch.testing.assert_close(scan(x, delta, A, B, C, D, gate, bias)[0], expected)


def test_strided_inputs_need_no_copy_to_be_right() -> None:
    x, delta, A, B, C, D, z, bias = inputs(2, 9, 24, 4)
    both = torch.cat((x, z), dim=-1)
    wide = torch.cat((delta, B, C), dim=-1)
    expected = scan(x, delta, A, B, C, D, z, bias)
    found = scan(
        both[..., :24],
        wide[..., :24],
        A.t().contiguous().t(),
        wide[..., 24:28],
        wide[..., 28:],
        D,
        both[..., 24:],
        bias,
    )
    swapped = scan(x.transpose(0, 1).contiguous().transpose(0, 1), delta, A, B, C, D, z, bias)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(swapped[0], expected[0])


@pytest.mark.parametrize("l", [1, 5])
@pytest.mark.parametrize("n", [4, 16])
def test_a_pool_of_states_is_read_and_written_at_its_slots(l: int, n: int) -> None:
    args = inputs(3, l, 20, n)
    pool, slots = torch.randn(6, 20, n), torch.tensor([4, 0, 2])
    y, final = reference.selective_scan(*args, initial_state=pool[slots])
    with torch.no_grad():
        mine = pool.clone()
        found, out = scan(*args, initial_state=mine, slots=slots, out_state=mine)
    assert out is mine
    torch.testing.assert_close(found, y)
    torch.testing.assert_close(mine[slots], final)
    assert torch.equal(mine[[1, 3, 5]], pool[[1, 3, 5]])


def test_out_state_of_another_dtype_and_under_autograd() -> None:
    args = inputs(2, 3, 5, 4)
    with torch.no_grad():
        half = torch.zeros(2, 5, 4, dtype=torch.bfloat16)
        _, out = scan(*args, out_state=half)
        torch.testing.assert_close(out, scan(*args)[1].bfloat16())
    args[0].requires_grad_()
    with pytest.raises(ValueError, match="no_grad"):
        scan(*args, out_state=half)


def test_chunks_continue_each_other() -> None:
    x, delta, A, B, C, D, z, bias = inputs(2, 70, 18, 16)
    whole, final = scan(x, delta, A, B, C, D, z, bias)
    state, parts = None, []
    for begin, end in ((0, 33), (33, 34), (34, 70)):
        s = slice(begin, end)
        y, state = scan(x[:, s], delta[:, s], A, B[:, s], C[:, s], D, z[:, s], bias, initial_state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole)
    torch.testing.assert_close(state, final)


def test_mixed_dtypes_compute_in_float32() -> None:
    args = inputs(2, 12, 10, 4)
    args[0] = args[0].bfloat16()
    y, _ = scan(*args)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, reference.selective_scan(*args)[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e2, 1e4, 1e10])
def test_extreme_inputs_stay_finite(size: float, dtype: torch.dtype) -> None:
    for sign in (-1.0, 1.0):
        x, delta, A, B, C, D, z, bias = inputs(1, 40, 32, 16, dtype)
        args = [
            x,
            torch.full_like(delta, sign * size),
            A * 50,
            B,
            C,
            D,
            torch.full_like(z, -sign * size),
            bias,
        ]
        args = [t.requires_grad_() for t in args]
        y, final = scan(*args)
        (y.sum() + final.sum()).backward()
        for t in (y, final, *(t.grad for t in args)):
            assert t is not None
            assert t.isfinite().all()


@pytest.mark.parametrize("padded", [False, True])
def test_nothing_is_read_from_padding_or_from_fresh_memory(
    padded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = True
    args = inputs(2, 40, 24, 16)
    segments = documents(2, 40)
    if padded:
        for t in (args[0], args[1], args[3], args[4], args[6]):
            t[~segments.real] = float("nan")
    args = [t.requires_grad_() for t in args]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        y, final = scan(*args, segments=segments)
        (y.sum() + final.sum()).backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert y.isfinite().all()
    assert final.isfinite().all()
    for t in args:
        assert t.grad is not None
        assert t.grad.isfinite().all()


def test_wrong_shapes_are_refused() -> None:
    x, delta, A, B, C, *_ = inputs(2, 4, 6, 3)
    with pytest.raises(RuntimeError, match="delta must have shape"):
        scan(x, delta[:, :3], A, B, C)
    with pytest.raises(ValueError, match="initial_state has shape"):
        scan(x, delta, A, B, C, initial_state=torch.zeros(2, 6, 4))


@pytest.mark.parametrize("keep", [False, True])
def test_opcheck(keep: bool) -> None:
    args = [t.requires_grad_() for t in inputs(2, 37, 11, 4)]
    segments = documents(2, 37)
    state = torch.randn(2, 11, 4, requires_grad=True)
    full = (*args, state, *segments, True)
    torch.library.opcheck(torch.ops.ssmoe.selective_scan, full)
    plain = (*(t.detach() for t in args[:5]), None, None, None, None, None, None, keep)
    torch.library.opcheck(torch.ops.ssmoe.selective_scan, plain)
    into = (*(t.detach() for t in args), None, None, None, None, False, torch.zeros(2, 11, 4))
    torch.library.opcheck(torch.ops.ssmoe.selective_scan_into, into)


def test_compiles_as_one_graph() -> None:
    args = inputs(2, 16, 8, 4)

    def f(x: Tensor, *rest: Tensor) -> Tensor:
        y, state = scan(x * 2, *rest)
        return y.sum() + state.sum()

    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    eager_in, compiled_in = ([t.clone().requires_grad_() for t in args] for _ in range(2))
    f(*eager_in).backward()
    compiled(*compiled_in).backward()
    for a, b in zip(eager_in, compiled_in, strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_same_bits_every_time() -> None:
    args = inputs(2, 100, 300, 16)
    assert torch.equal(scan(*args)[0], scan(*args)[0])
