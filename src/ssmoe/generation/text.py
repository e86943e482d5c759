"""Text in, text out: prompts through the engine, pieces of text as they come, stop strings."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from ssmoe.data.tokenizer import Tokenizer
from ssmoe.generation.engine import Continuation, decode, read, repeat
from ssmoe.generation.sampler import Sampling
from ssmoe.model.layer import State
from ssmoe.model.lm import LM

OnText = Callable[[int, str], None]
"""(row, piece): told each piece of new text once it is certain."""

StopReason = Literal["length", "end", "stop"]


class Generated(NamedTuple):
    """texts: what follows each prompt, without the stop string or end token. tokens: the ids sampled.

    reasons: "length" (max_new_tokens), "end" (the model's end token) or "stop" (a stop string).
    continuation: pass it as `state` to go on from here.
    """

    texts: list[str]
    tokens: list[list[int]]
    reasons: list[StopReason]
    continuation: Continuation


def generate(
    model: LM,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    state: State | Continuation | None = None,
    n: int = 1,
    on_text: OnText | None = None,
    graph: bool | None = None,
    batch_invariant: bool = False,
) -> Generated:
    """Continue every prompt, each as if it were alone; `n` times, grouped by prompt, reading it once.

    The i-th of a prompt's continuations is the one that seed + i gives.

    A prompt opens a document unless `state` is given: then it goes on from there (one row a prompt, and the
    prompt may be empty after a Continuation). Raises ValueError for no prompts, an empty prompt, one string
    where a list is expected, a sampling value out of range or (on the CPU) logits that are not numbers;
    TypeError for prompts that are no texts. The model is put in eval mode.

    graph: decode by CUDA graphs, which on a GPU is the default where the model can; True raises a ValueError
    that says why where it cannot.
    batch_invariant: a prompt gets the same bits whatever other prompts there are, at the price of reading and
    continuing one after another.
    """
    if not hasattr(model, "config") or not hasattr(tokenizer, "vocab_size"):
        raise TypeError(
            f"generate takes a model and its tokenizer, not {type(model).__name__} and "
            f"{type(tokenizer).__name__}: ssmoe.load(FOLDER) gives both"
        )
    sampling = Sampling(temperature, top_k, top_p, seed, tokenizer.vocab_size).check()
    _check(prompts, max_new_tokens, stop, state)
    if n < 1:
        raise ValueError(f"n={n}: ask for at least 1 continuation of each prompt")
    start = _start(state, len(prompts))
    opening = [] if start is not None else [tokenizer.end_id]
    ids = [opening + tokenizer.encode(prompt) for prompt in prompts]
    seeds = [seed + i for _ in prompts for i in range(n)]
    if n > 1:
        start = repeat(read(model.eval(), ids, start=start, batch_invariant=batch_invariant), n)
        ids: list[list[int]] = [[] for _ in seeds]
    rows = [_Row(tokenizer, stop) for _ in ids]

    def accept(row: int, token: int) -> bool:
        piece = rows[row].add(token)
        if piece and on_text is not None:
            on_text(row, piece)
        return rows[row].reason == "length"

    end = decode(
        model.eval(),
        ids,
        accept,
        sampling=sampling,
        max_new_tokens=max_new_tokens,
        start=start,
        seeds=seeds,
        graph=graph,
        batch_invariant=batch_invariant,
    )
    for i, row in enumerate(rows):
        rest = row.finish()
        if rest and on_text is not None:
            on_text(i, rest)
    return Generated([r.text for r in rows], [r.tokens for r in rows], [r.reason for r in rows], end)


class _Row:
    """The text of one row so far; what might be the beginning of a stop string is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self.text = ""
        self.tokens: list[int] = []
        self.reason: StopReason = "length"
        self._held = ""
        self._stop = stop
        self._end_id = tokenizer.end_id
        self._stream = tokenizer.stream()

    def add(self, token: int) -> str:
        """Take a token; return the text that is now certain."""
        self.tokens.append(token)
        if token == self._end_id:
            self.reason = "end"
            return ""
        self._held += self._stream.feed(token)
        return self._release(final=False)

    def finish(self) -> str:
        """The text that was still held back."""
        if self.reason == "stop":
            return ""
        self._held += self._stream.flush()
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        found = [index for index in (self._held.find(text) for text in self._stop) if index >= 0]
        if found:
            self.reason = "stop"
            piece = self._held[: min(found)]
        else:
            keep = 0 if final else max((_overlap(self._held, text) for text in self._stop), default=0)
            piece = self._held[: len(self._held) - keep]
        self._held = self._held[len(piece) :]
        self.text += piece
        return piece


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def _start(state: State | Continuation | None, rows: int) -> Continuation | None:
    if state is None or isinstance(state, Continuation):
        return state
    return Continuation(state, (0,) * rows, ((),) * rows)


def check_prompts(prompts: Sequence[str]) -> None:
    """Raise ValueError for one string, TypeError for anything but texts."""
    if isinstance(prompts, str):
        raise ValueError("prompts is one string: give a list of prompts")
    other = [type(prompt).__name__ for prompt in prompts if not hasattr(prompt, "encode")]
    if other:
        raise TypeError(f"a prompt is a {other[0]}: give texts (tokenizer.decode makes one of token numbers)")


def _check(
    prompts: Sequence[str], max_new_tokens: int, stop: Sequence[str], state: State | Continuation | None
) -> None:
    check_prompts(prompts)
    if not prompts:
        raise ValueError("there are no prompts: give at least one")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: ask for at least 1")
    if isinstance(stop, str):
        raise ValueError(f"stop={stop!r} is one string: give a list of stop strings")
    if not all(stop):
        raise ValueError("a stop string is empty: leave it away")
    if not isinstance(state, Continuation) and not all(prompts):
        raise ValueError("the prompt is empty: give some text to continue")
    rows = None if state is None else _num_rows(state)
    if rows is not None and rows != len(prompts):
        raise ValueError(f"{len(prompts)} prompts for a state of {rows} rows: give one a row")


def _num_rows(state: State | Continuation) -> int | None:
    """None for a state without tensors, which suits any number."""
    if isinstance(state, Continuation):
        return len(state.pending)
    return next((leaf.shape[0] for layer in state for leaf in layer), None)
