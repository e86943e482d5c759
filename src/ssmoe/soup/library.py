"""A skill library: a folder of named memories, each a state file with its steps."""

import re
from pathlib import Path

from ssmoe.data.tokenizer import Tokenizer
from ssmoe.model import state_file
from ssmoe.model.lm import LM
from ssmoe.soup.capture import Memory

_SUFFIX = ".safetensors"
_NAME = re.compile(r"[\w][\w.+-]*")


def save_memory(memory: Memory, path: str | Path, *, model: LM, tokenizer: Tokenizer) -> None:
    """Write a memory as a state file."""
    state_file.save(
        memory.state,
        path,
        model=model,
        tokenizer=tokenizer,
        tokens=memory.tokens,
        extra={f"steps.{i}": steps for i, steps in enumerate(memory.steps) if steps is not None},
    )


def load_memory(path: str | Path, *, model: LM, tokenizer: Tokenizer, model_id: str | None = None) -> Memory:
    """The memory in a state file; raises as `state_file.load`, and ValueError for a state without steps."""
    found = state_file.load(path, model=model, tokenizer=tokenizer, model_id=model_id)
    device = model.embedding.weight.device
    steps = {name: tensor.to(device, copy=True) for name, tensor in found.extra.items()}
    if not steps:
        raise ValueError(
            f"{path} is a state without steps, which cannot be mixed: save it with `ssmoe state save` and "
            "--mixable or --task"
        )
    return Memory(
        found.state,
        tuple(steps.get(f"steps.{i}") for i in range(len(found.state))),
        max(found.header.tokens),
    )


class Library:
    """Named memories of one model and tokenizer in `folder`."""

    def __init__(self, folder: str | Path, model: LM, tokenizer: Tokenizer) -> None:
        self.folder, self.model, self.tokenizer = Path(folder), model, tokenizer
        self._model_id = state_file.fingerprint(model)

    def names(self) -> list[str]:
        """Every name, sorted."""
        return sorted(path.name.removesuffix(_SUFFIX) for path in self.folder.glob(f"*{_SUFFIX}"))

    def add(self, name: str, memory: Memory) -> Path:
        """Keep `memory` under `name`, in place of what had it."""
        if not _NAME.fullmatch(name):
            raise ValueError(f"{name!r} is no name for a memory: use letters, digits, . _ + and -")
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}{_SUFFIX}"
        save_memory(memory, path, model=self.model, tokenizer=self.tokenizer)
        return path

    def get(self, name: str) -> Memory:
        """The memory of that name. Raises FileNotFoundError for none, ValueError for another model's."""
        path = self.folder / f"{name}{_SUFFIX}"
        return load_memory(path, model=self.model, tokenizer=self.tokenizer, model_id=self._model_id)
