"""The checkpoint folder of a model: model.safetensors and config.json, nothing that can execute."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from ssmoe.config.load import describe
from ssmoe.config.model import ModelConfig
from ssmoe.model.build import build
from ssmoe.model.feedforwards.moe import Experts
from ssmoe.model.lm import LM
from ssmoe.model.mixers.mamba_experts import LinearExperts, NetworkExperts
from ssmoe.model.norm import Linear
from ssmoe.ops import resolve, settled
from ssmoe.ops.device import check_home, resolve_device

FORMAT = 1
WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save_weights(model: LM, folder: Path) -> None:
    """Write the weights and configuration of `model` into the existing `folder`."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    safetensors.torch.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {"format": FORMAT, "model": model.config.model_dump(mode="json")}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_weights(
    folder: Path,
    *,
    backend: str = "auto",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> LM:
    """The model saved in `folder`, in eval mode; every tensor must be there with its shape, and no other.

    With a `dtype`, the compute dtype, matrices that are cast to it at every use are held in it, so that a
    token of generation does not cast them anew; norms, convolutions, the scan's parameters and routers keep
    the file's float32. Tied embeddings are such a matrix.
    Raises FileNotFoundError for a missing file, ValueError for files that do not belong together and for what
    `build` refuses.
    """
    config = read_config(folder)
    device = resolve_device(device)
    backend = resolve(backend, device.type)
    check_home(backend, device.type)
    model = build(config, backend=backend, device="meta", dtype=dtype)
    tensors = read_tensors(folder, device)
    if problems := differences(model.state_dict(), tensors):
        raise ValueError(f"{folder / WEIGHTS} is not of the model in {CONFIG}: {'; '.join(problems)}")
    cast = narrow(model) if dtype is not None else set[str]()
    for name in tensors:
        # a file's tensors lie at odd addresses, where matrix products round differently from torch's own
        tensors[name] = settled(tensors[name].to(dtype) if name in cast else tensors[name], model.backend)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def read_tensors(folder: Path, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The tensors saved in `folder`, by name, as they are. Raises ValueError for a damaged file."""
    try:
        return safetensors.torch.load_file(folder / WEIGHTS, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}): use another checkpoint") from error


def narrow(model: LM) -> set[str]:
    """Names of the parameters that are cast to the compute dtype at every use."""
    modules = cast(Iterator[tuple[str, nn.Module]], model.named_modules())
    return {
        f"{path}.{name}"
        for path, module in modules
        if isinstance(module, Linear | Experts | LinearExperts | NetworkExperts | nn.Embedding)
        for name, _ in module.named_parameters(recurse=False)
    }


def read_config(folder: Path) -> ModelConfig:
    """The configuration saved in `folder`."""
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a checkpoint folder: it has no {name}")
    try:
        content = json.loads((folder / CONFIG).read_text())
        if content.get("format") != FORMAT:
            raise ValueError(
                f"{folder / CONFIG} has format {content.get('format')} and this version reads {FORMAT}: "
                "use the version of ssmoe that wrote it"
            )
        return ModelConfig.model_validate(content["model"])
    except (json.JSONDecodeError, ValidationError, KeyError, TypeError, AttributeError) as error:
        reason = describe(error) if isinstance(error, ValidationError) else str(error)
        raise ValueError(f"{folder / CONFIG} is not a model configuration: {reason}") from error


def differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> list[str]:
    """One phrase for each way in which the tensors of `found` are not those of `expected`."""
    problems = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{name} has shape {tuple(found[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name].shape != found[name].shape
    ]
    return problems
