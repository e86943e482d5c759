"""What the soup experiment measures on a trained model; every function returns plain numbers."""

import math
import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from mixture import TEMPLATE, Task, Tasks
from torch import Tensor

from ssmoe import state
from ssmoe.data.tokenizer import Tokenizer
from ssmoe.eval.tasks import Pair
from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.ops import Segments
from ssmoe.soup.capture import Memory, capture, capture_each, scans
from ssmoe.soup.mix import Method, mix
from ssmoe.soup.retrieve import similarities

SHOTS = (1, 2, 4, 8, 16, 32)
LIBRARY_SHOTS = 32
WAYS: tuple[Method, ...] = ("mean", "norm-kept", "decay", "any-order")
STATES_A_PASS = 12
TEXTS_A_PASS = 128
"""So many at once, for the sake of memory."""
Row = dict[str, Any]


class Model(NamedTuple):
    """A trained model and its tokenizer."""

    lm: LM
    tokenizer: Tokenizer

    def read(self, texts: Sequence[str]) -> list[Memory]:
        """A memory of each text, each as a document of its own."""
        ids = [[self.tokenizer.end_id, *self.tokenizer.encode(text)] for text in texts]
        parts = [ids[i : i + TEXTS_A_PASS] for i in range(0, len(ids), TEXTS_A_PASS)]
        return [memory for part in parts for memory in capture_each(self.lm, part)]


# -- few-shot accuracy ------------------------------------------------------------------------------------


def few_shot(model: Model, tasks: Tasks, *, draws: int, questions: int, seed: int = 0) -> list[Row]:
    """A row for each task, draw, number of shots and way to show them: how many questions were answered.

    All ways of one draw show the same examples, in the same order, and ask the same questions. Tasks of facts
    have two draws at most.
    """
    rows: list[Row] = []
    for group, task in ((group, task) for group, found in tasks._asdict().items() for task in found):
        for draw in range(min(draws, 2) if group == "fact" else draws):
            generator = random.Random(f"{seed} {task.name} {draw}")
            shots = generator.sample(task.shown, min(LIBRARY_SHOTS, len(task.shown)))
            asked = generator.sample(task.asked, min(questions, len(task.asked)))
            memories = ways(model, shots)
            hits = answer(model, [memory.state for memory in memories.values()], asked)
            for (way, k), found in zip(memories, hits, strict=True):
                rows.append(
                    {
                        "group": group,
                        "task": task.name,
                        "draw": draw,
                        "way": way,
                        "shots": k,
                        "hits": found,
                        "questions": len(asked),
                    }
                )
    return rows


def ways(model: Model, shots: Sequence[Pair]) -> dict[tuple[str, int], Memory]:
    """States that have seen the first k of `shots`, in sequence and mixed from one state an example."""
    examples = [TEMPLATE.example(pair) for pair in shots]
    counts = [k for k in SHOTS if k <= len(shots)]
    sequences = model.read(["".join(examples[:k]) for k in (0, *counts)])
    singles = model.read(examples)
    found: dict[tuple[str, int], Memory] = {
        ("sequence", k): memory for k, memory in zip((0, *counts), sequences, strict=True)
    }
    for k in counts[1:]:
        for way in WAYS:
            if way == "mean" or k <= (4 if way == "any-order" else 8):  # the last one's cost is cubic
                found[way, k] = mix(model.lm, singles[:k], way)
    return found


