"""Beam search against enumeration, greedy choice, and prompts alone."""

from itertools import product

import pytest
import torch

from ssmoe.data.tokenizer import ByteTokenizer
from ssmoe.generation.beam import beam_search
from ssmoe.generation.text import generate
from ssmoe.model.build import build
from tests.generation.test_engine import model_of
from tests.model.zoo import MIXING, mixing


class Letters(ByteTokenizer):
    """Ids 0 to 5 and the end token 6."""

    vocab_size = 7
    end_id = 6

    def encode(self, text: str) -> list[int]:
        return [ord(letter) - ord("a") for letter in text]

    def decode(self, ids) -> str:
        return "".join(chr(ord("a") + id) for id in ids if id < 6)


@pytest.mark.parametrize("penalty", [0, 0.6, 1])
@pytest.mark.parametrize("name", ["hybrid", "moe-mamba"])
@torch.no_grad()
def test_enough_beams_find_what_enumeration_finds(name, penalty) -> None:
    model, tokenizer = model_of(name, vocab_size=7), Letters()
    [found] = beam_search(model, tokenizer, ["ab"], beams=49, n=49, max_new_tokens=3, length_penalty=penalty)
    scores = {}
    for tokens in product(range(7), repeat=3):
        cut = tokens[: tokens.index(6) + 1] if 6 in tokens else tokens
        ids = torch.tensor([[6, 0, 1, *cut]])
        logs = model(ids[:, :-1]).logits[0, 2:].log_softmax(-1)
        scores[cut] = float(logs.gather(1, torch.tensor(cut).unsqueeze(1)).sum())
    best = sorted(scores, key=lambda tokens: -scores[tokens] / len(tokens) ** penalty)[:10]
    assert [h.tokens for h in found[:10]] == best
    for hypothesis in found[:10]:
        total = scores[hypothesis.tokens]
        assert hypothesis.log_probability == pytest.approx(total, abs=1e-9)
        assert hypothesis.score == pytest.approx(total / len(hypothesis.tokens) ** penalty, abs=1e-9)
        assert hypothesis.text == tokenizer.decode(hypothesis.tokens)


def test_one_beam_is_greedy_and_prompts_do_not_meet() -> None:
    model, tokenizer = model_of("hybrid", vocab_size=257), ByteTokenizer()
    prompts = ["state", "a", "mixture of"]
    greedy = generate(model, tokenizer, prompts, max_new_tokens=12, temperature=0)
    single = beam_search(model, tokenizer, prompts, beams=1, max_new_tokens=12)
    assert [list(h.tokens) for [h] in single] == greedy.tokens
    together = beam_search(model, tokenizer, prompts, beams=4, n=4, max_new_tokens=12)
    for prompt, found in zip(prompts, together, strict=True):
        [alone] = beam_search(model, tokenizer, [prompt], beams=4, n=4, max_new_tokens=12)
        assert [h.tokens for h in found] == [h.tokens for h in alone]
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


@pytest.mark.parametrize("changes", [{"beams": 0}, {"n": 5}, {"n": 0}, {"max_new_tokens": 0}])
def test_nothing_to_search_is_refused(changes) -> None:
    model = model_of("mamba", vocab_size=257)
    with pytest.raises(ValueError, match="at least 1 and n at most beams"):
        beam_search(model, ByteTokenizer(), ["a"], **changes)
    with pytest.raises(ValueError, match="empty"):
        beam_search(model, ByteTokenizer(), [""])
    with pytest.raises(ValueError, match="prompts is one string: give a list"):
        beam_search(model, ByteTokenizer(), "abc")


@pytest.mark.parametrize("name", MIXING)
def test_what_cannot_generate_is_not_searched(name) -> None:
    model = build(mixing(name).model_copy(update={"vocab_size": 257}))
    with pytest.raises(ValueError, match=r"cannot generate: .*train"):
        beam_search(model, ByteTokenizer(), ["a"])


def test_logits_that_are_no_numbers_are_told() -> None:
    model = model_of("mamba", vocab_size=257)
    with torch.no_grad():
        model.embedding.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="logits are not numbers"):
        beam_search(model, ByteTokenizer(), ["abc"])
