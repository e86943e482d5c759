"""Where documents come from: files, folders, globs and the standard library of the running Python."""

import gzip
import json
import lzma
import os
import sysconfig
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterable, Iterator
from glob import glob, has_magic
from hashlib import blake2b
from io import BufferedIOBase, BytesIO
from pathlib import Path
from typing import Any, NamedTuple, cast

from ssmoe.config.data import DataConfig

STDLIB = "python-stdlib"
FORMATS = (".txt", ".md", ".py", ".jsonl")
COMPRESSIONS = (".gz", ".xz")


class Document(NamedTuple):
    """A text and where it was found."""

    name: str
    text: str

    @property
    def digest(self) -> bytes:
        """Hash of the text alone: the same text is the same document wherever it lies."""
        return blake2b(self.text.encode(), digest_size=16).digest()


def read_documents(config: DataConfig) -> Iterator[Document]:
    """Every non-empty document, in the order of the sources and of the names in each."""
    empty = True
    for name, path in _find_all(config.sources).items():
        for document in _read_file(name, path, config):
            if document.text:
                empty = False
                yield document
    if empty:
        raise ValueError(f"data.sources={list(config.sources)} hold no text: name files that do")


def _find_all(sources: Iterable[str]) -> dict[str, Path]:
    """Display name to path; a file that several sources name, by whatever path, counts once."""
    files: dict[str, Path] = {}
    seen: set[str] = set()
    for source in sources:
        found = _find_stdlib() if source == STDLIB else {path.as_posix(): path for path in _find(source)}
        for name, path in found.items():
            if (place := os.path.abspath(path)) not in seen:
                seen.add(place)
                files[name] = path
    return files


def _find_stdlib() -> dict[str, Path]:
    root = Path(sysconfig.get_path("stdlib"))
    # encodings are tables of characters, which any counting model predicts well
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
    # how this Python was built: no text worth learning, and different on every machine
    settings = ("_sysconfigdata", "config-")
    files = {
        f"{STDLIB}/{name}": path
        for path in _walk(root, skipped)
        if path.suffix == ".py" and not (name := path.relative_to(root).as_posix()).startswith(settings)
    }
    if not files:
        raise ValueError(
            f"{STDLIB}: this Python carries no source files: name files of yours in data.sources"
        )
    return files


def _find(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if path.is_file():
        if _format(path) is None:
            raise ValueError(f"{source} has an unsupported suffix: {_remedy()}")
        return [path]
    if path.is_dir():
        found = _walk(path)
    elif has_magic(source):
        found = sorted(match for name in glob(str(path), recursive=True) if (match := Path(name)).is_file())
    else:
        raise ValueError(f"{source} does not exist: correct the path in data.sources")
    supported = [file for file in found if _format(file)]
    if not supported:
        what = "only files of other suffixes" if found else "no file"
        raise ValueError(f"{source} matches {what}: {_remedy()}")
    return supported


def _walk(folder: Path, skipped: Iterable[str] = ()) -> list[Path]:
    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=_refuse_folder):
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _refuse_folder(error: OSError) -> None:
    raise ValueError(
        f"{error.filename} cannot be listed ({error.strerror}): allow it or leave it out"
    ) from error


def _format(path: Path) -> str | None:
    name = path.name.lower()
    plain = name.removesuffix(path.suffix.lower()) if name.endswith(COMPRESSIONS) else name
    return next((format for format in FORMATS if plain.endswith(format)), None)


def _remedy() -> str:
    return f"name files ending in {' '.join(FORMATS)}, or in one of these and {' or '.join(COMPRESSIONS)}"


def _read_file(name: str, path: Path, config: DataConfig) -> Iterator[Document]:
    read = _read_lines if _format(path) == ".jsonl" else _read_text
    try:
        with _open(path) as file:
            if file.read(len(BOM_UTF8)) != BOM_UTF8:
                file.seek(0)
            yield from read(name, file, config)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{name} cannot be read ({error}): fetch it again or leave it out") from error


def _open(path: Path) -> BufferedIOBase:
    match path.suffix.lower():
        case ".gz":
            return gzip.GzipFile(path)
        case ".xz":
            return lzma.LZMAFile(path)
        case _:
            return path.open("rb")


def _read_text(name: str, file: BufferedIOBase, config: DataConfig) -> Iterator[Document]:
    for number, piece in enumerate(_cut(file, config.max_document_bytes)):
        yield Document(f"{name}#{number}" if number else name, piece.decode(errors="replace"))


def _read_lines(name: str, file: BufferedIOBase, config: DataConfig) -> Iterator[Document]:
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"{name}:{number}"
            text = _field(line, config.text_field, where)
            # JSON can spell half a surrogate pair, which no encoding can write
            data = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace").encode()
            yield from _read_text(where, BytesIO(data), config)


def _field(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(line.decode(errors="replace"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not valid JSON ({error.msg}): correct or remove the line") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where} is not a JSON object: correct or remove the line")
    record = cast(dict[str, Any], record)
    text = record.get(field)
    if not isinstance(text, str):
        names = [name for name, value in record.items() if isinstance(value, str)]
        raise ValueError(
            f"{where} has no text in the field {field!r}: "
            f"set data.text_field to one of {names} or correct the line"
        )
    return text


def _cut(file: BufferedIOBase, limit: int) -> Iterator[bytes]:
    """The bytes of a file in pieces of at most `limit`, cut after the last line end that fits."""
    piece = file.read(limit + 1)
    while len(piece) > limit:
        end = piece.rfind(b"\n", 0, limit) + 1 or _character_end(piece, limit)
        yield piece[:end]
        piece = piece[end:] + file.read(end)
    yield piece


def _character_end(data: bytes, limit: int) -> int:
    """The last position up to `limit` that is not inside a UTF-8 character."""
    continued = range(0x80, 0xC0)
    return next((end for end in range(limit, limit - 4, -1) if data[end] not in continued), limit)
