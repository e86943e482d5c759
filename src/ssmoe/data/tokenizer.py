"""Text to token ids and back: raw bytes, a byte-level BPE trained here, or any Hugging Face tokenizer.json.

Text never becomes the end token by accident: a document that contains the letters "<|endoftext|>" keeps them
as ordinary tokens. Special tokens decode to nothing.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol, final

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_TOKEN = "<|endoftext|>"


class Tokenizer(Protocol):
    """What the rest of the library may ask of a tokenizer."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        ...

    @property
    def end_id(self) -> int:
        """The token that opens every document and so also follows its last token."""
        ...

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without an end token."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As `encode` for each text, in parallel where that helps."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD."""
        ...

    def stream(self) -> "TextStream":
        """Decodes ids as they come."""
        ...

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, as `load_tokenizer` and transformers read them."""
        ...


class TextStream:
    """Decodes one id at a time; the pieces, joined, are the decoding of all ids.

    Text is held back while it may end inside a character. Only the ids of the last piece are kept as context,
    so the cost of an id does not grow with the text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._num_shown = 0

    def feed(self, token: int) -> str:
        """The text that this id completes, often one character or word, sometimes none."""
        self._ids.append(token)
        piece = self._pending()
        if not piece or piece.endswith("\ufffd"):
            return ""
        del self._ids[: self._num_shown]
        self._num_shown = len(self._ids)
        return piece

    def flush(self) -> str:
        """The text still held back, after the last id."""
        piece = self._pending()
        self._ids.clear()
        self._num_shown = 0
        return piece

    def _pending(self) -> str:
        # decoding the held ids alone would lose what a token owes its left neighbour, such as a leading space
        shown = self._decode(self._ids[: self._num_shown])
        return self._decode(self._ids)[len(shown) :]


@final
class ByteTokenizer:
    """The bytes of UTF-8 and an end token."""

    vocab_size: int = 257
    end_id: int = 256

    @property
    def fingerprint(self) -> str:
        return _hash(json.dumps(_bytes_definition()))

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(id for id in ids if id < self.end_id).decode(errors="replace")

    def stream(self) -> TextStream:
        return TextStream(self.decode)

    def save(self, folder: str | Path) -> None:
        _write(Path(folder), json.dumps(_bytes_definition(), indent=2), END_TOKEN)


@final
class HuggingFaceTokenizer:
    """A tokenizer of the `tokenizers` library and the name of its end token."""

    def __init__(self, backend: tokenizers.Tokenizer, end_token: str = END_TOKEN) -> None:
        # files may carry the truncation and padding of the model they were made for; documents are whole
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        self._end_token = end_token
        self.end_id = _find_end(backend, end_token)
        self.vocab_size = 1 + max(backend.get_vocab().values())
        self.fingerprint = _hash(f"{backend.to_str()}\n{end_token}")

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        batch = [encoding.ids for encoding in encodings]
        return [
            self._spell_out(text) if self.end_id in ids else ids
            for text, ids in zip(texts, batch, strict=True)
        ]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode(ids, skip_special_tokens=True)

    def stream(self) -> TextStream:
        return TextStream(self.decode)

    def save(self, folder: str | Path) -> None:
        _write(Path(folder), self.definition(), self._end_token)

    def definition(self) -> str:
        """What tokenizer.json holds."""
        return self._backend.to_str(pretty=True)

    def _spell_out(self, text: str) -> list[int]:
        # some vocabularies (Unigram, WordLevel) hold the end token as a word; cut inside it, it is no word
        middle = len(self._end_token) // 2
        left, right = self._end_token[:middle], self._end_token[middle:]
        first, *others = text.split(self._end_token)
        pieces = [first, *(right + other for other in others)]
        pieces[:-1] = [piece + left for piece in pieces[:-1]]
        encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
        ids = [id for encoding in encodings for id in encoding.ids]
        if self.end_id in ids:
            raise ValueError(
                f"the tokenizer turns ordinary text into its end token {self._end_token!r}, which would cut "
                "documents: name another token with data.end_token"
            )
        return ids


def load_tokenizer(path: str | Path, end_token: str | None = None) -> Tokenizer:
    """Reads a tokenizer.json, or the one in a folder.

    Without `end_token` it is the eos_token of the tokenizer_config.json beside it, or else "<|endoftext|>".
    """
    path = Path(path).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        definition = file.read_text(encoding="utf-8")
        end_token = end_token or _configured_end(file.parent) or END_TOKEN
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} cannot be read ({error}): name a tokenizer.json or its folder") from error
    return parse_tokenizer(definition, end_token, name=str(file))


def parse_tokenizer(definition: str, end_token: str, *, name: str) -> Tokenizer:
    """The tokenizer that the text of a tokenizer.json describes; errors call it `name`."""
    try:
        if json.loads(definition) == _bytes_definition():
            return ByteTokenizer()
        backend = tokenizers.Tokenizer.from_str(definition)
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(
            f"{name} is not a Hugging Face tokenizer.json ({error}): convert it with transformers' "
            "save_pretrained, or upgrade tokenizers if the file is newer than the installed version"
        ) from error
    return HuggingFaceTokenizer(backend, end_token)


def train_bpe(texts: Iterable[str], size: int, end_token: str = END_TOKEN) -> HuggingFaceTokenizer:
    """Trains a byte-level BPE of `size` ids; the same texts in any order give the same tokenizer."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[end_token],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer=trainer)
    if (found := backend.get_vocab_size()) < size:
        raise ValueError(
            f"data.tokenizer=bpe:{size} needs more text: this one gives only {found} tokens; "
            f"set data.tokenizer=bpe:{found} or bytes, or add text"
        )
    return HuggingFaceTokenizer(backend, end_token)


def _find_end(backend: tokenizers.Tokenizer, end_token: str) -> int:
    end_id = backend.token_to_id(end_token)
    if end_id is None:
        special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
        remedy = (
            f"set data.end_token={special[0]!r} or another of {special[:8]}"
            if special
            else "set data.end_token to one of its tokens that no document needs"
        )
        raise ValueError(f"the tokenizer has no token {end_token!r} to end documents with: {remedy}")
    return end_id


def _configured_end(folder: Path) -> str | None:
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return None
    token: str | dict[str, str] | None = json.loads(file.read_text(encoding="utf-8")).get("eos_token")
    return token["content"] if isinstance(token, dict) else token


def _write(folder: Path, definition: str, end_token: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(definition, encoding="utf-8")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end_token, "eos_token": end_token}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _bytes_definition() -> dict[str, Any]:
    """The byte tokenizer as a BPE without merges, so that other libraries read its file with the same ids."""
    end = {"id": 256, "content": END_TOKEN, "special": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end | flags],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocabulary | {END_TOKEN: 256}, "merges": []},
    }


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level vocabularies (GPT-2): itself if it is visible."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = iter(range(0x100, 0x200))
    return [chr(byte if byte in visible else next(hidden)) for byte in range(256)]


def _hash(definition: str) -> str:
    return blake2b(definition.encode(), digest_size=16).hexdigest()
