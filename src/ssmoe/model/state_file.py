"""A state as a file: safetensors with a header that says which model and tokenizer it belongs to.

The header binds the file to the model's configuration and weights, whatever backend or compute dtype made
the state, and a checksum over header and tensors tells damage apart. Nothing in the file can execute.
"""

import json
import os
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ssmoe.model.layer import LayerState, State
from ssmoe.model.lm import LM
from ssmoe.model.mixers.attention import AttentionState
from ssmoe.model.weights import narrow

FORMAT = "ssmoe-state"
VERSION = 1


class HasFingerprint(Protocol):
    """What a state file asks of a tokenizer."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids."""
        ...


class StateHeader(NamedTuple):
    """tokens: read so far, a row. pending: ids still to be read first on continuation, a row.

    model, tokenizer: fingerprints, the second "" where none was given. dtype: the model's compute dtype.
    note: free text.
    """

    model: str
    tokenizer: str
    tokens: tuple[int, ...]
    pending: tuple[tuple[int, ...], ...]
    dtype: str
    note: str = ""


class StateFile(NamedTuple):
    """A state and its header; `extra` holds further tensors that were saved with it, by name."""

    state: State
    header: StateHeader
    extra: dict[str, Tensor]


def fingerprint(model: LM) -> str:
    """Hash of configuration and weights, the same on every backend, device and in every compute dtype.

    Matrices enter as bfloat16, which is how a model that computes in it holds them.
    """
    matrices = narrow(model)
    digest = blake2b(digest_size=16)
    digest.update(json.dumps(model.config.model_dump(mode="json"), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        _update(digest, name, (tensor.bfloat16() if name in matrices else tensor).float())
    return digest.hexdigest()


def save(
    state: State,
    path: str | Path,
    *,
    model: LM | str,
    tokenizer: HasFingerprint | None = None,
    tokens: int | Sequence[int] = 0,
    pending: Sequence[Sequence[int]] | None = None,
    note: str = "",
    extra: dict[str, Tensor] | None = None,
) -> None:
    """Write `state` of `model` (or of the model with that fingerprint) to `path`, whole or not at all.

    tokens: how many each row has read, or one number for all. pending: ids to be read first on continuation.
    Raises ValueError for numbers that do not fit the rows, FileNotFoundError where the folder does not exist.
    """
    if not Path(path).absolute().parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder does not exist; make it first")
    tensors = state_tensors(state)
    rows = next((leaf.shape[0] for leaf in tensors.values()), 1)
    counts = (tokens,) * rows if isinstance(tokens, int) else tuple(tokens)
    waiting = ((),) * rows if pending is None else tuple(tuple(row) for row in pending)
    if tensors and not len(counts) == len(waiting) == rows:
        raise ValueError(f"a state of {rows} rows with {len(counts)} token counts and {len(waiting)} pending")
    header = StateHeader(
        model=model if isinstance(model, str) else fingerprint(model),
        tokenizer="" if tokenizer is None else tokenizer.fingerprint,
        tokens=counts,
        pending=waiting,
        dtype=str(next((leaf.dtype for leaf in tensors.values()), torch.float32)).removeprefix("torch."),
        note=note,
    )
    tensors |= {f"extra.{name}": tensor for name, tensor in (extra or {}).items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    fields = header._asdict()
    about = {"version": VERSION, "header": fields, "checksum": _checksum(fields, tensors)}
    # one entry, because safetensors writes several in no fixed order
    metadata = {FORMAT: json.dumps(about, sort_keys=True)}
    temporary = Path(f"{path}.{os.getpid()}.new")
    try:
        safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(
    path: str | Path, *, model: LM, tokenizer: HasFingerprint | None = None, model_id: str | None = None
) -> StateFile:
    """The state in `path`, on the model's device.

    model_id: the model's fingerprint where it is known, which otherwise costs a pass over the weights.
    Raises FileNotFoundError for no file, ValueError for a file that is damaged, is no state, or belongs to
    another model or tokenizer.
    """
    header, tensors = read(path)
    if header.model != (model_id or fingerprint(model)):
        raise ValueError(
            f"{path} is a state of another model ({header.model[:8]}): load it with the weights that made it"
        )
    if tokenizer is not None and header.tokenizer and header.tokenizer != tokenizer.fingerprint:
        raise ValueError(f"{path} was made with another tokenizer: load it with that one")
    extra = {name.removeprefix("extra."): t for name, t in tensors.items() if name.startswith("extra.")}
    state = state_from_tensors(
        {name: tensor for name, tensor in tensors.items() if not name.startswith("extra.")},
        model.init_state(len(header.tokens)),
        what=str(path),
    )
    return StateFile(state, header, extra)


def read(path: str | Path) -> tuple[StateHeader, dict[str, Tensor]]:
    """Header and tensors of a state file whatever model it belongs to, checked against the checksum."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such state file: {path}")
    try:
        with cast(Any, safe_open)(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no state file ({error}): save the state anew") from error
    if FORMAT not in metadata:
        raise ValueError(f"{path} is no state file: give one that `ssmoe state save` or --state-out wrote")
    try:
        about: dict[str, Any] = json.loads(metadata[FORMAT])
        version, values, checksum = about["version"], dict(about["header"]), about["checksum"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its header cannot be read ({error})") from error
    if version != VERSION:
        raise ValueError(
            f"{path} has format version {version} and this version reads {VERSION}: "
            "use the version of ssmoe that wrote it"
        )
    if checksum != _checksum(values, tensors):
        raise ValueError(f"{path} is damaged: its contents do not match its checksum; save the state anew")
    values["tokens"] = tuple(values["tokens"])
    values["pending"] = tuple(tuple(row) for row in values["pending"])
    return StateHeader(**values), tensors


def state_tensors(state: State) -> dict[str, Tensor]:
    """Every leaf by name, "layers.0.ssm" and so on."""
    return {
        f"layers.{i}.{field}": leaf
        for i, layer in enumerate(state)
        for field, leaf in zip(_fields(layer), cast(Iterable[Tensor], layer), strict=True)
    }


def state_from_tensors(tensors: dict[str, Tensor], like: State, *, what: str) -> State:
    """The state with the kinds, dtypes and device of `like`, from named leaves; the inverse of above.

    Raises ValueError, naming `what`, where they do not fit together.
    """
    expected = state_tensors(like)
    if tensors.keys() != expected.keys():
        odd = sorted(tensors.keys() ^ expected.keys())[0]
        raise ValueError(f"{what} does not fit the model: {odd} is on one side only")
    return tuple(_layer(i, layer, tensors, what) for i, layer in enumerate(like))


def _layer(i: int, like: LayerState, tensors: dict[str, Tensor], what: str) -> LayerState:
    leaves: list[Tensor] = []
    for field, wanted in zip(_fields(like), cast(Iterable[Tensor], like), strict=True):
        found, name = tensors[f"layers.{i}.{field}"], f"layers.{i}.{field}"
        shape, room = list(wanted.shape), isinstance(like, AttentionState) and wanted.ndim == 4
        if room and found.ndim == 4:
            # keys and values bring their own capacity
            shape[2] = found.shape[2]
        if list(found.shape) != shape:
            raise ValueError(f"{what}: {name} has shape {tuple(found.shape)}, expected {tuple(shape)}")
        # copied, because a file's tensors lie at odd addresses, where kernels may round differently
        leaves.append(found.to(device=wanted.device, dtype=wanted.dtype, copy=True))
    return type(like)(*leaves) if leaves else ()


def _fields(layer: LayerState) -> tuple[str, ...]:
    return cast(tuple[str, ...], getattr(layer, "_fields", ()))


def _checksum(header: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    digest = blake2b(json.dumps(header, sort_keys=True).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        _update(digest, name, tensor)
    return digest.hexdigest()


def _update(digest: blake2b, name: str, tensor: Tensor) -> None:
    digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        digest.update(cast(Any, flat.view(torch.uint8).numpy()))
