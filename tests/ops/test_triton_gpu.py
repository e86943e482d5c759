"""The Triton kernels on a GPU against the reference: bfloat16 and float32, odd shapes, sizes past 2^31.

One command: `python -m pytest -m gpu`. Skipped, with the reason, where there is no CUDA device.
"""

import pytest
import torch
from torch import Tensor

from ssmoe.ops import load
from ssmoe.ops.reference.cross_entropy import IGNORE
from tests.ops.triton_cases import (
    BF16,
    F32,
    Errors,
    conv_inputs,
    cross_entropy_errors,
    documents,
    embedding_errors,
    errors,
    everything,
    expert_inputs,
    head_errors,
    linear_errors,
    norm_errors,
    normals,
    projection_errors,
    reading_errors,
    route_errors,
    scan_inputs,
    sum_errors,
    wide_errors,
    without,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
# float32: exp2 and the division are approximate in their last bits
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 1e-5}


def within_twice_eager(found: Errors, dtype: torch.dtype) -> None:
    for name, (ours, eager) in found.items():
        assert ours <= 2 * eager + FLOOR[dtype], f"{name}: {ours:.1e}, eager {eager:.1e}"


@BOTH
@pytest.mark.parametrize(
    "shape",
    [
        (1, 1, 1, 1),
        (3, 100, 96, 5),
        (1, 1025, 100, 5),
        (2, 257, 40, 64),
        (2, 2, 3, 16),
        (2, 63, 33, 16),
        (1, 1025, 100, 16),
        (8, 70, 1536, 16),
        (8, 201, 1100, 16),
        (3, 300, 40, 8),
        (2, 600, 36, 32),
    ],
)
@pytest.mark.parametrize("segmented", [False, True])
def test_scan(shape: tuple[int, int, int, int], dtype: torch.dtype, segmented: bool) -> None:
    segments = documents(shape[0], shape[1], "cuda") if segmented else None
    within_twice_eager(errors("selective_scan", scan_inputs(*shape, dtype, "cuda"), segments=segments), dtype)


@BOTH
@pytest.mark.parametrize("every", [4, 8, 16])
def test_scan_with_states_saved_apart(
    every: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan_cuda = pytest.importorskip("ssmoe.ops.triton.scan_cuda", reason="needs triton: pip install triton")
    monkeypatch.setattr(scan_cuda, "saved_every", lambda *_: every)
    within_twice_eager(errors("selective_scan", scan_inputs(2, 301, 160, 16, dtype, "cuda")), dtype)


@BOTH
def test_scan_of_more_channels_than_fit_at_once(dtype: torch.dtype) -> None:
    inputs, segments = scan_inputs(26, 300, 1000, 16, dtype, "cuda"), documents(26, 300, "cuda")
    within_twice_eager(errors("selective_scan", inputs, segments=segments), dtype)
    scan = load("triton").selective_scan
    first, second = (everything(scan, inputs, {"segments": segments}) for _ in range(2))
    assert [name for name, value in first.items() if not torch.equal(value, second[name])] == []


@BOTH
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 700, 512), (65, 768), (2, 9, 5120)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype, centre: bool) -> None:
    for stream in (torch.float32, dtype):
        for add in (None, dtype):
            found = norm_errors(shape, stream, dtype, "cuda", centre=centre, add=add)
            within_twice_eager(found, dtype)


@BOTH
@pytest.mark.parametrize("shape", [(1, 2), (33, 257), (100, 50257), (5, 131073)])
def test_cross_entropy(shape: tuple[int, int], dtype: torch.dtype) -> None:
    within_twice_eager(cross_entropy_errors(*shape, dtype, "cuda"), dtype)


@BOTH
def test_cross_entropy_far_above_its_first_block(dtype: torch.dtype) -> None:
    within_twice_eager(cross_entropy_errors(5, 20000, dtype, "cuda", late=90.0), dtype)


