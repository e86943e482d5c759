"""The decoding engine: prompts of token ids through a model, one constant-size state a row.

It knows tokens only; text, stop strings and files live above it.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.generation import graph as graphs
from ssmoe.generation.pieces import Pieces
from ssmoe.generation.sampler import Sampling, sample
from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.model.mixers.attention import AttentionState
from ssmoe.model.state import alone, concatenate, expand, select, with_room
from ssmoe.ops import Segments

PREFILL_CHUNK = 2048
"""Prompts are read in pieces of this many tokens, so memory does not grow with their length."""

ROOM = 256
"""Tokens by which an attention layer's room grows."""

Accept = Callable[[int, int], bool]
"""(row, token) -> whether the row goes on."""


class Continuation(NamedTuple):
    """Where generation stopped: `state` covers `tokens` tokens, a count a row; `pending` is still unread."""

    state: State
    tokens: tuple[int, ...]
    pending: tuple[tuple[int, ...], ...]


@torch.no_grad()
def decode(
    model: LM,
    prompts: Sequence[Sequence[int]],
    accept: Accept,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    start: Continuation | None = None,
    seeds: Sequence[int] | None = None,
    graph: bool | None = None,
    batch_invariant: bool = False,
) -> Continuation:
    """Read each prompt after `start` (its pending tokens first), then sample until `accept` says stop.

    Rows of different lengths are read together; each gets what it would get alone, up to rounding. `accept`
    is called once for each new token of each row, in row order. Without `start` a prompt must hold at least
    one token. max_new_tokens is at least 1. seeds: one a row, in place of the one of `sampling`.
    graph: a CUDA graph a token; by default for every model that `graph.why_not` has no objection to.
    batch_invariant: the same bits whatever else is in the batch, since each row is read and decoded alone,
    one after another; `accept` sees them in that order.
    Raises ValueError for a model that cannot generate, or not by graphs where they are asked for.
    """
    if reason := model.config.why_no_generation():
        raise ValueError(f"this model cannot generate: {reason}")
    reason = graphs.why_not(model) if graph is not False else None
    if graph and reason:
        raise ValueError(f"graph=True: {reason}; leave graph away, or say False, to decode without")
    if start is not None:
        prompts = [(*pending, *prompt) for pending, prompt in zip(start.pending, prompts, strict=True)]
    if not all(prompts):
        raise ValueError("a prompt has no tokens: give it at least one")
    runner = graphs.runner(model) if graph is not False and reason is None else None
    go_on = partial(_go_on, model) if runner is None else runner.go_on
    pieces = None if runner is None else runner.pieces
    group = 1 if batch_invariant else len(prompts)
    ends: list[State] = []
    counts: list[int] = []
    pending: list[tuple[int, ...]] = []
    for first in range(0, len(prompts), group):
        rows = range(first, min(first + group, len(prompts)))
        state = None if start is None else start.state
        if state is not None and batch_invariant:
            state = alone(state, first)
        count = [(0 if start is None else start.tokens[row]) + len(prompts[row]) for row in rows]
        logits, state = _prefill(model, prompts[first : rows.stop], state, pieces)
        row_seeds = None if seeds is None else seeds[first : rows.stop]

        def accept_row(row: int, token: int, first: int = first) -> bool:
            return accept(first + row, token)

        found = go_on(
            logits,
            state,
            count,
            accept_row,
            sampling=sampling,
            max_new_tokens=max_new_tokens,
            seeds=row_seeds,
        )
        ends += found[0]
        pending += found[1]
        counts += count
    return Continuation(concatenate(ends), tuple(counts), tuple(pending))


