"""The checkpoint folder of a model: model.safetensors and config.json, nothing that can execute."""

import json
from pathlib import Path

import safetensors.torch
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from torch import Tensor

from ssmoe.config.model import ModelConfig
from ssmoe.model.build import build
from ssmoe.model.lm import LM
from ssmoe.ops import resolve

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

    Raises FileNotFoundError for a missing file, ValueError for files that do not belong together.
    """
    config = read_config(folder)
    device = torch.device("cpu" if device is None else device)
    model = build(config, backend=resolve(backend, device.type), device="meta", dtype=dtype)
    try:
        tensors = safetensors.torch.load_file(folder / WEIGHTS, device=str(device))
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS} is damaged ({error}): use another checkpoint") from error
    if problems := differences(model.state_dict(), tensors):
        raise ValueError(f"{folder / WEIGHTS} is not of the model in {CONFIG}: {'; '.join(problems)}")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


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
    except (json.JSONDecodeError, ValidationError, KeyError, AttributeError) as error:
        reason = str(error).splitlines()[0]
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