@torch.no_grad()
def answer(model: Model, states: Sequence[State], asked: Sequence[Pair]) -> list[int]:
    """How many of the questions are answered word for word after each state (of one row).

    Greedy decoding writes an answer and its end exactly where each of their tokens is the likeliest after the
    ones before it, so one pass over question and answer tells.
    """
    heads = [model.tokenizer.encode(TEMPLATE.query(pair.input)) for pair in asked]
    tails = [model.tokenizer.encode(pair.output + TEMPLATE.end) for pair in asked]
    lengths = [len(head) + len(tail) - 1 for head, tail in zip(heads, tails, strict=True)]
    device = model.lm.embedding.weight.device
    ids = torch.zeros(len(asked), max(lengths), dtype=torch.int64)
    wanted = torch.full_like(ids, -1)
    for i, (head, tail) in enumerate(zip(heads, tails, strict=True)):
        ids[i, : lengths[i]] = torch.tensor([*head, *tail[:-1]])
        wanted[i, len(head) - 1 : lengths[i]] = torch.tensor(tail)
    hits: list[int] = []
    for begin in range(0, len(states), STATES_A_PASS):
        some = states[begin : begin + STATES_A_PASS]
        rows = state.concatenate([state.expand(one, len(asked)) for one in some])
        segments = Segments.ragged(lengths * len(some), device=device)
        out = model.lm.eval()(ids.repeat(len(some), 1).to(device), rows, segments)
        right = (out.logits.argmax(-1).cpu() == wanted.repeat(len(some), 1)) | (wanted < 0).repeat(
            len(some), 1
        )
        hits += [int(found) for found in right.all(1).view(len(some), -1).sum(1)]
    return hits


# -- retrieval --------------------------------------------------------------------------------------------


Layers = tuple[int, ...]
Way = tuple[bool, Layers]
"""Whether the library's mean is subtracted, and the layers that are compared."""


def retrieval(model: Model, tasks: Sequence[Task], known: int, *, queries: int, seed: int = 0) -> Row:
    """How often the right one of `tasks` is nearest to a few examples of held-out pairs.

    The first `known` tasks were trained on; with queries of their training pairs layers, and whether the
    library's mean is subtracted, are chosen: the best accuracy, then the fewest layers.
    """
    generator = random.Random(f"retrieval {seed}")
    shown = [generator.sample(task.shown, len(task.shown)) for task in tasks]
    library = [_library_state(model, pairs[:LIBRARY_SHOTS]) for pairs in shown]
    every = tuple(scans(model.lm))
    rest = [pairs[LIBRARY_SHOTS:] for pairs in shown[:known]]
    scores = [_scores(model, generator, rest, library, every, k, queries) for k in (1, 2)]
    best = max(scores[0], key=lambda way: (scores[0][way] + scores[1][way], -len(way[1])))
    results: list[Row] = []
    for k in (1, 2, 4):
        drawn = _queries(generator, [task.asked for task in tasks], k, queries)
        cosines = _cosines(model, drawn, library, every)
        for way in dict.fromkeys((best, (False, every))):
            picked = _pick(cosines[way[0]], every, way[1])
            for i, task in enumerate(tasks):
                mine = [int(j) for j, (right, _) in zip(picked, drawn, strict=True) if right == i]
                row: Row = {"task": task.name, "known": i < known, "shots": k, "layers": way[1]}
                row |= {"centre": way[0], "right": mine.count(i), "queries": len(mine)}
                results.append(row | {"picked": [tasks[j].name for j in mine]})
    return {
        "layers": best[1],
        "centre": best[0],
        "every": every,
        "tasks": [task.name for task in tasks],
        "choice": [
            {"layer": way[1][0], "centre": way[0], "one_shot": one, "two_shot": scores[1][way]}
            for way, one in scores[0].items()
            if len(way[1]) == 1
        ],
        "results": results,
    }


def _scores(
    model: Model,
    generator: random.Random,
    pairs: Sequence[Sequence[Pair]],
    library: Sequence[Memory],
    every: Layers,
    k: int,
    queries: int,
) -> dict[Way, float]:
    """How often each way finds the right memory for k examples of `pairs`."""
    drawn = _queries(generator, pairs, k, queries)
    cosines = _cosines(model, drawn, library, every)
    right = torch.tensor([i for i, _ in drawn])
    return {
        (centre, layers): float((_pick(cosines[centre], every, layers) == right).double().mean())
        for centre in (False, True)
        for size in range(1, len(every) + 1)
        for layers in combinations(every, size)
    }


def _queries(
    generator: random.Random, pairs: Sequence[Sequence[Pair]], k: int, queries: int
) -> list[tuple[int, str]]:
    """Texts of k examples, each with the number of its task; none of a task with fewer pairs."""
    return [
        (i, "".join(TEMPLATE.example(pair) for pair in generator.sample(found, k)))
        for i, found in enumerate(pairs)
        for _ in range(queries)
        if len(found) >= k
    ]


