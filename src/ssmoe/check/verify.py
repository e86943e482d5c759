"""The contract of every layer, checked on a user's own weights: one pass, chunks, packing, padding, files.

Every layer is run on its own, on the input that it gets in the whole model in float64, so that an error is
its own and not that of the layers below. Positions that a near-tie of a router touches may rightly differ in
float32 and are left out there.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ssmoe.check.ties import clear as clear_tokens
from ssmoe.model.feedforwards.expert_choice import ExpertChoice
from ssmoe.model.feedforwards.mot import MixtureOfTokens
from ssmoe.model.layer import LayerOut, State
from ssmoe.model.lm import LM, ModelOut, Residual
from ssmoe.model.mixers.attention import Attention
from ssmoe.model.state_file import load, save
from ssmoe.ops import Segments

WIDE_TOLERANCE = 1e-9
"""Of the reference in float64."""
NARROW_TOLERANCE = 1e-4
"""Of any backend in float32 against the reference in float64, relative to the layer's largest output."""


class Finding(NamedTuple):
    """One check of one layer, by number and kind, or of "model". Errors are relative to its own size."""

    backend: str
    layer: str
    check: str
    max_error: float
    mean_error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is a number within the tolerance."""
        return self.max_error <= self.tolerance


@torch.no_grad()
def verify(reference: LM, others: Mapping[str, LM], ids: Tensor) -> list[Finding]:
    """Check `reference` (in float64 and eval mode, on the reference backend) and `others` by backend.

    others: the same weights in float32, in eval mode. ids: (b, l) token ids, l >= 4. A layer is held to what
    its kind promises: one whose rows or positions depend on one another to less. Raises ValueError for rows
    or a length that do not fill the groups of a mixture of tokens.
    """
    config = reference.config
    for number, multiple, least, what in (
        (ids.shape[0], config.row_multiple, 1, "rows"),
        (ids.shape[1], config.length_multiple, 2, "tokens a row"),
    ):
        if number % multiple or number < least * multiple:
            raise ValueError(
                f"{number} {what} do not fill groups of {multiple}: give a multiple of {multiple}, at least "
                f"{least * multiple}"
            )
    inputs = _inputs(reference, ids)
    expected = [_run(layer, x) for layer, x in zip(_layers(reference), inputs, strict=True)]
    found: list[Finding] = []
    for name, model in {"reference float64": reference, **others}.items():
        for i, layer in enumerate(_layers(model)):
            clear = None if model is reference else clear_tokens(_layers(reference)[i], inputs[i])
            found += _check_layer(name, i, layer, inputs[i], expected[i], clear, wide=model is reference)
        found += _check_model(name, model, reference, ids)
    return found


def _check_layer(
    backend: str, i: int, layer: Residual, x: Tensor, expected: Tensor, clear: Tensor | None, *, wide: bool
) -> list[Finding]:
    x = x if wide else x.float()
    name = f"layer {i} ({type(layer.layer).__name__})"
    scale = float((expected - x.double()).abs().max().clamp(min=1e-12))
    tolerance = WIDE_TOLERANCE if wide else NARROW_TOLERANCE
    findings: list[Finding] = []
    for check in _promised(layer):
        found, real = _CHECKS[check](layer, x)
        error = (found.double() - expected).abs() / scale
        error = error[real if clear is None else real & clear]
        findings.append(Finding(backend, name, check, *_summary(error), tolerance))
    return findings


def _check_model(backend: str, model: LM, reference: LM, ids: Tensor) -> list[Finding]:
    """The whole model in chunks, in float64; on every backend a state through a file, bit for bit."""
    multiple = reference.config.length_multiple
    half = ids.shape[1] // multiple // 2 * multiple
    kept = cast(State, model(ids[:, :half]).state)
    with TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        save(kept, path, model="verify", tokens=[half] * ids.shape[0])
        loaded = load(path, model=model, model_id="verify").state
    findings: list[Finding] = []
    outputs = [_layer_outputs(model, ids[:, half:], state) for state in (kept, loaded)]
    for i, (one, other) in enumerate(zip(*outputs, strict=True)):
        name = f"layer {i} ({type(_layers(model)[i].layer).__name__})"
        findings.append(Finding(backend, name, "saved == kept", *_summary((one - other).abs().double()), 0.0))
    if model is reference and all("chunks" in _promised(layer) for layer in _layers(model)):
        whole: ModelOut = model(ids)
        rest: ModelOut = model(ids[:, half:], kept)
        assert whole.logits is not None
        assert rest.logits is not None
        error = (rest.logits - whole.logits[:, half:]).abs() / whole.logits.abs().max().clamp(min=1e-12)
        findings.append(Finding(backend, "model", "chunks", *_summary(error), WIDE_TOLERANCE))
    return findings


_Check = Callable[[Residual, Tensor], tuple[Tensor, Tensor]]
"""(layer, x) -> output (b, l, d) and where (b, l) it must be that of one pass over each row alone."""


def _one_pass(layer: Residual, x: Tensor) -> tuple[Tensor, Tensor]:
    return _run(layer, x), _everywhere(x)


def _chunks(layer: Residual, x: Tensor) -> tuple[Tensor, Tensor]:
    length = x.shape[1]
    edges = sorted({0, 1, length // 3, length // 3 + 2, length - 1, length} & set(range(length + 1)))
    return _pieces(layer, x, edges), _everywhere(x)


def _one_at_a_time(layer: Residual, x: Tensor) -> tuple[Tensor, Tensor]:
    return _pieces(layer, x, list(range(x.shape[1] + 1))), _everywhere(x)


def _packed(layer: Residual, x: Tensor) -> tuple[Tensor, Tensor]:
    """All rows end to end in one."""
    b, length, _ = x.shape
    segments = Segments.packed([[length] * b], device=x.device)
    return _run(layer, x.reshape(1, b * length, -1), segments).view_as(x), _everywhere(x)


def _padded_right(layer: Residual, x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows cut to different lengths, and other rows' values behind them."""
    b, length, _ = x.shape
    lengths = [length - i * (length // (b + 1)) for i in range(b)]
    segments = Segments.ragged(lengths, length=length, device=x.device)
    real = segments.real
    return _run(layer, torch.where(real.unsqueeze(-1), x, x.roll(1, 0)), segments), real


def _padded_left(layer: Residual, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same, padded in front; rolled back for the comparison."""
    b, length, _ = x.shape
    lengths = [length - i * (length // (b + 1)) for i in range(b)]
    segments = Segments.ragged(lengths, length=length, side="left", device=x.device)
    shifted = torch.stack([x[i].roll(length - n, 0) for i, n in enumerate(lengths)])
    out = _run(layer, shifted, segments)
    back = torch.stack([out[i].roll(n - length, 0) for i, n in enumerate(lengths)])
    return back, Segments.ragged(lengths, length=length, device=x.device).real


_CHECKS: dict[str, _Check] = {
    "one pass": _one_pass,
    "chunks": _chunks,
    "one at a time": _one_at_a_time,
    "packed": _packed,
    "padded right": _padded_right,
    "padded left": _padded_left,
}


def _promised(layer: Residual) -> tuple[str, ...]:
    """The checks that a layer of this kind must pass."""
    match layer.get_submodule("layer"):
        case MixtureOfTokens() as mixture if mixture.mode == "mixture" and mixture.group > 1:
            return _CAUSAL if mixture.axis == "batch" else _CAUSAL[:1]
        case ExpertChoice() as choice if choice.mode == "expert_choice":
            return _CAUSAL if choice.group == "position" else _CAUSAL[:1]
        case Attention() as attention if not attention.causal:
            # a row cut short, as padding has it, is another row to whoever looks ahead
            return ("one pass", "packed")
        case _:
            return tuple(_CHECKS)


_CAUSAL = ("one pass", "chunks", "one at a time")
"""What holds where rows mix but positions do not."""


def _run(layer: Residual, x: Tensor, segments: Segments | None = None) -> Tensor:
    out: LayerOut = layer(x, None, segments, x.dtype)
    return out.x


def _pieces(layer: Residual, x: Tensor, edges: list[int]) -> Tensor:
    outputs: list[Tensor] = []
    state = None
    for begin, end in pairwise(edges):
        out: LayerOut = layer(x[:, begin:end], state, None, x.dtype)
        outputs.append(out.x)
        state = out.state
    return torch.cat(outputs, dim=1)


def _inputs(model: LM, ids: Tensor) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        del module
        found.append(arguments[0])

    hooks = [layer.register_forward_pre_hook(keep) for layer in _layers(model)]
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def _layer_outputs(model: LM, ids: Tensor, state: State) -> list[Tensor]:
    found: list[Tensor] = []

    def keep(module: nn.Module, arguments: tuple[Tensor, ...], out: LayerOut) -> None:
        del module, arguments
        found.append(out.x)

    hooks = [layer.register_forward_hook(keep) for layer in _layers(model)]
    model(ids, state)
    for hook in hooks:
        hook.remove()
    return found


def _everywhere(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


def _layers(model: LM) -> list[Residual]:
    return [cast(Residual, layer) for layer in model.layers]


def _summary(error: Tensor) -> tuple[float, float]:
    # a number that is none must not pass as the largest
    if not bool(error.isfinite().all()):
        return float("inf"), float("inf")
    return (float(error.max()), float(error.mean())) if error.numel() else (0.0, 0.0)
