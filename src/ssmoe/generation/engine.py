"""The decoding engine: prompts of token ids through a model, one constant-size state a row.

It knows tokens only; text, stop strings and files live above it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.generation.sampler import Sampling, sample
from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.model.state import concatenate, expand, select
from ssmoe.ops import Segments

PREFILL_CHUNK = 2048
"""Prompts are read in pieces of this many tokens, so memory does not grow with their length."""

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
) -> Continuation:
    """Read each prompt after `start` (its pending tokens first), then sample until `accept` says stop.

    Rows of different lengths are read together; each gets what it would get alone. `accept` is called once
    for each new token of each row, in row order. Without `start` a prompt must hold at least one token.
    max_new_tokens is at least 1. seeds: one a row, in place of the one of `sampling`.
    Raises ValueError for a model that cannot generate, naming the remedy.
    """
    if reason := model.config.why_no_generation():
        raise ValueError(f"this model cannot generate: {reason}")
    if start is not None:
        prompts = [(*pending, *prompt) for pending, prompt in zip(start.pending, prompts, strict=True)]
    if not all(prompts):
        raise ValueError("a prompt has no tokens: give it at least one")
    count = [0] * len(prompts) if start is None else list(start.tokens)
    logits, state = _prefill(model, prompts, None if start is None else start.state)
    count = [n + len(prompt) for n, prompt in zip(count, prompts, strict=True)]
    pending: list[tuple[int, ...]] = [()] * len(prompts)

    active = list(range(len(prompts)))
    ends: dict[int, State] = {}
    for made in range(1, max_new_tokens + 1):
        row_seeds = None if seeds is None else [seeds[row] for row in active]
        tokens = sample(logits, [count[row] for row in active], sampling, row_seeds)
        on = [accept(row, token) and made < max_new_tokens for row, token in zip(active, tokens, strict=True)]
        for i, row in enumerate(active):
            if not on[i]:
                pending[row] = (tokens[i],)
                ends[row] = select(state, [i])
        going = [i for i in range(len(active)) if on[i]]
        if not going:
            break
        if len(going) < len(active):
            state = select(state, going)
        active, tokens = [active[i] for i in going], [tokens[i] for i in going]
        column = torch.tensor(tokens, device=model.embedding.weight.device).unsqueeze(1)
        out = model(column, state, logits="last")
        logits, state = out.logits, out.state
        for row in active:
            count[row] += 1
    joined = concatenate([ends[row] for row in range(len(prompts))])
    return Continuation(joined, tuple(count), tuple(pending))


@torch.no_grad()
def read(model: LM, prompts: Sequence[Sequence[int]], *, start: Continuation | None = None) -> Continuation:
    """Read all but the last token of each prompt after `start`; the last one is left pending.

    Going on from there makes what `decode` makes of the whole. Without anything to read the state is zero.
    """
    if start is not None:
        prompts = [(*pending, *prompt) for pending, prompt in zip(start.pending, prompts, strict=True)]
    if not all(prompts):
        raise ValueError("a prompt has no tokens: give it at least one")
    state = model.init_state(len(prompts)) if start is None else start.state
    if any(len(prompt) > 1 for prompt in prompts):
        # a row of one token has nothing to read yet: padding alone leaves its state as it is
        _, state = _prefill(model, [prompt[:-1] for prompt in prompts], state)
    before = (0,) * len(prompts) if start is None else start.tokens
    counts = tuple(n + len(prompt) - 1 for n, prompt in zip(before, prompts, strict=True))
    return Continuation(state, counts, tuple((prompt[-1],) for prompt in prompts))


def repeat(start: Continuation, n: int) -> Continuation:
    """Each row n times in a row: n continuations of the same past, which is read once."""
    tokens = tuple(count for count in start.tokens for _ in range(n))
    pending = tuple(row for row in start.pending for _ in range(n))
    return Continuation(expand(start.state, n), tokens, pending)


def _prefill(model: LM, prompts: Sequence[Sequence[int]], state: State | None) -> tuple[Tensor, State]:
    """The logits (b, vocab) after each prompt, and the state there."""
    device = model.embedding.weight.device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    longest = int(lengths.max())
    ids = torch.tensor([[*prompt, *[0] * (longest - len(prompt))] for prompt in prompts], device=device)
    segments = Segments.ragged(lengths) if bool((lengths != longest).any()) else None
    logits: Tensor | None = None
    for begin in range(0, longest, PREFILL_CHUNK):
        end = min(begin + PREFILL_CHUNK, longest)
        piece = None if segments is None else segments.slice(begin, end)
        out = model(ids[:, begin:end], state, piece, logits="last")
        state = out.state
        reached = (lengths > begin).unsqueeze(1)
        logits = out.logits if logits is None else torch.where(reached, out.logits, logits)
    assert logits is not None
    assert state is not None
    return logits, state