def _library_state(model: Model, shots: Sequence[Pair]) -> Memory:
    return mix(model.lm, model.read([TEMPLATE.example(pair) for pair in shots]), "mean")


def _cosines(
    model: Model, drawn: Sequence[tuple[int, str]], library: Sequence[Memory], layers: Sequence[int]
) -> dict[bool, Tensor]:
    """(layers, queries, library), plain and with the library's mean subtracted."""
    memories = model.read([text for _, text in drawn])
    return {
        centre: torch.stack(
            [similarities(memories, library, [layer], centre=centre).cpu() for layer in layers]
        )
        for centre in (False, True)
    }


def _pick(cosines: Tensor, every: Layers, layers: Layers) -> Tensor:
    return cosines[[every.index(layer) for layer in layers]].mean(0).argmax(1)


# -- text -------------------------------------------------------------------------------------------------


def continued_text(
    model: Model, texts: Sequence[str], *, halves: Sequence[int], rest: int, rows: int, seed: int = 0
) -> list[Row]:
    """Cross-entropy of `rest` tokens of held-out text after states of the two halves before them.

    A row for each length of a half and each state: the mean in nats, the mean difference to the full state
    and the standard error of that difference.
    """
    generator = random.Random(f"text {seed}")
    found: list[Row] = []
    for half in halves:
        ids = [_tokens(generator, model.tokenizer, texts, 2 * half + rest) for _ in range(rows)]
        tokens = torch.tensor(ids, device=model.lm.embedding.weight.device)
        losses = {
            name: _after(model, one, tokens, half) for name, one in _states(model, tokens, half).items()
        }
        for name, loss in losses.items():
            gap = loss - losses["full"]
            found.append(
                {
                    "half": half,
                    "rest": rest,
                    "texts": rows,
                    "state": name,
                    "nats": float(loss.mean()),
                    "over_full": float(gap.mean()),
                    "standard_error": float(gap.std() / math.sqrt(rows)),
                    "over_decay": float((loss - losses["decay"]).mean()),
                    "over_decay_standard_error": float((loss - losses["decay"]).std() / math.sqrt(rows)),
                }
            )
    return found


def _tokens(generator: random.Random, tokenizer: Tokenizer, texts: Sequence[str], length: int) -> list[int]:
    while True:
        ids = tokenizer.encode(generator.choice(texts))
        if len(ids) >= length:
            begin = generator.randint(0, len(ids) - length)
            return ids[begin : begin + length]


def _states(model: Model, tokens: Tensor, half: int) -> dict[str, State]:
    """What has read the halves (the last token of the second is left to be fed), by how it was made."""
    opening = torch.full_like(tokens[:, :1], model.tokenizer.end_id)
    first = capture(model.lm, torch.cat((opening, tokens[:, :half]), 1))
    piece = tokens[:, half : 2 * half - 1]
    second = capture(model.lm, torch.cat((opening, piece), 1))
    bare = capture(model.lm, piece)
    mixes: dict[str, Callable[[], Memory]] = {
        "full": lambda: capture(model.lm, piece, first.state),
        "decay": lambda: mix(model.lm, [first, second], "decay"),
        "decay, second half unopened": lambda: mix(model.lm, [first, bare], "decay"),
        "any-order": lambda: mix(model.lm, [first, second], "any-order"),
        "mean": lambda: mix(model.lm, [first, second], "mean"),
        "sum": lambda: mix(model.lm, [first, second], "sum"),
        "second half only": lambda: second,
        "first half only": lambda: first,
        "nothing": lambda: capture(model.lm, opening),
    }
    return {name: make().state for name, make in mixes.items()}


@torch.no_grad()
def _after(model: Model, start: State, tokens: Tensor, half: int) -> Tensor:
    """(b,) float64: the mean loss of what follows the halves."""
    out = model.lm.eval()(tokens[:, 2 * half - 1 : -1], start)
    logs = out.logits.double().log_softmax(-1)
    return -logs.gather(2, tokens[:, 2 * half :].unsqueeze(2)).squeeze(2).mean(1).cpu()
