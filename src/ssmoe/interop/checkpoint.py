"""A folder of another library into a checkpoint folder of ours: every tensor mapped, or named.

Both known layouts name a Mamba-1 mixer alike; they differ in the configuration and the embedding's name.
"""

import json
import re
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ssmoe.config.model import ModelConfig
from ssmoe.data.tokenizer import Tokenizer
from ssmoe.interop import mamba_ssm, transformers
from ssmoe.model.build import build
from ssmoe.model.lm import LM
from ssmoe.model.weights import differences, save_weights

_MIXER = {
    "A_log": "ssm.A_log",
    "D": "ssm.D",
    "conv1d.weight": "conv.weight",
    "conv1d.bias": "conv.bias",
    "in_proj.weight": "in_proj.weight",
    "x_proj.weight": "x_proj.weight",
    "dt_proj.weight": "delta_proj.weight",
    "dt_proj.bias": "ssm.delta_bias",
    "out_proj.weight": "out_proj.weight",
}
_OUTSIDE = {
    mamba_ssm.EMBEDDING: "embedding.weight",
    transformers.EMBEDDING: "embedding.weight",
    "backbone.norm_f.weight": "norm.weight",
    "backbone.norm_f.bias": "norm.bias",
    "lm_head.weight": "head.weight",
}
_LAYER = re.compile(r"backbone\.layers\.(\d+)\.(mixer|norm)\.(.+)")


def read_checkpoint(folder: str | Path) -> LM:
    """The model in `folder` (config.json beside .safetensors or .bin files), in eval mode, in float32.

    .bin files are read with weights_only, so nothing in them executes. Raises FileNotFoundError for a
    missing file, ValueError for another architecture and for tensors that are missing, left over or of
    another shape, all of them named.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tensors = {ours(name): tensor for name, tensor in _read_tensors(folder).items()}
    if config.tied_embeddings and "head.weight" in tensors and "embedding.weight" in tensors:
        if not torch.equal(tensors["head.weight"], tensors["embedding.weight"]):
            raise ValueError(f"{folder} says that head and embedding are tied, and their weights differ")
        del tensors["head.weight"]
    for name in tensors:
        if name.endswith(".conv.weight") and tensors[name].ndim == 3:
            tensors[name] = tensors[name].squeeze(1)
        tensors[name] = tensors[name].to(torch.float32, copy=True).contiguous()
    model = build(config, device="meta", backend="reference")
    if problems := differences(model.state_dict(), tensors):
        raise ValueError(f"{folder} does not hold the model of its config.json: {'; '.join(problems)}")
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def import_checkpoint(folder: str | Path, out: str | Path, tokenizer: Tokenizer) -> LM:
    """Read `folder` and write it, with `tokenizer`, as the checkpoint folder `out`, which must not exist.

    Raises as `read_checkpoint`, and ValueError for a tokenizer with more tokens than the model.
    """
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists: name another folder, or remove it first")
    model = read_checkpoint(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size}: "
            "give the tokenizer that the model was trained with"
        )
    temporary = out.with_name(f".{out.name}.new")
    temporary.mkdir(parents=True, exist_ok=True)
    save_weights(model, temporary)
    tokenizer.save(temporary)
    temporary.rename(out)
    return model


def ours(name: str) -> str:
    """Our name of their tensor; a name that no layout has is kept, to be reported."""
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    if (match := _LAYER.fullmatch(name)) is None:
        return name
    layer, part, rest = match.groups()
    if part == "norm":
        return f"layers.{layer}.norm.{rest}"
    return f"layers.{layer}.layer.{_MIXER[rest]}" if rest in _MIXER else name


def _read_config(folder: Path) -> ModelConfig:
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give the folder of a downloaded checkpoint")
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        layout = mamba_ssm if "n_layer" in config and "d_model" in config else transformers
        return layout.model_config(config)
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not the configuration of a Mamba model: {error!r}") from error


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{folder} has no .safetensors and no pytorch_model.bin: download them too")
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                tensors |= safetensors.torch.load_file(path)
            else:
                tensors |= cast(dict[str, Tensor], torch.load(path, map_location="cpu", weights_only=True))
        except (SafetensorError, UnpicklingError, RuntimeError, EOFError, TypeError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{path} is damaged or not of weights alone: {reason}") from error
    return tensors
