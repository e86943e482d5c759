"""Where a generation stopped, as a file: going on in another process is the same as never having stopped."""

from pathlib import Path

from ssmoe.data.tokenizer import Tokenizer
from ssmoe.generation.engine import Continuation
from ssmoe.model import state_file
from ssmoe.model.lm import LM


def save(continuation: Continuation, path: str | Path, *, model: LM, tokenizer: Tokenizer) -> None:
    """Write `continuation` as a state file of `model` and `tokenizer`."""
    state_file.save(
        continuation.state,
        path,
        model=model,
        tokenizer=tokenizer,
        tokens=continuation.tokens,
        pending=continuation.pending,
    )


def load(path: str | Path, *, model: LM, tokenizer: Tokenizer) -> Continuation:
    """The continuation in a state file; raises as `state_file.load` does."""
    found = state_file.load(path, model=model, tokenizer=tokenizer)
    header = found.header
    high = max((token for row in header.pending for token in row), default=0)
    if high >= model.config.vocab_size:
        raise ValueError(f"{path} has the pending token {high}, outside the model's vocabulary")
    return Continuation(found.state, header.tokens, header.pending)