@BOTH
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 8, 5), (700, 64, 1001), (9000, 128, 5056), (700, 64, 8190), (300, 32, 50257), (1, 8, 65536)]
)
def test_head(shape: tuple[int, int, int], dtype: torch.dtype, bias: bool) -> None:
    within_twice_eager(head_errors(*shape, dtype, "cuda", bias=bias), dtype)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 64, 8192), (300, 512, 50257), (9000, 128, 8200)])
def test_head_without_a_pass_over_logits(shape: tuple[int, int, int], bias: bool) -> None:
    within_twice_eager(head_errors(*shape, BF16, "cuda", bias=bias), BF16)
    if bias:
        within_twice_eager(head_errors(*shape, BF16, "cuda", late=300.0), BF16)


def test_head_twice_is_bitwise_equal() -> None:
    normal = normals("cuda")
    x, weight, bias = normal(9000, 128).bfloat16(), normal(8200, 128), normal(8200)
    inputs = {"x": x, "weight": weight, "bias": bias}
    targets = {"targets": torch.arange(9000, device="cuda") % 8200}
    first, second = (everything(load("triton").head_cross_entropy, inputs, dict(targets)) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_row_without_a_target_reaches_no_other() -> None:
    normal = normals("cuda")
    inputs = {"x": normal(200, 64).bfloat16(), "weight": normal(9000, 64), "bias": normal(9000)}
    targets = torch.arange(200, device="cuda")
    targets[7] = IGNORE
    good = everything(load("triton").head_cross_entropy, inputs, {"targets": targets})
    inputs["x"][7] = float("nan")
    found = everything(load("triton").head_cross_entropy, inputs, {"targets": targets})
    for name, value in good.items():
        assert torch.equal(value, found[name]), name


@pytest.mark.parametrize("often", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1000, 300, 512), (65536, 50304, 512), (5000, 7, 2100)])
def test_embedding(shape: tuple[int, int, int], often: float) -> None:
    within_twice_eager(embedding_errors(*shape, "cuda", often=often), F32)


@BOTH
@pytest.mark.parametrize("shape", [(70, 33, 20), (4096, 512, 336), (3, 64, 150), (70000, 512, 32)])
def test_wide_linear(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    within_twice_eager(wide_errors(*shape, dtype, "cuda"), dtype)


@BOTH
@pytest.mark.parametrize("shape", [(1, 8, 16), (1000, 512, 64), (999, 1024, 72), (300, 64, 500)])
def test_projections(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    within_twice_eager(projection_errors(*shape, dtype, "cuda"), dtype)


@BOTH
def test_one_projection(dtype: torch.dtype) -> None:
    within_twice_eager(linear_errors(999, 512, 72, dtype, "cuda"), dtype)


@BOTH
@pytest.mark.parametrize("shape", [(1, 1), (3, 700, 511)])
def test_the_end_of_the_stream(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    within_twice_eager(sum_errors(shape, dtype, "cuda"), dtype)


@pytest.mark.parametrize(
    ("t", "e", "k", "score", "normalise", "bias"),
    [
        (150, 5, 1, "softmax", False, False),
        (4097, 336, 8, "sigmoid", True, True),
        (9, 700, 3, "softmax", True, False),
        (65536, 32, 1, "softmax", False, False),
        (8192, 128, 4, "softmax", False, True),
        (999, 2500, 16, "sigmoid", False, False),
        (99, 40, 17, "softmax", True, False),
    ],
)
def test_routes(t: int, e: int, k: int, score: str, normalise: bool, bias: bool) -> None:
    found = route_errors(t, e, k, "cuda", score=score, normalise=normalise, bias=bias)
    within_twice_eager(found, torch.float32)


@BOTH
def test_scan_without_the_optional_inputs(dtype: torch.dtype) -> None:
    inputs = without(scan_inputs(2, 70, 48, 16, dtype, "cuda"), "D", "z", "delta_bias", "initial_state")
    within_twice_eager(errors("selective_scan", inputs), dtype)


@BOTH
@pytest.mark.parametrize(
    "shape", [(1, 1, 1, 1), (2, 2, 3, 4), (2, 63, 33, 2), (3, 300, 1030, 4), (1, 100, 64, 8)]
)
@pytest.mark.parametrize("segmented", [False, True])
def test_convolution(shape: tuple[int, int, int, int], dtype: torch.dtype, segmented: bool) -> None:
    segments = documents(shape[0], shape[1], "cuda") if segmented else None
    within_twice_eager(errors("causal_conv1d", conv_inputs(*shape, dtype, "cuda"), segments=segments), dtype)


@BOTH
@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 2, 3, 4), (3, 300, 1030, 4), (8, 2048, 1536, 4)])
@pytest.mark.parametrize("past", [False, True])
def test_convolution_of_a_reader(shape: tuple[int, int, int, int], dtype: torch.dtype, past: bool) -> None:
    within_twice_eager(reading_errors(*shape, dtype, "cuda", past=past), dtype)


