"""In what two runs differ, key by key."""

from collections.abc import Iterator
from itertools import groupby
from typing import Any, cast

from ssmoe.config.load import RunConfig
from ssmoe.config.model import LayerConfig


def differences(run: RunConfig, other: RunConfig) -> dict[str, tuple[str, str]]:
    """Every key that differs, "train.learning_rate" and so on, with both values in words.

    Layers are one key, model.pattern, each in brackets with what is not its default, equals in a row counted.
    Names, descriptions and where the data is cached say nothing about a run and are left out.
    """
    mine, theirs = _flatten(run), _flatten(other)
    return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}


def _flatten(run: RunConfig) -> dict[str, str]:
    values = run.model_dump(include={"model": True, "data": True, "train": True})
    del values["model"]["pattern"], values["data"]["cache_dir"]
    alike = groupby(map(_describe, run.model.pattern))
    counted = ((layer, len(list(layers))) for layer, layers in alike)
    found = {"model.pattern": " ".join(f"{n} x {layer}" if n > 1 else layer for layer, n in counted)}
    for section, content in values.items():
        found |= dict(_leaves(section, content))
    return found


def _leaves(path: str, content: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key, value in content.items():
        if isinstance(value, dict):
            yield from _leaves(f"{path}.{key}", cast(dict[str, Any], value))
        else:
            yield f"{path}.{key}", str(value)


def _describe(layer: LayerConfig) -> str:
    values = layer.model_dump(exclude_defaults=True)
    values.pop("kind", None)
    return f"[{' '.join([layer.kind, *(f'{key}={value}' for key, value in values.items())])}]"
