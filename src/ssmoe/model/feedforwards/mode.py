"""Layers whose tokens depend on one another can work as token choice with the same weights."""

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn

from ssmoe.model.feedforwards.expert_choice import ExpertChoice
from ssmoe.model.feedforwards.mot import MixtureOfTokens


@contextmanager
def token_choice(model: nn.Module) -> Generator[bool]:
    """Inside, every layer of `model` routes as token choice; gives whether that changes any."""
    changed = [
        (module, module.mode)
        for module in model.modules()
        if isinstance(module, MixtureOfTokens | ExpertChoice) and module.mode != "token_choice"
    ]
    try:
        for module, _ in changed:
            module.mode = "token_choice"
        yield bool(changed)
    finally:
        for module, mode in changed:
            module.mode = mode
