"""Few-shot tasks: files, splits, and scores against a model that is known to be right or wrong."""

import json

import pytest
import torch

from ssmoe.data.tokenizer import ByteTokenizer
from ssmoe.eval.tasks import Pair, Template, read_task, score_task, split_task
from ssmoe.generation.text import generate
from ssmoe.model.build import build
from tests.model.zoo import small

PAIRS = [Pair(f"in{i}", f"out{i}") for i in range(10)]


def test_files(tmp_path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"input": "Peru", "output": "Lima"}, {"input": "One", "output": 1}]))
    assert read_task(path) == [Pair("Peru", "Lima"), Pair("One", "1")]
    for text in ("[]", "{", "[1]", '[{"input": "a"}]', "3"):
        path.write_text(text)
        with pytest.raises(ValueError, match="pairs"):
            read_task(path)
    with pytest.raises(FileNotFoundError, match="no such task file"):
        read_task(tmp_path / "b.json")


def test_splits_keep_inputs_on_one_side() -> None:
    pairs = [*PAIRS, *(pair._replace(output="again") for pair in PAIRS)]
    shots, questions = split_task(pairs, held_out=0.3, seed=1)
    assert sorted(shots + questions) == sorted(pairs)
    assert len(questions) == 6
    assert not {p.input for p in shots} & {p.input for p in questions}
    assert split_task(pairs[::-1], held_out=0.3, seed=1)[1] != []
    assert {p.input for p in split_task(pairs, seed=2)[1]} != {p.input for p in split_task(pairs, seed=3)[1]}
    assert all(len(side) >= 1 for side in split_task(PAIRS[:2], held_out=0.0))
    with pytest.raises(ValueError, match="1 inputs cannot be split"):
        split_task(PAIRS[:1])


def test_a_template_leaves_braces_in_words_alone() -> None:
    assert Template().example(Pair("{output}", "b")) == "Q: {output}\nA: b\n\n"


def test_scores() -> None:
    """Answers taken from the model itself are hits, others are not; the likelihood is that of a full pass."""
    model, tokenizer = build(small("moe-mamba", vocab_size=257)).double().eval(), ByteTokenizer()
    template, shots = Template(end="!"), PAIRS[:3]
    shown = "".join(template.example(pair) for pair in shots)
    prompts = [shown + template.query(f"x{'y' * i}") for i in range(3)]
    said = generate(model, tokenizer, prompts, max_new_tokens=16, temperature=0, stop=["!"]).texts
    questions = [Pair(f"x{'y' * i}", text.strip()) for i, text in enumerate(said)]
    right = score_task(model, tokenizer, questions, shots=shots, template=template)
    assert right.exact == 1
    wrong = [pair._replace(output="no") for pair in questions]
    found = score_task(model, tokenizer, wrong, shots=shots, template=template)
    assert found.exact == 0
    expected = []
    for prompt in prompts:
        head, tail = [256, *prompt.encode()], list(b" no!")
        with torch.no_grad():
            logs = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].log_softmax(-1)
        expected.append(float(logs.gather(1, torch.tensor(tail).unsqueeze(1)).sum()))
    assert found.log_likelihood == pytest.approx(sum(expected) / 3, abs=1e-9)


def test_a_state_stands_for_the_shots_that_it_has_read() -> None:
    model, tokenizer = build(small("moe-mamba", vocab_size=257)).double().eval(), ByteTokenizer()
    shown = "".join(Template().example(pair) for pair in PAIRS[:4])
    with torch.no_grad():
        state = model(torch.tensor([[256, *shown.encode()]])).state
    kept = score_task(model, tokenizer, PAIRS[5:], state=state, max_new_tokens=3)
    again = score_task(model, tokenizer, PAIRS[5:], shots=PAIRS[:4], max_new_tokens=3)
    assert kept.log_likelihood == pytest.approx(again.log_likelihood, abs=1e-9)
