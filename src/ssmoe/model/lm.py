"""The language model: embedding, a stack of pre-normed residual layers, head."""

from functools import partial
from typing import Literal, NamedTuple, Self, cast

import torch
from torch import Tensor, nn

from ssmoe.config.model import ModelConfig
from ssmoe.model.layer import Layer, RouterStats, State, check_dtype
from ssmoe.model.loss import Loss, model_loss
from ssmoe.model.norm import LayerNorm, Linear, RMSNorm
from ssmoe.model.stack import Residual, run
from ssmoe.ops import Ops, Segments
from ssmoe.ops.reference.cross_entropy import IGNORE


class ModelOut(NamedTuple):
    """logits: (b, l, vocab), (b, vocab) or None with targets. state: what a continuation starts from.

    stats: one RouterStats a layer, None for layers without a router. loss: with targets.
    """

    logits: Tensor | None
    state: State
    stats: tuple[RouterStats | None, ...]
    loss: Loss | None


class Embedding(nn.Embedding):
    """torch's table, read by the backend's op, which has a gradient of its own."""

    def __init__(self, vocab: int, d: int, *, ops: Ops) -> None:
        super().__init__(vocab, d)
        self.rows = ops.embedding

    def forward(self, input: Tensor) -> Tensor:
        """(...) int64 or int32 -> (..., d)"""
        return self.rows(input, self.weight)