def _go_on(
    model: LM,
    logits: Tensor,
    state: State,
    count: list[int],
    accept: Accept,
    *,
    sampling: Sampling,
    max_new_tokens: int,
    seeds: Sequence[int] | None,
) -> tuple[list[State], list[tuple[int, ...]]]:
    """Sample after `logits` until `accept` says stop: each row's state without its last token, and the token.

    count: tokens read, a number a row; counted on.
    """
    pending: list[tuple[int, ...]] = [()] * len(count)
    ends: list[State] = [()] * len(count)
    active = list(range(len(count)))
    caches, room = any(isinstance(layer, AttentionState) for layer in state), 0
    for made in range(1, max_new_tokens + 1):
        row_seeds = None if seeds is None else [seeds[row] for row in active]
        tokens = sample(logits, [count[row] for row in active], sampling, row_seeds)
        on = [accept(row, token) and made < max_new_tokens for row, token in zip(active, tokens, strict=True)]
        for i, row in enumerate(active):
            if not on[i]:
                pending[row] = (tokens[i],)
                ends[row] = alone(state, i)
        going = [i for i in range(len(active)) if on[i]]
        if not going:
            break
        if len(going) < len(active):
            state = select(state, going)
        active, tokens = [active[i] for i in going], [tokens[i] for i in going]
        if caches and max(count[row] for row in active) >= room:
            # a cache is written in place, and copied only where its room is used up
            room = max(count[row] for row in active) + ROOM
            state = with_room(state, room)
        column = torch.tensor(tokens, device=model.embedding.weight.device).unsqueeze(1)
        out = model(column, state, logits="last", out_state=state if caches else None)
        logits, state = out.logits, out.state
        for row in active:
            count[row] += 1
    return ends, pending


@torch.no_grad()
def read(
    model: LM,
    prompts: Sequence[Sequence[int]],
    *,
    start: Continuation | None = None,
    batch_invariant: bool = False,
) -> Continuation:
    """Read all but the last token of each prompt after `start`; the last one is left pending.

    Going on from there makes what `decode` makes of the whole. Without anything to read the state is zero.
    batch_invariant: each row alone, so that its bits do not depend on the others.
    """
    if start is not None:
        prompts = [(*pending, *prompt) for pending, prompt in zip(start.pending, prompts, strict=True)]
    if not all(prompts):
        raise ValueError("a prompt has no tokens: give it at least one")
    state = model.init_state(len(prompts)) if start is None else start.state
    rest = [prompt[:-1] for prompt in prompts]
    if batch_invariant:
        rows = [alone(state, i) for i in range(len(prompts))]
        state = concatenate(
            [_prefill(model, [row], own)[1] if row else own for row, own in zip(rest, rows, strict=True)]
        )
    elif any(rest):
        # a row of one token has nothing to read yet: padding alone leaves its state as it is
        _, state = _prefill(model, rest, state)
    before = (0,) * len(prompts) if start is None else start.tokens
    counts = tuple(n + len(prompt) - 1 for n, prompt in zip(before, prompts, strict=True))
    return Continuation(state, counts, tuple((prompt[-1],) for prompt in prompts))


def repeat(start: Continuation, n: int) -> Continuation:
    """Each row n times in a row: n continuations of the same past, which is read once."""
    tokens = tuple(count for count in start.tokens for _ in range(n))
    pending = tuple(row for row in start.pending for _ in range(n))
    return Continuation(expand(start.state, n), tokens, pending)


def _prefill(
    model: LM, prompts: Sequence[Sequence[int]], state: State | None, pieces: Pieces | None = None
) -> tuple[Tensor, State]:
    """The logits (b, vocab) after each prompt, and the state there; by graphs where `pieces` are given."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    segments = Segments.ragged(lengths) if bool((lengths != longest).any()) else None
    read_piece = partial(_read_piece, model) if pieces is None else pieces
    logits: Tensor | None = None
    for begin in range(0, longest, PREFILL_CHUNK):
        end = min(begin + PREFILL_CHUNK, longest)
        piece = None if segments is None else segments.slice(begin, end)
        found, state = read_piece(ids[:, begin:end], state, piece)
        reached = (lengths > begin).unsqueeze(1)
        logits = found if logits is None else torch.where(reached, found, logits)
    assert logits is not None
    assert state is not None
    return logits, state if pieces is None else pieces.copied(state)


def _read_piece(
    model: LM, ids: Tensor, state: State | None, segments: Segments | None
) -> tuple[Tensor, State]:
    out = model(ids, state, segments, logits="last")
    assert out.logits is not None
    return out.logits, out.state
