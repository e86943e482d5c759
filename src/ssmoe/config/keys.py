"""Every key of a configuration that `key=value` may set, with its default and what it means."""

import json
from typing import Literal, NamedTuple, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from ssmoe.config.load import LAYERS, RunConfig


class Key(NamedTuple):
    """name: "train.steps". default: as `key=value` takes it, None where a value must be given."""

    name: str
    default: str | None
    description: str


def all_keys() -> list[Key]:
    """In the order of the classes; layers by kind, as in model.pattern.moe.num_experts."""
    keys = _keys("", RunConfig)
    for kind, layer in LAYERS.items():
        keys += [key for key in _keys(f"model.pattern.{kind}.", layer) if not key.name.endswith(".kind")]
    return keys


def _keys(prefix: str, section: type[BaseModel]) -> list[Key]:
    keys: list[Key] = []
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            keys += _keys(f"{prefix}{name}.", inner)
        else:
            keys.append(Key(prefix + name, _default(field), _describe(field)))
    return keys


def _describe(field: FieldInfo) -> str:
    words = " ".join((field.description or "").split())
    if get_origin(field.annotation) is not Literal:
        return words
    return f"One of {', '.join(map(str, get_args(field.annotation)))}. {words}".strip()


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value: object = field.default
    return value if isinstance(value, str) else json.dumps(value)
