"""Continuations as files: a new process goes on as if the old one had never stopped."""

import subprocess
import sys

import pytest
import torch

from ssmoe.data.tokenizer import ByteTokenizer
from ssmoe.generation import continuation
from ssmoe.generation.engine import Continuation
from ssmoe.generation.text import generate
from ssmoe.model.build import build
from ssmoe.model.weights import save_weights
from tests.model.zoo import small

PROGRAM = """
import sys
from pathlib import Path
import torch
# sums are split by thread: equal bits need equal numbers of them
torch.set_num_threads(int(sys.argv[4]))
from ssmoe.data.tokenizer import ByteTokenizer
from ssmoe.generation import continuation
from ssmoe.generation.text import generate
from ssmoe.model.weights import load_weights
model, tokenizer = load_weights(Path(sys.argv[1])), ByteTokenizer()
start = continuation.load(sys.argv[2], model=model, tokenizer=tokenizer)
done = generate(model, tokenizer, ["", ""], max_new_tokens=9, seed=5, state=start)
continuation.save(done.continuation, sys.argv[3], model=model, tokenizer=tokenizer)
print(done.tokens)
"""


@pytest.mark.parametrize("name", ["hybrid", "moe-mamba"])
def test_save_new_process_load_is_bit_equal_to_never_stopping(tmp_path, name) -> None:
    model, tokenizer = build(small(name, vocab_size=257)), ByteTokenizer()
    save_weights(model, tmp_path)
    prompts = ["state space", "é"]
    whole = generate(model, tokenizer, prompts, max_new_tokens=16, seed=5)
    first = generate(model, tokenizer, prompts, max_new_tokens=7, seed=5)
    continuation.save(first.continuation, tmp_path / "s", model=model, tokenizer=tokenizer)
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            PROGRAM,
            tmp_path,
            tmp_path / "s",
            tmp_path / "end",
            str(torch.get_num_threads()),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == str([row[7:] for row in whole.tokens])
    continuation.save(whole.continuation, tmp_path / "whole", model=model, tokenizer=tokenizer)
    assert (tmp_path / "end").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.mark.parametrize("pending", [257, 258, 2**31])
def test_a_pending_token_outside_the_vocabulary_is_refused(tmp_path, pending) -> None:
    model, tokenizer = build(small("mamba", vocab_size=257)), ByteTokenizer()
    start = Continuation(model.init_state(1), (0,), ((256,),))
    continuation.save(start, tmp_path / "s", model=model, tokenizer=tokenizer)
    assert continuation.load(tmp_path / "s", model=model, tokenizer=tokenizer).pending == ((256,),)
    continuation.save(start._replace(pending=((pending,),)), tmp_path / "s", model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match=f"pending token {pending}, outside the model's vocabulary"):
        continuation.load(tmp_path / "s", model=model, tokenizer=tokenizer)
