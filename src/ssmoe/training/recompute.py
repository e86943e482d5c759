"""Activation checkpointing: the backward pass computes each layer again, whose insides were not kept."""

from functools import partial

from torch.utils import checkpoint

from ssmoe.model.feedforwards.router import Router
from ssmoe.model.lm import LM


def recompute_layers(model: LM) -> None:
    """Keep of every layer its input alone, from now on; parameters and their names stay as they are.

    Costs one more forward pass of the layers. Random numbers, where a router draws any, are the same both
    times; the generator is left alone where none does.
    """
    for layer in model.layers:
        draws = any(isinstance(part, Router) and part.jitter > 0 for part in layer.modules())
        layer.forward = partial(
            checkpoint.checkpoint,  # pyright: ignore[reportUnknownArgumentType, reportUnknownMemberType]
            layer.forward,
            use_reentrant=False,
            preserve_rng_state=draws,
        )
