"""Beam search: the likeliest continuations of each prompt, kept by selecting rows of the state."""

from collections.abc import Sequence
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from ssmoe.data.tokenizer import Tokenizer
from ssmoe.generation.engine import Continuation, read
from ssmoe.generation.sampler import check_logits
from ssmoe.generation.text import check_prompts
from ssmoe.model.lm import LM
from ssmoe.model.state import expand, select


class Hypothesis(NamedTuple):
    """A continuation. tokens: without the prompt, with the end token if it got there. log_probability: nats.

    score: log_probability / number of tokens ** length_penalty, which ranks them. text: decoded tokens.
    """

    tokens: tuple[int, ...]
    log_probability: float
    score: float
    text: str


@torch.no_grad()
def beam_search(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    beams: int = 4,
    n: int = 1,
    max_new_tokens: int = 64,
    length_penalty: float = 1.0,
    start: Continuation | None = None,
) -> list[list[Hypothesis]]:
    """The `n` best of `beams` hypotheses for each prompt, best first, each prompt as if it were alone.

    A hypothesis ends with the end token or at `max_new_tokens`. A prompt opens a document unless `start` is
    given. Raises ValueError for a model that cannot generate, for no prompts or an empty one, numbers that
    leave nothing to search, or logits that are none; TypeError for prompts that are no texts.
    """
    if reason := model.config.why_no_generation():
        raise ValueError(f"this model cannot generate: {reason}")
    check_prompts(prompts)
    if not prompts or (start is None and not all(prompts)):
        raise ValueError("a prompt is empty or there is none: give some text to continue")
    if not 1 <= n <= beams or max_new_tokens < 1:
        raise ValueError(
            f"beams={beams}, n={n}, max_new_tokens={max_new_tokens}: all at least 1 and n at most beams"
        )
    opening = [] if start is not None else [tokenizer.end_id]
    rows = [[*opening, *tokenizer.encode(prompt)] for prompt in prompts]
    found = _search(
        model.eval(),
        read(model, rows, start=start),
        beams=beams,
        steps=max_new_tokens,
        end_id=tokenizer.end_id,
        num_tokens=tokenizer.vocab_size,
    )
    ranked: list[list[Hypothesis]] = []
    for hypotheses in found:
        scored = [
            Hypothesis(tokens, total, total / len(tokens) ** length_penalty, tokenizer.decode(tokens))
            for tokens, total in hypotheses
        ]
        ranked.append(sorted(scored, key=lambda h: -h.score)[:n])
    return ranked


_Scored = tuple[tuple[int, ...], float]


def _search(
    model: LM, start: Continuation, *, beams: int, steps: int, end_id: int, num_tokens: int
) -> list[list[_Scored]]:
    """Finished hypotheses of each row of `start` and, at the last step, those still going."""
    b = len(start.pending)
    device = model.embedding.weight.device
    state = expand(start.state, beams)
    column = torch.tensor([row[0] for row in start.pending], device=device).repeat_interleave(beams)
    # at first all beams are alike, so only one of them counts
    totals = torch.full((b, beams), -inf, dtype=torch.float64)
    totals[:, 0] = 0
    texts: list[list[tuple[int, ...]]] = [[()] * beams for _ in range(b)]
    finished: list[list[_Scored]] = [[] for _ in range(b)]
    for _ in range(steps):
        out = model(column.unsqueeze(1), state, logits="last")
        values, parent, token = _best(out.logits[:, :num_tokens], totals, beams)
        column = token.flatten().to(device)
        state = select(out.state, (parent + torch.arange(b).unsqueeze(1) * beams).flatten())
        totals = values
        for row in range(b):
            texts[row] = [(*texts[row][int(p)], int(t)) for p, t in zip(parent[row], token[row], strict=True)]
            for beam in range(beams):
                total = float(totals[row, beam])
                if texts[row][beam][-1] == end_id and total > -inf:
                    finished[row].append((texts[row][beam], total))
                    totals[row, beam] = -inf
        if not bool((totals > -inf).any()):
            break
    for row in range(b):
        finished[row] += [
            (text, float(total)) for text, total in zip(texts[row], totals[row], strict=True) if total > -inf
        ]
    return finished


def _best(logits: Tensor, totals: Tensor, beams: int) -> tuple[Tensor, Tensor, Tensor]:
    """Totals, parents and tokens, (b, beams) each, of the likeliest extensions; ties go to the lower id."""
    check_logits(logits.amax(dim=1).isfinite().all())
    extended = totals.unsqueeze(-1) + logits.double().cpu().log_softmax(-1).view(*totals.shape, -1)
    vocab = extended.shape[-1]
    values, index = extended.flatten(1).sort(dim=1, descending=True, stable=True)
    return values[:, :beams].clone(), index[:, :beams] // vocab, index[:, :beams] % vocab
