"""Many states in one folder: looked up by the tokens they have read, the least recently used removed first.

A file a state, named by the hash of model, tokenizer and tokens, and an SQLite index. Files appear and the
index changes under one lock, and a file is only ever written whole, so that any number of processes may share
the folder and any of them may be killed at any moment: what then remains without an entry is removed by the
next writer. A damaged or vanished file is a miss.
"""

import os
import sqlite3
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from ssmoe.data.tokenizer import Tokenizer
from ssmoe.model import state_file
from ssmoe.model.layer import State
from ssmoe.model.lm import LM

_INDEX = "index.sqlite"
_SUFFIX = ".safetensors"
_TABLE = """CREATE TABLE IF NOT EXISTS entries
    (key TEXT PRIMARY KEY, owner TEXT, tokens INTEGER, bytes INTEGER, used INTEGER)"""


class Found(NamedTuple):
    """A state of one row that has read the first `tokens` tokens."""

    state: State
    tokens: int


class StateStore:
    """States of one model and tokenizer in `folder`, at most `budget_bytes` of files by all its users.

    The model's fingerprint is taken when the store is opened: weights that change afterwards need a new one.
    """

    def __init__(self, folder: str | Path, model: LM, tokenizer: Tokenizer, *, budget_bytes: int) -> None:
        if budget_bytes < 1:
            raise ValueError(f"budget_bytes={budget_bytes}: give the store room")
        self.folder, self.model, self.tokenizer = Path(folder), model, tokenizer
        self.budget_bytes = budget_bytes
        self._model_id = state_file.fingerprint(model)
        self._owner = blake2b(f"{self._model_id}:{tokenizer.fingerprint}".encode()).hexdigest()[:32]
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked() as index:
            index.execute(_TABLE)

    def put(self, ids: Sequence[int], state: State) -> bool:
        """Keep `state`, of one row, which has read `ids`; False where it is larger than the whole budget.

        Least recently used states, of whatever model, make room. Raises ValueError for a state of several
        rows.
        """
        if (rows := next((leaf.shape[0] for layer in state for leaf in layer), 1)) != 1:
            raise ValueError(f"a state of {rows} rows: pick one with ssmoe.state.select")
        key = next(iter(self._keys(ids, [len(ids)]).values()))
        path = self.folder / f"{key}{_SUFFIX}"
        with self._locked() as index:
            self._remove_orphans(index)
            state_file.save(
                state, path, model=self._model_id, tokenizer=self.tokenizer, tokens=len(ids), note=key
            )
            size = path.stat().st_size
            if size > self.budget_bytes:
                path.unlink()
                return False
            row = (key, self._owner, len(ids), size, _now(index))
            index.execute("INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?)", row)
            self._evict(index)
        return True

    def get(self, ids: Sequence[int]) -> Found | None:
        """The state that has read the longest stored prefix of `ids`, None where there is none."""
        with self._locked() as index:
            rows = index.execute(
                "SELECT DISTINCT tokens FROM entries WHERE owner = ? AND tokens <= ?", (self._owner, len(ids))
            ).fetchall()
        keys = self._keys(ids, sorted(row[0] for row in rows))
        for length, key in sorted(keys.items(), reverse=True):
            found = self._load(key, length)
            if found is not None:
                return found
        return None

    def num_bytes(self) -> int:
        """Size of all states in the index."""
        with self._locked() as index:
            return index.execute("SELECT COALESCE(SUM(bytes), 0) FROM entries").fetchone()[0]

    def _load(self, key: str, length: int) -> Found | None:
        path = self.folder / f"{key}{_SUFFIX}"
        with self._locked() as index:
            used = index.execute("UPDATE entries SET used = ? WHERE key = ?", (_now(index), key)).rowcount
        if not used:
            return None
        try:
            found = state_file.load(path, model=self.model, tokenizer=self.tokenizer, model_id=self._model_id)
        except (FileNotFoundError, ValueError):
            with self._locked() as index:
                index.execute("DELETE FROM entries WHERE key = ?", (key,))
            return None
        if found.header.note != key or found.header.tokens != (length,):
            return None
        return Found(found.state, length)

    def _keys(self, ids: Sequence[int], lengths: Sequence[int]) -> dict[int, str]:
        """The key of each prefix; `lengths` rise."""
        digest, keys = blake2b(self._owner.encode(), digest_size=24), dict[int, str]()
        for begin, end in pairwise((0, *lengths)):
            digest.update(b"".join(token.to_bytes(4, "little") for token in ids[begin:end]))
            keys[end] = digest.copy().hexdigest()
        return keys

    def _evict(self, index: sqlite3.Connection) -> None:
        total = index.execute("SELECT SUM(bytes) FROM entries").fetchone()[0]
        for key, size in index.execute("SELECT key, bytes FROM entries ORDER BY used").fetchall():
            if total <= self.budget_bytes:
                return
            # the file first: an entry without a file is merely a miss
            (self.folder / f"{key}{_SUFFIX}").unlink(missing_ok=True)
            index.execute("DELETE FROM entries WHERE key = ?", (key,))
            total -= size

    def _remove_orphans(self, index: sqlite3.Connection) -> None:
        """What a killed writer left: under the lock every file has an entry, or is nobody's."""
        known = {f"{row[0]}{_SUFFIX}" for row in index.execute("SELECT key FROM entries")}
        for entry in os.scandir(self.folder):
            if _SUFFIX in entry.name and entry.name not in known:
                os.unlink(entry.path)

    @contextmanager
    def _locked(self) -> Generator[sqlite3.Connection]:
        with closing(sqlite3.connect(self.folder / _INDEX, timeout=60, isolation_level=None)) as index:
            index.execute("BEGIN IMMEDIATE")
            try:
                yield index
            except BaseException:
                index.execute("ROLLBACK")
                raise
            index.execute("COMMIT")


@torch.no_grad()
def read_through(store: StateStore, ids: Sequence[int], *, every: int) -> Found:
    """The state after all but the last of `ids`, from the longest stored prefix on.

    On the way every multiple of `every` tokens is stored, and the text is cut nowhere else, so that a store
    filled with the same `every` gives the bits that an empty one gives.
    """
    if every < 1 or not ids:
        raise ValueError(f"every={every} and {len(ids)} tokens: both must be at least 1")
    end = len(ids) - 1
    found = store.get(ids[: end - end % every])
    if found is None:
        found = Found(store.model.init_state(1), 0)
    state, begin = found
    device = store.model.embedding.weight.device
    while begin < end:
        # a prefix that was stored with another `every` may end between multiples
        stop = min(begin - begin % every + every, end)
        state = store.model(torch.tensor([ids[begin:stop]], device=device), state, logits="last").state
        begin = stop
        if begin % every == 0:
            store.put(ids[:begin], state)
    return Found(state, end)


def _now(index: sqlite3.Connection) -> int:
    """A clock that only goes up, whatever the machine's does."""
    return index.execute("SELECT COALESCE(MAX(used), 0) + 1 FROM entries").fetchone()[0]
