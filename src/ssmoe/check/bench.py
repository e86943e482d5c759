"""How fast a model runs here: forward, backward, training step, prefill, decoding."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch

from ssmoe.model.lm import LM


class Timing(NamedTuple):
    """seconds: median of the repeats. tokens_per_second follows from it."""

    name: str
    seconds: float
    tokens_per_second: float


def bench(model: LM, *, batch: int, context: int, decode_tokens: int = 32, repeats: int = 5) -> list[Timing]:
    """Time `model` on random tokens: rows of `context` tokens, then single tokens from the state after them.

    A model that cannot generate (`ModelConfig.why_no_generation`) has no decoding to time. The model's
    weights are changed by the training steps. Medians of `repeats` after one warm-up.
    """
    device = model.embedding.weight.device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, context + 1), generator=generator).to(device)
    inputs, targets = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def forward() -> None:
        with torch.no_grad():
            model(inputs, targets=targets)

    def backward() -> None:
        model(inputs, targets=targets).loss.total.backward()

    def step() -> None:
        backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def prefill() -> None:
        with torch.no_grad():
            model(inputs, logits="last")

    def decode() -> None:
        with torch.no_grad():
            state = model(inputs[:, :1], model.init_state(batch, decode_tokens + 1), logits="last").state
            for _ in range(decode_tokens):
                state = model(inputs[:, :1], state, logits="last").state

    model.train()
    tokens = batch * context
    rows = [
        _time("forward", forward, tokens, repeats, device),
        _time("forward + backward", backward, tokens, repeats, device),
        _time("training step", step, tokens, repeats, device),
    ]
    optimizer.zero_grad(set_to_none=True)
    model.eval()
    rows.append(_time("prefill", prefill, tokens, repeats, device))
    if model.config.why_no_generation() is None:
        rows.append(
            _time(f"decode {decode_tokens} tokens", decode, batch * (decode_tokens + 1), repeats, device)
        )
    return rows


def _time(name: str, work: Callable[[], None], tokens: int, repeats: int, device: torch.device) -> Timing:
    times: list[float] = []
    for _ in range(repeats + 1):
        begin = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(perf_counter() - begin)
    seconds = median(times[1:])
    return Timing(name, seconds, tokens / seconds)
