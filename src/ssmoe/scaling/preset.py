"""A RunConfig as a preset file: the TOML that `ssmoe.config.load.load_run` reads."""

import json
from pathlib import Path
from typing import Any, cast

from ssmoe.config.load import RunConfig


def write_preset(run: RunConfig, path: Path) -> None:
    """Write a run's settings; only what was set, the rest are defaults. Refuses to overwrite."""
    if path.suffix != ".toml":
        raise ValueError(f"{path}: a preset is a .toml file, such as {path.with_suffix('.toml')}")
    if path.exists():
        raise ValueError(f"{path} exists: choose another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_toml(run))


def to_toml(run: RunConfig) -> str:
    """The sections of a preset."""
    values = run.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    model = values["model"]
    lines = [*_pairs({"description": run.description}), "", "[model]", *_pairs(model)]
    if "init" in model:
        lines += ["", "[model.init]", *_pairs(model["init"])]
    # `kind` is a default of every layer class, but what tells them apart
    for layer, given in zip(run.model.pattern, model["pattern"], strict=True):
        lines += ["", "[[model.pattern]]", *_pairs({"kind": layer.kind, **given})]
        for name, section in given.items():
            if isinstance(section, dict):
                lines += ["", f"[model.pattern.{name}]", *_pairs(cast(dict[str, Any], section))]
    for section in ("data", "train"):
        if section in values:
            lines += ["", f"[{section}]", *_pairs(values[section])]
            for name, below in values[section].items():
                if isinstance(below, dict):
                    lines += ["", f"[{section}.{name}]", *_pairs(cast(dict[str, Any], below))]
    return "\n".join(lines) + "\n"


def _pairs(section: dict[str, Any]) -> list[str]:
    """key = value for what is not a section; JSON's strings, numbers, booleans and lists are TOML's."""
    return [
        f"{key} = {json.dumps(value)}"
        for key, value in section.items()
        if not isinstance(value, dict) and key != "pattern"
    ]
