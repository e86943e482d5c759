"""The Triton backend beside the reference, on any device: used by the interpreter's tests and the GPU's.

Run as a module under TRITON_INTERPRET=1, it prints the errors of every small case as JSON: the interpreter
must be chosen before triton is first imported, so those tests start a process of their own.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from ssmoe.ops import Segments, load
from ssmoe.ops.reference.cross_entropy import IGNORE, cross_entropy

Errors = dict[str, tuple[float, float]]
"""For each output and gradient: the kernels' error and eager torch's, both against float64."""


def scan_inputs(
    b: int, length: int, d: int, n: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    normal = normals(device)
    return {
        "x": normal(b, length, d).to(dtype),
        "delta": (normal(b, length, d) - 2).to(dtype),
        "A": -(normal(d, n) * 0.5).exp(),
        "B": normal(b, length, n).to(dtype),
        "C": normal(b, length, n).to(dtype),
        "D": normal(d),
        "z": normal(b, length, d).to(dtype),
        "delta_bias": normal(d),
        "initial_state": normal(b, d, n),
    }


def conv_inputs(
    b: int, length: int, d: int, k: int, dtype: torch.dtype, device: str = "cpu"
) -> dict[str, Tensor]:
    normal = normals(device)
    return {
        "x": normal(b, length, d).to(dtype),
        "weight": normal(d, k),
        "bias": normal(d),
        "initial_state": normal(b, d, k - 1).to(dtype),
    }


def expert_inputs(
    t: int, d: int, f: int, e: int, k: int, dtype: torch.dtype, device: str = "cpu", *, gated: bool = False
) -> dict[str, Tensor]:
    """The last expert gets no token, and every seventh token is dropped by all."""
    normal = normals(device)
    inputs = {
        "x": normal(t, d).to(dtype),
        "up": normal(e, f, d) / d**0.5,
        "down": normal(e, d, f) / f**0.5,
        "weight": normal(t, k).sigmoid(),
        "expert": normal(t, max(1, e - 1)).topk(k, dim=1).indices.to(torch.int32),
    }
    inputs["expert"][::7] = -1
    if gated:
        inputs["gate"] = normal(e, f, d) / d**0.5
    return inputs


def normals(device: str) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    return normal


def documents(b: int, length: int, device: str = "cpu") -> Segments:
    """Random documents with padding anywhere; some rows go on from the initial state."""
    normal = normals(device)
    ids = (normal(b, length) > -0.7).to(torch.int32) - 1
    return Segments(ids, normal(b, length) > 0.8)


def errors(name: str, inputs: dict[str, Tensor], **options: object) -> Errors:
    """Every output and gradient of one op against the reference in float64."""
    kernels, reference = getattr(load("triton"), name), getattr(load("reference"), name)
    wide = {key: t.double() if t.is_floating_point() else t for key, t in inputs.items()}
    truth = everything(reference, wide, options | ({"dtype": torch.float64} if "dtype" in options else {}))
    with poisoned():
        found = everything(kernels, inputs, options)
    eager = everything(reference, inputs, options)
    result: Errors = {}
    for key, value in truth.items():
        assert found[key].dtype == eager[key].dtype, key
        assert found[key].shape == eager[key].shape, key
        scale = value.norm().clamp(min=1e-30)
        ours, theirs = ((t.double() - value).norm() / scale for t in (found[key], eager[key]))
        result[key] = (ours.item(), theirs.item())
    return result


def wide_tile_errors(f: int, *, gated: bool) -> Errors:
    """Experts in float32 cut as a GPU cuts bfloat16, 128 rows at a time."""
    load("triton")
    module = sys.modules["ssmoe.ops.triton.expert_mlp"]
    cut = module._tilings
    with mock.patch.object(
        module, "_tilings", lambda x, *rest, **options: cut(x.bfloat16(), *rest, **options)
    ):
        inputs = expert_inputs(150, 64, f, 4, 2, torch.float32, gated=gated)
        return errors("expert_mlp", inputs, activation="silu" if gated else "relu")


def apart_errors(*, tiled: bool = False, d: int = 32, width: int = 80) -> Errors:
    """Wide experts as on a GPU: weights' gradients by torch's grouped products, or everything in tiles."""
    load("triton")
    module = sys.modules["ssmoe.ops.triton.expert_mlp"]

    def grouped(a: Tensor, b: Tensor, *, offs: Tensor) -> Tensor:
        ends = offs.tolist()
        parts = [a[:, i:j] @ b[i:j] for i, j in zip([0, *ends[:-1]], ends, strict=True)]
        return torch.stack(parts)

    tiles = module.expert_tiles
    with (
        mock.patch.object(module, "_products_apart", return_value=True),
        mock.patch.object(tiles, "fits", return_value=tiled),
        mock.patch.multiple(tiles, ROWS=64 if tiled else 128, COLUMNS=32, DEPTH=16),
        mock.patch.object(torch.nn.functional, "grouped_mm", grouped),
    ):
        inputs = expert_inputs(200, d if tiled else 24, width if tiled else 70, 4, 1, F32)
        inputs["weight"][3:5] = 0
        return errors("expert_mlp", inputs, activation="relu")


def norm_errors(
    shape: tuple[int, ...],
    stream: torch.dtype,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    centre: bool = True,
    add: torch.dtype | None = None,
) -> Errors:
    """The stream and its norm, x with a mean that the norm must take away."""
    normal = normals(device)
    inputs = {"x": (normal(*shape) + 2).to(stream), "weight": normal(shape[-1]), "bias": normal(shape[-1])}
    inputs = inputs if centre else without(inputs, "bias")
    if add is not None:
        inputs["add"] = normal(*shape).to(add)
    return errors("residual_norm", inputs, eps=1e-5, dtype=dtype)


def sum_errors(shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> Errors:
    """The end of a float32 stream."""
    normal = normals(device)
    return errors("residual_sum", {"x": normal(*shape), "add": normal(*shape).to(dtype)}, dtype=dtype)


def wide_errors(t: int, d: int, e: int, dtype: torch.dtype, device: str = "cpu") -> Errors:
    """A router's product, and the same with its input passed on."""
    normal = normals(device)
    inputs = {"x": normal(t, d).to(dtype), "weight": normal(e, d)}
    fork = errors("fork_wide", inputs)
    return errors("wide_linear", inputs) | {f"fork {name}": found for name, found in fork.items()}


