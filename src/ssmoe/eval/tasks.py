"""Few-shot tasks: files of input and output pairs, shown as examples, scored by match or by likelihood."""

import json
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ssmoe.data.tokenizer import Tokenizer
from ssmoe.generation.text import generate
from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.model.state import expand
from ssmoe.ops import Segments


class Pair(NamedTuple):
    """One example of a task."""

    input: str
    output: str


class Template(NamedTuple):
    """How examples are written, one after another; `end` closes an answer and ends generation.

    The default is that of Todd et al. (arXiv 2310.15213), which State Soup's tasks come from.
    """

    question: str = "Q: {input}\nA:"
    answer: str = " {output}"
    end: str = "\n\n"

    def example(self, pair: Pair) -> str:
        """A pair with its answer."""
        return self.query(pair.input) + self.answer.replace("{output}", pair.output) + self.end

    def query(self, text: str) -> str:
        """A question alone."""
        return self.question.replace("{input}", text)


def read_task(path: str | Path) -> list[Pair]:
    """The pairs of a JSON file [{"input": ..., "output": ...}, ...]. Raises ValueError for anything else."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such task file: {path}")
    try:
        content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        pairs = [Pair(str(entry["input"]), str(entry["output"])) for entry in content]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is not a list of {{"input", "output"}} pairs ({error!r})') from error
    if not pairs:
        raise ValueError(f"{path} holds no pairs: give a task with examples")
    return pairs


def split_task(
    pairs: Sequence[Pair], *, held_out: float = 0.2, seed: int = 0
) -> tuple[list[Pair], list[Pair]]:
    """Pairs for examples and pairs for questions, at least one each, in an order fixed by `seed`.

    Pairs that share an input stay on one side, so that no question was an example.
    """

    def place(pair: Pair) -> bytes:
        return blake2b(f"{seed}:{pair.input}".encode(), digest_size=8).digest()

    inputs = sorted({place(pair) for pair in pairs})
    if len(inputs) < 2:
        raise ValueError(f"a task of {len(inputs)} inputs cannot be split: give at least 2")
    cut = inputs[min(max(1, round(held_out * len(inputs))), len(inputs) - 1)]
    ordered = sorted(pairs, key=place)
    return [p for p in ordered if place(p) >= cut], [p for p in ordered if place(p) < cut]


class TaskScore(NamedTuple):
    """exact: share of questions answered word for word. log_likelihood: mean nats of the true answers."""

    exact: float
    log_likelihood: float
    questions: int


@torch.no_grad()
def score_task(
    model: LM,
    tokenizer: Tokenizer,
    questions: Sequence[Pair],
    *,
    shots: Sequence[Pair] = (),
    state: State | None = None,
    template: Template = Template(),  # noqa: B008
    max_new_tokens: int = 16,
) -> TaskScore:
    """Ask every question after the same `shots`, or after `state` (one row), greedily.

    An answer is a hit when, stripped, it is the output. The likelihood is of the answer and its end.
    """
    if not questions:
        raise ValueError("there are no questions to ask")
    model.eval()
    rows = None if state is None else expand(state, len(questions))
    shown = "".join(template.example(pair) for pair in shots)
    prompts = [shown + template.query(pair.input) for pair in questions]
    done = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=0,
        stop=[template.end],
        state=rows,
    )
    hits = [text.strip() == pair.output.strip() for text, pair in zip(done.texts, questions, strict=True)]
    answers = [template.answer.replace("{output}", pair.output) + template.end for pair in questions]
    total = _log_likelihoods(model, tokenizer, prompts, answers, rows)
    return TaskScore(sum(hits) / len(hits), sum(total) / len(total), len(questions))


def _log_likelihoods(
    model: LM, tokenizer: Tokenizer, prompts: Sequence[str], answers: Sequence[str], state: State | None
) -> list[float]:
    opening = [] if state is not None else [tokenizer.end_id]
    heads = [[*opening, *tokenizer.encode(prompt)] for prompt in prompts]
    tails = [tokenizer.encode(answer) for answer in answers]
    lengths = [len(head) + len(tail) for head, tail in zip(heads, tails, strict=True)]
    device = model.embedding.weight.device
    segments = Segments.ragged(lengths, device=device)
    ids = torch.zeros(segments.ids.shape, dtype=torch.int64, device=device)
    for i, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids[i, : lengths[i]] = torch.tensor([*head, *tail], device=device)
    logits = model(ids, state, segments).logits
    found: list[float] = []
    for i, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        # the logits before each answer token
        logs = logits[i, len(head) - 1 : lengths[i] - 1].double().log_softmax(-1)
        found.append(logs.gather(1, torch.tensor(tail, device=device).unsqueeze(1)).sum().item())
    return found
