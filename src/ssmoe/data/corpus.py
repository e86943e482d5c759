"""A tokenised split in one memory-mapped file, which is either whole and unchanged or not there at all.

Layout: the tokens of all documents, the documents' lengths, the counts, a checksum of everything before it.
"""

import os
import zlib
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import BinaryIO, NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

# a marker with the version of the layout, documents, tokens, bytes of text, end id, bytes a token
_COUNTS = Struct("<8sqqqqq")
_CHECKSUM = Struct("<I")
_MARKER = b"ssmoe-1\n"


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenCorpus:
    """The documents of a split as tokens, without end tokens."""

    tokens: NDArray[np.unsignedinteger]
    """All documents, one after the other."""
    offsets: NDArray[np.int64]
    """Where each document begins in `tokens`, and the end of the last."""
    num_bytes: int
    """UTF-8 bytes of the text."""
    end_id: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the documents, without end tokens."""
        return len(self.tokens)

    @property
    def num_documents(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_targets(self) -> int:
        """What one epoch predicts: every token and the end of every document."""
        return self.num_tokens + self.num_documents

    def document(self, number: int) -> NDArray[np.unsignedinteger]:
        """The tokens of one document."""
        return self.tokens[self.offsets[number] : self.offsets[number + 1]]


class Encoded(NamedTuple):
    """A document on its way into a corpus."""

    ids: list[int]
    num_bytes: int


def write_corpus(path: Path, documents: Iterable[Encoded], *, vocab_size: int, end_id: int) -> None:
    """Writes the file that `read_corpus` reads; holds one document in memory at a time."""
    dtype = np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
    lengths: list[int] = []
    num_bytes = checksum = 0
    with open_replacing(path) as file:
        for document in documents:
            data = np.asarray(document.ids, dtype).tobytes()
            file.write(data)
            checksum = zlib.crc32(data, checksum)
            lengths.append(len(document.ids))
            num_bytes += document.num_bytes
        counts = _COUNTS.pack(_MARKER, len(lengths), sum(lengths), num_bytes, end_id, dtype.itemsize)
        tail = np.asarray(lengths, "<i8").tobytes() + counts
        file.write(tail + _CHECKSUM.pack(zlib.crc32(tail, checksum)))


def read_corpus(path: Path) -> TokenCorpus | None:
    """Maps a corpus, or returns None if the file is missing, cut short, altered or of another version."""
    if not path.is_file() or path.stat().st_size < _COUNTS.size + _CHECKSUM.size:
        return None
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    body, end = data[: -_CHECKSUM.size], data[-_CHECKSUM.size :]
    if _CHECKSUM.unpack(end.tobytes()) != (zlib.crc32(body.data),):
        return None
    counts = _COUNTS.unpack(body[-_COUNTS.size :].tobytes())
    marker, num_documents, num_tokens, num_bytes, end_id, itemsize = counts
    if marker != _MARKER:
        return None
    tokens, lengths = np.split(body[: -_COUNTS.size], [num_tokens * itemsize])
    offsets = np.zeros(num_documents + 1, np.int64)
    np.cumsum(np.frombuffer(lengths.tobytes(), "<i8"), out=offsets[1:])
    return TokenCorpus(
        tokens=tokens.view(f"<u{itemsize}"), offsets=offsets, num_bytes=num_bytes, end_id=end_id
    )


@contextmanager
def open_replacing(path: Path) -> Generator[BinaryIO]:
    """A file under a name of its own, which takes the name `path` once it is complete.

    Whoever opens `path` sees a whole file, whatever other writers do and whenever they are killed.
    """
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("xb")
    except OSError as error:
        raise ValueError(
            f"{path.parent} cannot be written ({error.strerror}): name another folder with data.cache_dir"
        ) from error
    try:
        with file:
            yield file
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