@BOTH
@pytest.mark.parametrize("activation", ["relu", "relu_squared", "silu"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 16, 16, 4, 2), (100, 33, 70, 5, 1), (3000, 96, 200, 8, 2), (900, 64, 48, 64, 8)]
)
def test_experts(
    shape: tuple[int, int, int, int, int], activation: str, gated: bool, dtype: torch.dtype
) -> None:
    inputs = expert_inputs(*shape, dtype, "cuda", gated=gated)
    within_twice_eager(errors("expert_mlp", inputs, activation=activation), dtype)


@pytest.mark.parametrize(("t", "d", "f", "e"), [(5000, 64, 192, 8), (4096, 128, 256, 65)])
def test_wide_experts_with_one_choice(t: int, d: int, f: int, e: int) -> None:
    inputs = expert_inputs(t, d, f, e, 1, torch.bfloat16, "cuda")
    within_twice_eager(errors("expert_mlp", inputs, activation="relu"), torch.bfloat16)


@pytest.mark.parametrize("length", [64, 4096])
def test_strided_inputs_are_read_in_place(length: int) -> None:
    ops = load("triton")
    inputs = scan_inputs(2, length, 64, 16, torch.bfloat16, "cuda")
    wide = torch.cat((inputs["x"], inputs["z"]), dim=-1)
    expected = ops.selective_scan(**inputs)[0]
    inputs["x"], inputs["z"] = wide.chunk(2, dim=-1)
    assert torch.equal(ops.selective_scan(**inputs)[0], expected)


@pytest.mark.parametrize("length", [100, 5000])
def test_two_runs_are_bitwise_equal(length: int) -> None:
    ops = load("triton")
    scan = scan_inputs(2, length, 96, 16, torch.bfloat16, "cuda")
    conv = conv_inputs(2, length, 96, 4, torch.bfloat16, "cuda")
    experts = expert_inputs(length, 64, 96, 8, 2, torch.bfloat16, "cuda")
    for op, inputs, options in (
        (ops.selective_scan, scan, {}),
        (ops.causal_conv1d, conv, {}),
        (ops.expert_mlp, experts, {"activation": "silu"}),
    ):
        first, second = (everything(op, inputs, options) for _ in range(2))
        for name, value in first.items():
            assert torch.equal(value, second[name]), name