def projection_errors(t: int, d: int, n: int, dtype: torch.dtype, device: str = "cpu") -> Errors:
    """Both projections of several readers."""
    normal = normals(device)
    x, weight = normal(t, d).to(dtype), normal(2 * n, d)
    split = errors("split_linear", {"x": x, "weight": weight}, sizes=(n, n))
    fork = errors("fork_linear", {"x": x, "weight": weight[:n].contiguous()})
    return {
        f"{name} {key}": found
        for name, part in (("split", split), ("fork", fork))
        for key, found in part.items()
    }


def reading_errors(
    b: int, length: int, d: int, k: int, dtype: torch.dtype, device: str = "cpu", *, past: bool
) -> Errors:
    """The convolution where no gradient is at work, of a slice as in a mixer."""
    wide = conv_inputs(b, length, 2 * d, k, dtype, device)
    inputs = {"x": wide["x"][..., :d], "weight": wide["weight"][:d], "bias": wide["bias"][:d]}
    if past:
        inputs["initial_state"] = normals(device)(b, d, k - 1).to(dtype)
    exact = {name: t.double() for name, t in inputs.items()}
    with torch.no_grad():
        ours, eager, right = (
            load(backend).causal_conv1d(**given)
            for backend, given in (("triton", inputs), ("reference", inputs), ("reference", exact))
        )
    return {
        name: (float((a - c).norm() / c.norm()), float((e - c).norm() / c.norm()))
        for name, a, e, c in zip(("y", "state"), ours, eager, right, strict=True)
    }


def linear_errors(t: int, d: int, n: int, dtype: torch.dtype, device: str = "cpu") -> Errors:
    """A projection of several rows of a batch by a float32 weight."""
    normal = normals(device)
    return errors("linear", {"x": normal(2, t, d).to(dtype), "weight": normal(n, d)})


