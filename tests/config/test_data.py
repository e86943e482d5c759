"""Data configurations: refusals that name the remedy."""

import pytest
from pydantic import ValidationError

from ssmoe.config.data import DataConfig


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokenizer": "bpe:10"}, "at least 257"),
        ({"tokenizer": "bpe:many"}, "whole number"),
        ({"tokenizer": "gpt2"}, r'"bytes", "bpe:SIZE" or a path'),
        ({"sources": []}, "at least 1"),
        ({"sources": [""]}, "empty string"),
        ({"held_out": 0}, "greater than 0"),
        ({"context": 0}, "greater than 0"),
    ],
)
def test_refusals(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataConfig.model_validate(values)


def test_one_source_may_be_a_string() -> None:
    assert DataConfig.model_validate({"sources": "a.txt"}).sources == ("a.txt",)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:257", "folder/tokenizer.json"])
def test_tokenizers(tokenizer: str) -> None:
    assert DataConfig(tokenizer=tokenizer).tokenizer == tokenizer