def test_pooled_states_are_written_in_place() -> None:
    ops = load("triton")
    inputs = scan_inputs(2, 3, 64, 16, torch.bfloat16, "cuda")
    expected_y, expected = ops.selective_scan(**inputs)
    pool = torch.full((5, 64, 16), 7.0, device="cuda")
    slots = torch.tensor([3, 1], device="cuda")
    pool[slots] = inputs.pop("initial_state")
    y, returned = ops.selective_scan(**inputs, initial_state=pool, slots=slots, out_state=pool)
    assert returned is pool
    assert torch.equal(y, expected_y)
    assert torch.equal(pool[slots], expected)
    assert (pool[[0, 2, 4]] == 7).all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiles_as_one_graph() -> None:
    ops = load("triton")
    scan = scan_inputs(2, 64, 64, 16, torch.bfloat16, "cuda")
    conv = conv_inputs(2, 64, 64, 4, torch.bfloat16, "cuda")
    experts = expert_inputs(128, 64, 96, 8, 2, torch.bfloat16, "cuda")
    route = {"expert": experts["expert"], "weight": experts["weight"], "activation": "relu"}

    def block(x: Tensor, up: Tensor) -> Tensor:
        x, _ = ops.causal_conv1d(x, conv["weight"], conv["bias"])
        x, _ = ops.selective_scan(x, scan["delta"], scan["A"], scan["B"], scan["C"], scan["D"])
        return ops.expert_mlp(x.flatten(0, 1), up, experts["down"], **route)

    def run(f: object) -> list[Tensor]:
        x, up = scan["x"].clone().requires_grad_(), experts["up"].clone().requires_grad_()
        y = f(x, up)  # pyright: ignore
        return [y, *torch.autograd.grad(y.float().square().sum(), (x, up))]

    for eager, compiled in zip(run(block), run(torch.compile(block, fullgraph=True)), strict=True):
        torch.testing.assert_close(eager, compiled, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("n", [4, 8, 16])
def test_scan_past_two_to_the_31(n: int) -> None:
    b, length, d = 3, 720_000, 1024
    assert b * length * d > 2**31
    ops = load("triton")
    normal = torch.randn
    x, delta, dy = (
        torch.empty(b, length, d, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(3)
    )
    B, C = (normal(b, length, n, device="cuda").bfloat16() for _ in range(2))
    A = -torch.rand(d, n, device="cuda") - 0.5

    def run(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        leaves = [t[rows].detach().requires_grad_() for t in (x, delta)]
        y, state = ops.selective_scan(*leaves, A, B[rows], C[rows])
        dx, ddelta = torch.autograd.grad(y, leaves, dy[rows])
        return (
            torch.stack((y[-1, -2000:], dx[-1, -2000:], ddelta[-1, -2000:])),
            state[-1].detach(),
            dx[-1, :9],
        )

    for whole, alone in zip(run(slice(0, b)), run(slice(b - 1, b)), strict=True):
        torch.testing.assert_close(whole, alone, rtol=2e-2, atol=2e-2)


@pytest.mark.slow
def test_convolution_past_two_to_the_31() -> None:
    ops = load("triton")
    x, dy = (torch.empty(3, 720_000, 1024, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    weight = torch.randn(1024, 4, device="cuda")

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        leaf = x[rows].detach().requires_grad_()
        y, _ = ops.causal_conv1d(leaf, weight)
        return y[-1].detach(), torch.autograd.grad(y, leaf, dy[rows])[0][-1]

    for whole, alone in zip(run(slice(0, 3)), run(slice(2, 3)), strict=True):
        assert torch.equal(whole, alone)


@pytest.mark.slow
def test_experts_past_two_to_the_31() -> None:
    ops = load("triton")
    t, d, f, e = 4_300_000, 512, 64, 4
    x, dy = (torch.empty(t, d, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(2))
    up, down = (torch.randn(*s, device="cuda").bfloat16() * 0.05 for s in ((e, f, d), (e, d, f)))
    expert = torch.randint(0, e, (t, 1), device="cuda", dtype=torch.int32)
    weight = torch.rand(t, 1, device="cuda")

    def run(rows: slice) -> tuple[Tensor, Tensor]:
        leaf = x[rows].detach().requires_grad_()
        y = ops.expert_mlp(leaf, up, down, expert=expert[rows], weight=weight[rows], activation="relu")
        return y[-4000:].detach(), torch.autograd.grad(y, leaf, dy[rows])[0][-4000:]

    for whole, alone in zip(run(slice(0, t)), run(slice(t - 4000, t)), strict=True):
        torch.testing.assert_close(whole, alone, rtol=2e-2, atol=2e-2)