def route_errors(
    t: int,
    e: int,
    k: int,
    device: str = "cpu",
    *,
    score: str = "softmax",
    normalise: bool = False,
    bias: bool = False,
) -> Errors:
    """Weights, sums and the gradient of the logits; experts and loads must be equal. A fifth is padding."""
    normal = normals(device)
    real = torch.arange(t, device=device) % 5 != 4
    # so far apart that float32 and float64 choose alike
    logits = (torch.argsort(normal(t, e), dim=1) - e / 2) * (6 / e)
    lead = (normal(e) > 0) * 0.5 if bias else None
    weights = [normal(t, k), normal(e), normal(1).squeeze()]

    def run(name: str, dtype: torch.dtype) -> list[Tensor]:
        leaf = logits.to(dtype).requires_grad_()
        given = None if lead is None else lead.to(dtype)
        out = load(name).route(leaf, real, given, top_k=k, score=score, normalise=normalise)
        kept = (out.weight, out.shares, out.z)
        total = torch.stack([(a * b.to(dtype)).sum() for a, b in zip(kept, weights, strict=True)]).sum()
        values = [*out[:1], *out[2:3], *kept, out.entropy, out.confidence, *torch.autograd.grad(total, leaf)]
        return [value.detach() for value in values]

    truth, eager = run("reference", torch.float64), run("reference", torch.float32)
    with poisoned():
        found = run("triton", torch.float32)
    result: Errors = {}
    for name, true, ours, theirs in zip(
        ("expert", "load", "weight", "shares", "z", "entropy", "confidence", "gradient"),
        truth,
        found,
        eager,
        strict=True,
    ):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
        if not true.is_floating_point():
            assert torch.equal(true, ours), name
            continue
        scale = true.norm().clamp(min=1e-30)
        distances = ((value.double() - true).norm() / scale for value in (ours, theirs))
        first, second = (float(distance) for distance in distances)
        result[name] = (first, second)
    return result


def embedding_errors(t: int, vocab: int, d: int, device: str = "cpu", *, often: float = 0.0) -> Errors:
    """Rows of a table; `often`: how many of the ids are one and the same."""
    normal = normals(device)
    ids = (normal(t).sigmoid() * vocab).long().clamp(max=vocab - 1)
    ids[normal(t).sigmoid() < often] = vocab // 2
    return errors("embedding", {"ids": ids, "weight": normal(vocab, d)})


def powers_errors(t: int, d: int, vocab: int, **options: Any) -> Errors:
    """`head_errors` in bfloat16 without a pass over the logits, as on a Hopper GPU, in small tiles."""
    load("triton")
    kernels = sys.modules["ssmoe.ops.triton.head_kernels"]
    with (
        mock.patch.object(kernels, "covers", return_value=True),
        mock.patch.multiple(kernels, ROWS=32, COLUMNS=64, DEPTH=16, SAMPLE=16, MANY=4),
    ):
        return head_errors(t, d, vocab, BF16, **options)


def head_errors(
    t: int,
    d: int,
    vocab: int,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    bias: bool = True,
    late: float = 0.0,
) -> Errors:
    """The head's loss and gradients, some targets ignored. late: how far some columns lie above."""
    normal = normals(device)
    targets = (normal(t, vocab)).argmax(1)
    targets[::4] = IGNORE
    inputs = {
        "x": normal(t, d).to(dtype),
        "weight": normal(vocab, d),
        "bias": normal(vocab) if bias else None,
    }
    if inputs["bias"] is not None:
        inputs["bias"][-3::2] += late
    given = {key: value for key, value in inputs.items() if value is not None}
    fixed: dict[str, object] = {"targets": targets} if bias else {"targets": targets, "bias": None}
    return errors("head_cross_entropy", given, **fixed)


def cross_entropy_errors(
    t: int, vocab: int, dtype: torch.dtype, device: str = "cpu", *, truncated: bool = False, late: float = 0.0
) -> Errors:
    """Losses and their gradient, some rows ignored, some almost certain, a column at -inf.

    late: how far the last columns lie above the others. truncated: hold our gradient against the truth
    cut to bfloat16, as the interpreter cuts.
    """
    # not at the top: the names of the cases are read where there is no triton
    from ssmoe.ops.triton.cross_entropy import cross_entropy as triton_cross_entropy

    normal = normals(device)
    logits, targets = normal(t, vocab) * 3, (normal(t, vocab) * 3).argmax(1)
    logits[::3].scatter_(1, targets[::3].unsqueeze(1), 25.0)
    logits[:, 0] = float("-inf")
    logits[:, -3:] += late
    targets = targets.clamp(min=1)
    targets[::4] = IGNORE
    narrow = logits.to(dtype)
    truth = cross_entropy(narrow.double(), targets, gradient=True)
    eager = cross_entropy(narrow.clone(), targets, gradient=True)
    with poisoned():
        found = triton_cross_entropy(narrow.clone(), targets, gradient=True)
        loss, nothing = triton_cross_entropy(narrow, targets, gradient=False)
    assert nothing is None
    assert torch.equal(loss, found[0])
    result: Errors = {}
    for name, true, ours, theirs in zip(("loss", "gradient"), truth, found, eager, strict=True):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape)
        scale = true.norm().clamp(min=1e-30)
        cut = (true.float().view(torch.int32) & -65536).view(torch.float32).double()
        goal = cut if truncated and name == "gradient" else true
        distances = ((ours.double() - goal).norm() / scale, (theirs.double() - true).norm() / scale)
        result[name] = (distances[0].item(), distances[1].item())
    return result


