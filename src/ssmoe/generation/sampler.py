"""From logits to a token: temperature, top-k, top-p, and randomness fixed by seed and position alone."""

from hashlib import blake2b
from math import inf
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How tokens are chosen. temperature 0 is greedy. top_k, top_p None are off.

    num_tokens: ids below this may be chosen, for a vocabulary padded beyond the tokenizer's; None is all.
    Top-k keeps the k likeliest tokens, top-p then the likeliest ones that reach probability p.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    num_tokens: int | None = None

    def check(self) -> Self:
        """Raise ValueError for a value out of range."""
        if not 0 <= self.temperature < inf:
            raise ValueError(f"temperature={self.temperature} is not a number from 0 on: use 0 for greedy")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} keeps no token: use 1 or more, or leave it away")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(
                f"top_p={self.top_p} is not in (0, 1]: use 1 or leave it away to keep every token"
            )
        return self


def sample(
    logits: Tensor, positions: list[int], sampling: Sampling, seeds: list[int] | None = None
) -> list[int]:
    """One token a row. logits: (b, vocab). positions: each row's index of the token to come.

    seeds: one a row, in place of the one of `sampling`. A row's choice depends on its logits, its seed and
    its position, not on the other rows. Raises ValueError for logits on the CPU that are not numbers.
    """
    if sampling.temperature == 0:
        if logits.device.type == "cpu":
            return _largest(logits[:, : sampling.num_tokens])
        return [int(token) for token in choose(logits, None, sampling).cpu()]
    draws = torch.tensor(uniforms(positions, sampling, seeds), dtype=torch.float64)
    logits = logits.cpu()
    check_logits(logits[:, : sampling.num_tokens].amax(dim=1).isfinite().all())
    return [int(token) for token in choose(logits, draws, sampling)]


def check_logits(finite: Tensor | np.bool) -> None:
    """Raise ValueError where the largest logit of a row is not a finite number."""
    if not finite:
        raise ValueError(
            "the model's logits are not numbers: its weights, or the state that it goes on from, hold NaN or "
            "infinity; load another checkpoint or state"
        )


def _largest(logits: Tensor) -> list[int]:
    """The first largest of each row of logits on the CPU.

    By numpy, whose one thread takes 0.3 ms for eight rows of 50,000: where another process holds a core,
    torch's threads wait up to 10 ms for one another.
    """
    if logits.dtype == torch.bfloat16:
        bits = logits.contiguous().view(torch.int16).numpy().astype(np.int32) << 16
        values = bits.view(np.float32)
    else:
        values = logits.numpy()
    found = values.argmax(axis=1)  # of a row with NaN, the first of these
    check_logits(np.isfinite(values[np.arange(len(found)), found]).all())
    return [int(token) for token in found]


def uniforms(positions: list[int], sampling: Sampling, seeds: list[int] | None = None) -> list[float]:
    """The random number of each row's token at its position."""
    seeds = [sampling.seed] * len(positions) if seeds is None else seeds
    return [uniform(*row) for row in zip(seeds, positions, strict=True)]


def choose(logits: Tensor, draws: Tensor | None, sampling: Sampling) -> Tensor:
    """(b, vocab), (b,) float64 in [0, 1) -> (b,) int64, wherever the logits are. draws: None if greedy.

    Nothing waits for the device, so that a CUDA graph can capture it.
    """
    logits = logits[:, : sampling.num_tokens]
    if sampling.temperature == 0 or draws is None:
        return logits.argmax(dim=-1)
    values, tokens = logits.double().sort(dim=-1, descending=True, stable=True)
    # from the largest, so that no temperature however small makes it infinite
    values = (values - values[:, :1]) / sampling.temperature
    if sampling.top_k is not None:
        values[:, sampling.top_k :].fill_(-inf)
    probabilities = values.softmax(dim=-1)
    cumulative = probabilities.cumsum(dim=-1)
    if sampling.top_p is not None:
        outside = cumulative - probabilities >= sampling.top_p
        probabilities = probabilities.masked_fill(outside, 0)
        cumulative = probabilities.cumsum(dim=-1)
    # never past the last token that has any probability
    target = draws.unsqueeze(1) * cumulative[:, -1:]
    last = (probabilities > 0).sum(dim=-1, keepdim=True) - 1
    index = torch.searchsorted(cumulative, target, right=True).minimum(last)
    return tokens.gather(1, index).squeeze(1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) fixed by seed and position."""
    digest = blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / (1 << 53)
