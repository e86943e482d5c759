"""ssmoe: language models that join selective state spaces (Mamba) with mixtures of experts.

Public names are loaded when they are first touched, so `import ssmoe` is quick and loads neither torch nor
any optional package.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssmoe import ops
    from ssmoe.api import compare, train
    from ssmoe.config.load import RunConfig, load_run, preset, preset_names
    from ssmoe.config.model import ModelConfig
    from ssmoe.generation.text import generate
    from ssmoe.model import state
    from ssmoe.model.build import build
    from ssmoe.model.feedforwards.moe import MoE
    from ssmoe.model.mixers.mamba import Mamba
    from ssmoe.training.checkpoint import load

__version__ = "0.1.0"

__all__ = [
    "Mamba",
    "MoE",
    "ModelConfig",
    "RunConfig",
    "build",
    "compare",
    "generate",
    "load",
    "load_run",
    "ops",
    "preset",
    "preset_names",
    "state",
    "train",
]

_HOMES = {
    "Mamba": "ssmoe.model.mixers.mamba",
    "MoE": "ssmoe.model.feedforwards.moe",
    "ModelConfig": "ssmoe.config.model",
    "RunConfig": "ssmoe.config.load",
    "build": "ssmoe.model.build",
    "compare": "ssmoe.api",
    "generate": "ssmoe.generation.text",
    "load": "ssmoe.training.checkpoint",
    "load_run": "ssmoe.config.load",
    "preset": "ssmoe.config.load",
    "preset_names": "ssmoe.config.load",
    "train": "ssmoe.api",
}
_MODULES = {"ops": "ssmoe.ops", "state": "ssmoe.model.state"}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return import_module(_MODULES[name])
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'ssmoe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