def everything(
    op: Callable[..., object], inputs: dict[str, Tensor], options: dict[str, object]
) -> dict[str, Tensor]:
    leaves = {
        key: t.detach().clone().requires_grad_() if t.is_floating_point() else t for key, t in inputs.items()
    }
    out = op(**leaves, **options)
    outputs = {"y": out} if isinstance(out, Tensor) else dict(zip(("y", "final_state"), out, strict=True))
    generator = torch.Generator().manual_seed(1)
    total = sum(
        (t.double() * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.device)).sum()
        for t in outputs.values()
    )
    wanted = {key: t for key, t in leaves.items() if t.is_floating_point() and t.numel()}
    gradients = torch.autograd.grad(total, list(wanted.values()))
    return outputs | {f"grad of {key}": g for key, g in zip(wanted, gradients, strict=True)}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, so that whatever a kernel leaves unwritten shows."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(t: Tensor) -> Tensor:
        return t.fill_(float("nan")) if t.is_floating_point() else t

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: fill(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k))),
    ):
        yield


F32, BF16 = torch.float32, torch.bfloat16


def without(inputs: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {key: t for key, t in inputs.items() if key not in names}


SMALL: dict[str, Callable[[], Errors]] = {
    "scan": lambda: errors("selective_scan", scan_inputs(2, 7, 5, 16, F32)),
    "scan, length 1": lambda: errors("selective_scan", scan_inputs(2, 1, 5, 4, F32)),
    "scan, length 2": lambda: errors("selective_scan", scan_inputs(1, 2, 33, 3, F32)),
    "scan, chunks": lambda: errors("selective_scan", scan_inputs(1, 133, 9, 4, F32)),
    "scan, chunks and segments": lambda: errors(
        "selective_scan", scan_inputs(1, 130, 9, 4, F32), segments=documents(1, 130)
    ),
    "scan, bare": lambda: errors(
        "selective_scan", without(scan_inputs(1, 9, 5, 4, F32), "D", "z", "delta_bias", "initial_state")
    ),
    "scan, segments": lambda: errors(
        "selective_scan", scan_inputs(3, 8, 33, 4, F32), segments=documents(3, 8)
    ),
    "scan, bfloat16": lambda: errors("selective_scan", scan_inputs(2, 7, 5, 4, BF16)),
    "convolution": lambda: errors("causal_conv1d", conv_inputs(2, 7, 5, 4, F32)),
    "convolution, length 1": lambda: errors("causal_conv1d", conv_inputs(2, 1, 5, 4, F32)),
    "convolution, longer than a span": lambda: errors("causal_conv1d", conv_inputs(1, 150, 5, 3, F32)),
    "convolution, one tap": lambda: errors("causal_conv1d", conv_inputs(2, 9, 4, 1, F32)),
    "convolution, eight taps": lambda: errors("causal_conv1d", conv_inputs(2, 19, 4, 8, F32)),
    "convolution, bare": lambda: errors(
        "causal_conv1d", without(conv_inputs(2, 9, 4, 3, F32), "bias", "initial_state")
    ),
    "convolution, segments": lambda: errors(
        "causal_conv1d", conv_inputs(3, 19, 5, 4, F32), segments=documents(3, 19)
    ),
    "convolution, bfloat16": lambda: errors("causal_conv1d", conv_inputs(2, 7, 33, 4, BF16)),
    "convolution, reading": lambda: reading_errors(2, 150, 40, 4, F32, past=False),
    "convolution, reading on": lambda: reading_errors(1, 128, 33, 3, F32, past=True),
    "convolution, reading one position on": lambda: reading_errors(3, 1, 5, 4, F32, past=True),
    "convolution, reading two positions": lambda: reading_errors(3, 2, 5, 8, F32, past=False),
    "experts, relu": lambda: errors("expert_mlp", expert_inputs(20, 24, 40, 4, 1, F32), activation="relu"),
    "experts, relu_squared": lambda: errors(
        "expert_mlp", expert_inputs(30, 33, 70, 5, 3, F32), activation="relu_squared"
    ),
    "experts, swiglu": lambda: errors(
        "expert_mlp", expert_inputs(30, 33, 40, 5, 2, F32, gated=True), activation="silu"
    ),
    "experts, swiglu, a GPU's tiles": lambda: wide_tile_errors(192, gated=True),
    "experts, relu, products apart": apart_errors,
    "experts, relu, whole tiles": lambda: apart_errors(tiled=True),
    "experts, relu, whole tiles, gradients too": lambda: apart_errors(tiled=True, d=64, width=128),
    "experts, relu, a GPU's tiles": lambda: wide_tile_errors(200, gated=False),
    "experts, many rows": lambda: errors(
        "expert_mlp", expert_inputs(150, 16, 40, 3, 1, F32), activation="silu"
    ),
    "norm, layer": lambda: norm_errors((3, 5, 33), F32, F32),
    "norm, root mean square": lambda: norm_errors((7, 2100), F32, F32, centre=False),
    "norm of a sum": lambda: norm_errors((3, 5, 33), F32, F32, add=F32),
    "norm of a sum, bfloat16 into float32": lambda: norm_errors((9, 700), F32, BF16, centre=False, add=BF16),
    "norm of a sum, bfloat16": lambda: norm_errors((9, 70), BF16, BF16, add=BF16),
    "norm, float32 to bfloat16": lambda: norm_errors((2, 9, 48), F32, BF16),
    "sum of the stream": lambda: sum_errors((3, 5, 33), F32),
    "sum of the stream, bfloat16": lambda: sum_errors((2, 70, 40), BF16),
    "wide product": lambda: wide_errors(70, 33, 20, F32),
    "wide product, bfloat16": lambda: wide_errors(140, 70, 20, BF16),
    "wide product, bfloat16, few rows": lambda: wide_errors(3, 64, 150, BF16),
    "projections": lambda: projection_errors(9, 12, 20, F32),
    "projections, bfloat16": lambda: projection_errors(150, 140, 17, BF16),
    "projections, bfloat16, wide": lambda: projection_errors(9, 12, 140, BF16),
    "one projection, bfloat16": lambda: linear_errors(21, 12, 20, BF16),
    "one projection, float32": lambda: linear_errors(21, 12, 20, F32),
    "routes, one of few": lambda: route_errors(150, 5, 1),
    "routes, sigmoid, all": lambda: route_errors(23, 12, 8, score="sigmoid", normalise=True, bias=True),
    "routes, several": lambda: route_errors(9, 700, 3, normalise=True),
    "routes, more than the kernels take": lambda: route_errors(9, 40, 17, score="sigmoid"),
    "cross-entropy": lambda: cross_entropy_errors(9, 37, F32),
    "cross-entropy, a later block far above the first": lambda: cross_entropy_errors(5, 9000, F32, late=90.0),
    "head": lambda: head_errors(21, 12, 77, F32),
    "head, no bias": lambda: head_errors(7, 5, 64, F32, bias=False),
    "head, bfloat16": lambda: head_errors(40, 33, 130, BF16),
    "head, powers, bfloat16": lambda: powers_errors(40, 64, 130),
    "head, powers, bfloat16, no bias": lambda: powers_errors(7, 32, 64, bias=False),
    "head, powers, bfloat16, out of range": lambda: powers_errors(13, 32, 150, late=200.0),
    "embedding": lambda: embedding_errors(90, 20, 33),
    "embedding, one id often": lambda: embedding_errors(300, 20, 9, often=0.8),
    "cross-entropy, several blocks": lambda: cross_entropy_errors(5, 9000, F32),
    "cross-entropy, bfloat16": lambda: cross_entropy_errors(9, 300, BF16, truncated=True),
    "experts, one token": lambda: errors(
        "expert_mlp",
        {**expert_inputs(1, 16, 16, 4, 2, F32), "expert": torch.tensor([[2, 0]])},
        activation="silu",
    ),
}


if __name__ == "__main__":
    print(json.dumps({name: case() for name, case in SMALL.items()}))
