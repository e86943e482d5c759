"""Checkpoints of a run: checkpoints/step-N/{weights,trainer}, written aside and then renamed.

`weights` is the model's own checkpoint folder with its tokenizer; `trainer` holds what resuming needs. Both
are safetensors and JSON: nothing in them can execute.
"""

import json
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ssmoe.data.loader import Cursor
from ssmoe.data.tokenizer import Tokenizer, load_tokenizer
from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.model.state_file import state_from_tensors, state_tensors
from ssmoe.model.weights import WEIGHTS, differences, load_weights, save_weights
from ssmoe.training.average import Average
from ssmoe.training.optimizer import optimizer_tensors, restore_optimizer

CHECKPOINTS = "checkpoints"
_OPTIMIZER = "optimizer.safetensors"
_PROGRESS = "progress.json"
_RNG = "rng"
_LAST = "last"
_STATE = "state.safetensors"


class Progress(NamedTuple):
    """How far a run is. cursor: where the data goes on. seconds: of training so far."""

    step: int
    tokens: int
    cursor: Cursor
    seconds: float


def save_checkpoint(
    folder: Path,
    model: LM,
    tokenizer: Tokenizer,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    *,
    keep: int,
    state: State | None = None,
    average: Average | None = None,
) -> Path:
    """Write the checkpoint of `progress.step` into the run folder and remove all but the `keep` newest.

    state: what a run with train.tbptt carries from step to step. average: of a run with train.average, whose
    averaged weights are the checkpoint's; the last ones are kept for resuming.
    """
    final = folder / CHECKPOINTS / f"step-{progress.step}"
    for unfinished in final.parent.glob(".step-*.new"):
        shutil.rmtree(unfinished)
    temporary = final.with_name(f".{final.name}.new")
    (temporary / "weights").mkdir(parents=True)
    (temporary / "trainer").mkdir()
    tensors = {**optimizer_tensors(optimizer, model), _RNG: torch.get_rng_state()}
    with average.applied() if average else nullcontext():
        save_weights(model, temporary / "weights")
        if average:
            tensors |= {f"{_LAST}:{name}": value.clone() for name, value in average.tensors().items()}
    tokenizer.save(temporary / "weights")
    safetensors.torch.save_file(tensors, temporary / "trainer" / _OPTIMIZER)
    (temporary / "trainer" / _PROGRESS).write_text(
        json.dumps({**progress._asdict(), "cursor": progress.cursor._asdict()}) + "\n"
    )
    if state is not None:
        leaves = {name: leaf.contiguous() for name, leaf in state_tensors(state).items()}
        safetensors.torch.save_file(leaves, temporary / "trainer" / _STATE)
    _flush(temporary)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _flush(final.parent, below=False)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run folder, oldest first."""
    found = [path for path in (folder / CHECKPOINTS).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint of a run folder. Raises FileNotFoundError where there is none."""
    checkpoints = list_checkpoints(folder)
    if not checkpoints:
        raise FileNotFoundError(f"{folder} holds no checkpoint: train it first, or give a checkpoint folder")
    return checkpoints[-1]


def restore_checkpoint(
    checkpoint: Path, model: LM, optimizer: torch.optim.Optimizer, average: Average | None = None
) -> Progress:
    """Load weights, optimiser and random state into `model` and `optimizer`; return how far the run was.

    average: of a run with train.average, restored too.

    Raises ValueError for a checkpoint that is damaged or of another model.
    """
    device = model.embedding.weight.device
    saved = load_weights(checkpoint / "weights", backend=model.backend, device=device)
    if saved.config != model.config:
        raise ValueError(f"{checkpoint} is of another model than the run: {_remedy(checkpoint)}")
    tensors, rng, progress = _read_trainer(checkpoint)
    weights, prefix = saved.state_dict(), f"{_LAST}:"
    last = {n.removeprefix(prefix): tensors.pop(n) for n in list(tensors) if n.startswith(prefix)}
    restore_optimizer(optimizer, model, {name: tensor.to(device) for name, tensor in tensors.items()})
    if average:
        average.load(weights)
    model.load_state_dict({**weights, **last})
    torch.set_rng_state(rng)
    return progress


def restore_state(checkpoint: Path, model: LM, rows: int) -> State:
    """The state of `rows` rows that a run with train.tbptt carries. Raises ValueError for a damaged file."""
    path = checkpoint / "trainer" / _STATE
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged ({error}): {_remedy(checkpoint)}") from error
    return state_from_tensors(tensors, model.init_state(rows), what=str(path))


def start_from(model: LM, path: str) -> None:
    """Load the weights of a run or checkpoint folder into `model`, which may be configured otherwise.

    Names and shapes must be equal, but a balancing bias that only one of them has is left at zero or out.
    Raises FileNotFoundError where there are none, ValueError for damaged ones and those of another model.
    """
    folder = find_weights(path)
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"train.init_from={path!r} is damaged ({error}): use another checkpoint") from error
    own, biases = model.state_dict(), dict(model.named_buffers())
    tensors = {name: t for name, t in tensors.items() if name in own or not name.endswith("router.bias")}
    tensors = {name: t for name, t in biases.items() if name not in tensors} | tensors
    if problems := differences(own, tensors):
        raise ValueError(
            f"train.init_from={path!r} is not of this model: {'; '.join(problems[:3])}; give the same sizes"
        )
    model.load_state_dict(tensors)


def find_weights(path: str | Path) -> Path:
    """The weights folder that is meant by a run folder (its newest checkpoint), a checkpoint or itself."""
    folder = Path(path)
    if not folder.is_dir():
        near = Path("runs") / folder
        remedy = f"did you mean {near}?" if near.is_dir() else "give a run folder or a checkpoint folder"
        raise FileNotFoundError(f"no such folder: {folder}; {remedy}")
    if (folder / "weights").is_dir():
        return folder / "weights"
    if (folder / CHECKPOINTS).is_dir() or not (folder / "model.safetensors").is_file():
        return latest_checkpoint(folder) / "weights"
    return folder


def load(
    path: str | Path,
    *,
    backend: str = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[LM, Tokenizer]:
    """The model, in eval mode, and the tokenizer of a run folder, a checkpoint or a weights folder.

    Raises FileNotFoundError where there is none, ValueError where the files do not belong together.
    """
    folder = find_weights(path)
    model, tokenizer = (
        load_weights(folder, backend=backend, device=device, dtype=dtype),
        load_tokenizer(folder),
    )
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder} holds a tokenizer of {tokenizer.vocab_size} tokens and a model of "
            f"{model.config.vocab_size}: put back the tokenizer.json that the model was trained with"
        )
    return model, tokenizer


def _flush(folder: Path, *, below: bool = True) -> None:
    """Have `folder`, and with `below` all that is in it, on the disk before what follows: a power cut after
    the rename must not leave a whole name on half a file."""
    if os.name != "posix":
        return  # a folder cannot be opened elsewhere
    for path in (*(folder.rglob("*") if below else ()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_trainer(checkpoint: Path) -> tuple[dict[str, Tensor], Tensor, Progress]:
    """The optimiser's tensors, the random state and the progress."""
    folder = checkpoint / "trainer"
    try:
        tensors = safetensors.torch.load_file(folder / _OPTIMIZER)
        values = json.loads((folder / _PROGRESS).read_text())
        cursor = Cursor(**values.pop("cursor"))
        progress = Progress(cursor=cursor, **values)
        return tensors, tensors.pop(_RNG), progress
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is damaged ({error}): {_remedy(checkpoint)}") from error


def _remedy(checkpoint: Path) -> str:
    return f"remove {checkpoint} to resume from the checkpoint before it"
