"""A library keeps memories bit for bit, by name, for one model."""

import pytest
import torch

from ssmoe.data.tokenizer import ByteTokenizer
from ssmoe.generation import continuation
from ssmoe.generation.engine import read
from ssmoe.model.build import build
from ssmoe.soup.capture import capture
from ssmoe.soup.library import Library
from tests.model.zoo import small


def test_memories_come_back_by_name(tmp_path) -> None:
    model = build(small("moe-mamba", vocab_size=257)).eval()
    library = Library(tmp_path / "skills", model, ByteTokenizer())
    assert library.names() == []
    memories = {name: capture(model, torch.tensor([list(name.encode())])) for name in ("country", "verb")}
    for name, memory in memories.items():
        library.add(name, memory)
    assert library.names() == ["country", "verb"]
    for name, memory in memories.items():
        found = library.get(name)
        assert found.tokens == memory.tokens == len(name)
        for one, other in zip(found.state, memory.state, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        for a, b in zip(found.steps, memory.steps, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_refusals(tmp_path) -> None:
    model, tokenizer = build(small("moe-mamba", vocab_size=257)).eval(), ByteTokenizer()
    library = Library(tmp_path, model, tokenizer)
    memory = capture(model, torch.tensor([[1, 2]]))
    for name in ("", "../up", "a/b", ".hidden"):
        with pytest.raises(ValueError, match="no name for a memory"):
            library.add(name, memory)
    with pytest.raises(FileNotFoundError, match="no such state file"):
        library.get("nothing")
    library.add("a", memory)
    other = build(small("moe-mamba", vocab_size=257), seed=1)
    with pytest.raises(ValueError, match="another model"):
        Library(tmp_path, other, tokenizer).get("a")
    start = read(model, [[1, 2, 3]])
    continuation.save(start, tmp_path / "plain.safetensors", model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="a state without steps"):
        library.get("plain")
