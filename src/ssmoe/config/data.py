"""Where text comes from and how it becomes rows of tokens."""

from typing import Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from ssmoe.config.model import Frozen


class DataConfig(Frozen):
    """Sources, tokenizer and lengths of a run."""

    sources: tuple[str, ...] = Field(default=("python-stdlib",), min_length=1)
    """"python-stdlib" (the sources of the running Python's standard library), files, folders or globs.
    Suffixes .txt .md .py .jsonl, each plain, .gz or .xz; other files and hidden ones in a folder are passed
    over. A file that several sources name is read once."""
    text_field: str = "text"
    """The field of a .jsonl line that holds the document."""
    tokenizer: str = "bpe:4096"
    """"bytes"; "bpe:SIZE", a byte-level BPE trained on the training documents; or the path of a Hugging Face
    tokenizer.json."""
    end_token: str = "<|endoftext|>"
    """The token that separates documents: its name in a trained BPE, or one that the tokenizer.json has."""
    context: PositiveInt = 256
    """Tokens in a row."""
    held_out: float = Field(default=0.02, gt=0, lt=1)
    """Fraction of the documents, chosen by content hash, that is never trained on; at least one document."""
    isolate_documents: bool = True
    """Reset state, attention and positions at document starts inside a row; false trains across them, as
    the MoE-Mamba authors did."""
    mask_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Share of a row's tokens that is hidden and predicted under model.objective = "masked"."""
    max_document_bytes: int = Field(default=1 << 20, ge=4)
    """Longer documents are cut into documents of at most this size: at line ends, or else between
    characters."""
    cache_dir: str = "~/.cache/ssmoe"
    """Folder of the tokenised documents and trained tokenizers, kept from run to run."""
    seed: int = 0
    """Order of the training documents."""

    @field_validator("sources", mode="before")
    @classmethod
    def _one_source(cls, value: object) -> object:
        return (value,) if isinstance(value, str) else value

    @field_validator("tokenizer")
    @classmethod
    def _check_tokenizer(cls, value: str) -> str:
        if value.startswith("bpe:"):
            size = value.removeprefix("bpe:")
            if not size.isdigit() or int(size) < MIN_BPE_SIZE:
                raise ValueError(
                    f"tokenizer={value!r}: the size after bpe: must be a whole number of at least "
                    f"{MIN_BPE_SIZE}, as in bpe:4096"
                )
        elif value != "bytes" and not value.endswith(".json"):
            raise ValueError(
                f'tokenizer={value!r} is not one of "bytes", "bpe:SIZE" or a path ending in .json'
            )
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not all(self.sources):
            raise ValueError("sources holds an empty string: name a file, a glob or python-stdlib")
        return self


MIN_BPE_SIZE = 257
"""256 bytes and the end token."""
