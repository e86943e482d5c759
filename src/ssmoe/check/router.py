"""What a model's routers do with text: load, entropy, confidence by layer, and each token's experts."""

from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from html import escape
from math import log
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ssmoe.data.packing import Batch
from ssmoe.data.tokenizer import Tokenizer
from ssmoe.model.feedforwards.mode import token_choice
from ssmoe.model.feedforwards.router import Router, Routing
from ssmoe.model.lm import LM
from ssmoe.ops import Segments


class RouterReport(NamedTuple):
    """One router over a text. name: its layer's number, and its own name where a layer has several.

    load: assignments of each expert. max_over_mean: of the load; dead: experts without an assignment.
    load_entropy: of the load's distribution, over log(e): 1 is even. entropy: mean over the tokens of that of
    their own probabilities, over log(e). confidence: mean probability of the first choice. bias: largest less
    smallest balancing bias, 0 without one.
    """

    name: str
    load: list[int]
    max_over_mean: float
    dead: int
    load_entropy: float
    entropy: float
    confidence: float
    bias: float


class TokenChoices(NamedTuple):
    """The experts that one router gave each token of a text, best first; name as in `RouterReport`."""

    name: str
    experts: list[list[int]]


@torch.no_grad()
def inspect_routers(model: LM, batches: Iterable[Batch], *, isolate: bool = True) -> list[RouterReport]:
    """Run `model` in eval mode, dropless and as token choice, and count on its device until the end."""
    routers = named_routers(model)
    device = model.embedding.weight.device
    sums: dict[str, list[Tensor]] = {}

    def count(name: str, routing: Routing) -> None:
        stats = routing.stats
        tokens = stats.load.sum()
        seen = [stats.load, stats.entropy * tokens, stats.confidence * tokens]
        sums[name] = [a + b for a, b in zip(sums[name], seen, strict=True)] if name in sums else seen

    with _watched(model, count):
        for batch in batches:
            ids, documents, starts = (
                torch.from_numpy(array).to(device) for array in (batch.ids, batch.documents, batch.starts)
            )
            model(ids, segments=Segments(documents, starts) if isolate else None, logits="last")
    return [_report(name, routers[name], *sums[name]) for name in sums]


@torch.no_grad()
def token_choices(model: LM, ids: Sequence[int]) -> list[TokenChoices]:
    """The experts that every router of `model` gives each of `ids`, in eval mode and as token choice."""
    found: list[TokenChoices] = []

    def keep(name: str, routing: Routing) -> None:
        found.append(TokenChoices(name, routing.expert.tolist()))

    with _watched(model, keep):
        model(torch.tensor([list(ids)], device=model.embedding.weight.device), logits="last")
    return found


def named_routers(model: LM) -> dict[str, Router]:
    """Every router by its layer's number, "3", or "3.for_out" where a layer has several."""
    named: dict[str, Router] = {}
    for i, layer in enumerate(model.layers):
        modules = cast(Iterable[tuple[str, nn.Module]], layer.named_modules())
        inside = {path: module for path, module in modules if isinstance(module, Router)}
        for path, router in inside.items():
            named[str(i) if len(inside) == 1 else f"{i}.{path.rpartition('.')[2]}"] = router
    return named


def color_tokens(tokenizer: Tokenizer, ids: Sequence[int], choices: Sequence[TokenChoices]) -> str:
    """A page of its own with the text once a router, each token in the colour of its first expert."""
    stream = tokenizer.stream()
    pieces = [stream.feed(token) for token in ids]
    pieces[-1] += stream.flush()
    sections = [
        f"<h2>layer {escape(choice.name)}</h2>\n<pre>{_spans(pieces, choice.experts)}</pre>"
        for choice in choices
    ]
    return _PAGE.replace("SECTIONS", "\n".join(sections))


@contextmanager
def _watched(model: LM, use: Callable[[str, Routing], None]) -> Generator[None]:
    """While open, `use` is told what every router decides; the model is in eval mode and token choice."""
    training = model.training
    handles: list[RemovableHandle] = []
    try:
        for name, router in named_routers(model).items():

            def hook(_: nn.Module, __: object, routing: Routing, name: str = name) -> None:
                use(name, routing)

            handles.append(router.register_forward_hook(hook))
        model.eval()
        with token_choice(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)


def _report(name: str, router: Router, load: Tensor, entropy: Tensor, confidence: Tensor) -> RouterReport:
    counts = cast(list[int], load.tolist())
    total, e = max(1, sum(counts)), len(counts)
    widest = max(log(e), 1e-9)
    shares = [value / total for value in counts if value]
    return RouterReport(
        name=name,
        load=counts,
        max_over_mean=max(counts) * e / total,
        dead=counts.count(0),
        load_entropy=-sum(share * log(share) for share in shares) / widest if e > 1 else 1.0,
        entropy=float(entropy) / total / widest,
        confidence=float(confidence) / total,
        bias=0.0 if router.bias is None else float(router.bias.max() - router.bias.min()),
    )


def _spans(pieces: Sequence[str], experts: Sequence[Sequence[int]]) -> str:
    return "".join(
        f'<span style="background:hsl({chosen[0] * 137.5 % 360:.0f} 75% 82%)" '
        f'title="expert {", ".join(map(str, chosen))}">{escape(piece)}</span>'
        for piece, chosen in zip(pieces, experts, strict=True)
    )


_PAGE = """<!doctype html>
<meta charset="utf-8"><title>experts by token</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h2 { font-size: 1.05rem } pre { white-space: pre-wrap; font: 13px/1.7 ui-monospace, monospace }
span { border-radius: 2px }
</style>
<h1>experts by token</h1>
<p>One colour an expert of a layer, that of the first choice; rest on a token to see all of its experts.</p>
SECTIONS
"""