class LM(nn.Module):
    """ids -> logits. Made by `ssmoe.build`; the stack is whatever `config.layers` lists.

    compute_dtype: what the layers compute in; None is the embedding's dtype. Parameters keep their own.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: list[Residual],
        final_norm: LayerNorm | RMSNorm | None,
        *,
        ops: Ops,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.ops = ops
        self.compute_dtype = compute_dtype
        self.trainings = 0
        self.embedding = Embedding(config.vocab_size, config.d_model, ops=ops)
        self.layers = nn.ModuleList(layers)
        self.norm = final_norm
        self.head = (
            None
            if config.tied_embeddings
            else Linear(config.d_model, config.vocab_size, bias=config.head_bias)
        )

    def forward(
        self,
        ids: Tensor,
        state: State | None = None,
        segments: Segments | None = None,
        targets: Tensor | None = None,
        logits: Literal["all", "last"] = "all",
        *,
        out_state: State | None = None,
    ) -> ModelOut:
        """Read `ids` (b, l) int64, l >= 1, after `state` (None is `init_state`).

        With `targets` (b, l) int64 (-100 is ignored, and so is padding) the loss is returned and logits are
        not kept. Nothing is shifted: the target of a position is the token after it, as in ids = rows[:, :-1]
        and targets = rows[:, 1:]. Otherwise `logits` asks for "all" (b, l, vocab) or the "last" real position
        (b, vocab).
        out_state (one position, inference): where the new state is written, so that a CUDA graph can run
        again and again; `state` itself, or another whose attention layers share its keys and values, which
        then have the room that `init_state` was asked for, and no more.
        Raises ValueError for ids that are no integers, for ids and targets outside the vocabulary (checked on
        the CPU, but not under torch.compile; a GPU stops with an assertion), and for targets of another
        shape; TypeError for ids that are no tensor and segments that are none.
        """
        if segments is not None:
            _check_segments(segments, ids)
            ids = ids.masked_fill(~segments.real, 0)
            # not kept longer than this pass: the same tensors may come with other values
            segments = segments if torch.compiler.is_compiling() else segments.noted()
        self._check(ids, state)
        if targets is not None:
            self._check_targets(targets, ids)
        _check_request(ids, state, segments, logits, out_state)
        dtype = self.compute_dtype or self.embedding.weight.dtype
        check_dtype(dtype)
        x = self.embedding(ids).to(
            torch.promote_types(dtype, torch.float32) if self.config.residual_float32 else dtype
        )
        last = partial(_last_real, segments=segments) if targets is None and logits == "last" else None
        layers = list(self.layers)
        x, end, states, stats = run(layers, x, state, segments, dtype, out_state=out_state, take=last)
        if (norm := self.norm) is not None:
            _, x = self.ops.residual_norm(x, norm.weight, norm.bias, eps=norm.eps, dtype=dtype, add=end)
        elif end is not None:
            x = self.ops.residual_sum(x, end, dtype=dtype)
        x = x.to(dtype)

        weight, bias = (
            (self.embedding.weight, None) if self.head is None else (self.head.weight, self.head.bias)
        )
        if targets is None:
            return ModelOut(self.ops.linear(x, weight, bias), states, stats, None)
        if segments is not None:
            targets = targets.masked_fill(~segments.real, IGNORE)
        loss = model_loss(x, weight, bias, targets, [s for s in stats if s is not None], self.ops)
        return ModelOut(None, states, stats, loss)

    def train(self, mode: bool = True) -> Self:
        """`trainings` counts how often it began, since a fused optimiser changes weights unseen."""
        self.trainings += int(mode and not self.training)
        return super().train(mode)

    @property
    def backend(self) -> str:
        """The name of the kernels in use, fixed when the model was built."""
        return self.ops.name

    def init_state(self, batch: int, capacity: int | None = None) -> State:
        """The state of `batch` rows before their first token: zeros, or what `learned_state` learned.

        capacity: tokens of room where a layer stores tokens.
        """
        if batch < 0:
            raise ValueError(f"batch={batch}: a state has no fewer than 0 rows")
        dtype = self.compute_dtype or self.embedding.weight.dtype
        device = self.embedding.weight.device
        layers = (cast(Layer, layer.get_submodule("layer")) for layer in self.layers)
        return tuple(layer.init_state(batch, capacity or 0, dtype, device) for layer in layers)

    def _check(self, ids: Tensor, state: State | None) -> None:
        if not torch.is_tensor(ids):
            raise TypeError(f"ids is a {type(ids).__name__}: give a tensor of shape (batch, length)")
        if ids.ndim != 2 or ids.shape[1] == 0:
            raise ValueError(f"ids has shape {tuple(ids.shape)}, expected (batch, length) with length >= 1")
        if ids.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"ids are {ids.dtype}: token numbers are int64 or int32")
        if state is not None and len(state) != len(self.layers):
            raise ValueError(
                f"the state has {len(state)} layers and the model {len(self.layers)}: another model's?"
            )
        if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in ids.aminmax())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"token id {low if low < 0 else high} is outside the vocabulary of "
                    f"{self.config.vocab_size}: use the model's own tokenizer"
                )

    def _check_targets(self, targets: Tensor, ids: Tensor) -> None:
        if targets.shape != ids.shape:
            raise ValueError(
                f"targets has shape {tuple(targets.shape)}, ids {tuple(ids.shape)}: give one each"
            )
        if targets.dtype != torch.int64:
            raise ValueError(f"targets are {targets.dtype}: give token numbers in int64, {IGNORE} for none")
        if targets.device.type == "cpu" and targets.numel() and not torch.compiler.is_compiling():
            wrong = targets[((targets < 0) & (targets != IGNORE)) | (targets >= self.config.vocab_size)]
            if wrong.numel():
                raise ValueError(
                    f"target {int(wrong[0])} is outside the vocabulary of {self.config.vocab_size}: give "
                    f"token numbers, and {IGNORE} where nothing is to be predicted"
                )


def _check_segments(segments: Segments, ids: Tensor) -> None:
    if not hasattr(segments, "starts"):
        raise TypeError(
            f"segments is a {type(segments).__name__}: make it with ssmoe.ops.Segments.packed, "
            ".padded (of a mask) or .ragged (of lengths)"
        )
    if segments.ids.shape != ids.shape or segments.starts.shape != ids.shape:
        raise ValueError(
            f"segments of {tuple(segments.ids.shape)} for ids of {tuple(ids.shape)}: slice both alike"
        )


def _check_request(
    ids: Tensor, state: State | None, segments: Segments | None, logits: str, out_state: State | None
) -> None:
    if logits not in ("all", "last"):
        raise ValueError(f"logits={logits!r} is not one of: all, last")
    if out_state is not None and (
        state is None or ids.shape[1] != 1 or segments is not None or torch.is_grad_enabled()
    ):
        raise ValueError(
            "out_state needs a state and one position a row, under torch.no_grad(): leave it away"
        )


def _last_real(x: Tensor, segments: Segments | None) -> Tensor:
    """(b, l, d) -> (b, d)"""
    if segments is None:
        return x[:, -1]
    column = torch.arange(x.shape[1], device=x.device)
    last = (column * segments.real).amax(dim=1)
    return x[torch.arange(x.shape[0], device=x.device), last]
