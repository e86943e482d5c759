"""A preset or a file, plus key=value, to a frozen RunConfig; a wrong key is told the nearest valid one."""

import json
import tomllib
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Self, cast

from pydantic import BaseModel, Field, ValidationError, model_validator

from ssmoe.config.data import DataConfig
from ssmoe.config.model import (
    AttentionConfig,
    DenseConfig,
    ExpertChoiceConfig,
    Frozen,
    MambaConfig,
    MambaExpertsConfig,
    ModelConfig,
    MoEConfig,
    MoTConfig,
    ParallelConfig,
    S4DConfig,
)
from ssmoe.config.train import TrainConfig

LAYERS: dict[str, type[Frozen]] = {
    "mamba": MambaConfig,
    "s4d": S4DConfig,
    "attention": AttentionConfig,
    "dense": DenseConfig,
    "moe": MoEConfig,
    "mamba_experts": MambaExpertsConfig,
    "parallel": ParallelConfig,
    "expert_choice": ExpertChoiceConfig,
    "mot": MoTConfig,
}


_ALL_LAYERS = 'set all layers, as in model.pattern=[{"kind": "mamba"}, {"kind": "dense", "d_ff": 512}]'


class RunConfig(Frozen):
    """Everything that defines a run."""

    name: str = Field(pattern=r"^[\w][\w.+-]*$")
    """Also the run folder's name, so letters, digits and _ . + - only."""
    description: str = ""
    model: ModelConfig
    data: DataConfig = DataConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.train.tbptt is not None and self.model.objective == "masked":
            raise ValueError(
                f"train.tbptt={self.train.tbptt} carries a state forward and a masked model reads both ways: "
                "set train.tbptt=null"
            )
        rows, multiple = self.train.micro_batch_size or self.train.batch_size, self.model.row_multiple
        if rows % multiple:
            raise ValueError(
                f"{rows} rows a forward pass do not fill groups of {multiple}: set train.batch_size (or "
                f"train.micro_batch_size) to {rows + -rows % multiple} or a smaller model.pattern.mot.group"
            )
        if self.data.context % self.model.length_multiple:
            raise ValueError(
                f"data.context={self.data.context} does not fill groups of {self.model.length_multiple}: "
                f"use {self.data.context + -self.data.context % self.model.length_multiple}"
            )
        if self.model.length_multiple > 1 and self.data.isolate_documents:
            raise ValueError(
                'axis="sequence" mixes neighbours whichever document they are of: '
                "set data.isolate_documents=false"
            )
        return self


def preset_names() -> list[str]:
    """The shipped presets, in alphabetical order."""
    folder = files("ssmoe.config") / "presets"
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def preset(name: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A shipped preset with `key=value` overrides, such as "model.repeat=4" or "model.pattern.moe.top_k=2".

    Raises ValueError for an unknown preset or key, naming the nearest, or for a value that does not fit;
    TypeError for overrides that are no list of texts.
    """
    if name not in preset_names():
        raise ValueError(
            f"unknown preset {name!r}{_nearest(name, preset_names())}; `ssmoe presets` lists them"
        )
    text = (files("ssmoe.config") / "presets" / f"{name}.toml").read_text()
    return _run_config({"name": name, **tomllib.loads(text)}, overrides, f"preset {name}")


def load_run(preset_or_file: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A preset by name, or a .toml or .json file (a run's config.json, say), with `key=value` overrides.

    Raises FileNotFoundError for a missing file, otherwise as `preset`.
    """
    path = Path(preset_or_file)
    if path.suffix not in {".toml", ".json"}:
        return preset(preset_or_file, overrides)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}; give a preset's name or a .toml or .json file")
    try:
        text = path.read_text()
        values: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no sections: it needs at least [model]")
    if values.keys() == {"format", "model"}:
        raise ValueError(
            f"{path} is of a checkpoint folder, not of a run: to train on from its weights, name a preset of "
            f"the same sizes and train.init_from={path.parent}"
        )
    return _run_config({"name": path.stem, **values}, overrides, str(path))


def _run_config(values: dict[str, Any], overrides: Sequence[str], source: str) -> RunConfig:
    if isinstance(overrides, (str, dict)):
        raise TypeError(
            f'overrides is a {type(overrides).__name__}: give a list, such as ["train.steps=100"]'
        )
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"{override!r} is not of the form key=value, such as train.steps=100")
        _assign(values, key.split("."), _parse(value), key)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{source}: {describe(error)}") from error


def _parse(text: str) -> Any:
    """JSON where it is JSON (numbers, true, null, lists), else the text itself."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _assign(values: dict[str, Any], path: list[str], value: Any, key: str) -> None:
    """Set `value` at `path`; a segment into `pattern` is an index, or a kind, meaning all of that kind."""
    model: type[BaseModel] = RunConfig
    targets: list[dict[str, Any]] = [values]
    for i, segment in enumerate(path):
        if segment not in model.model_fields:
            prefix = ".".join(path[:i])
            raise ValueError(f"unknown key {key!r}{_nearest_key(prefix, segment, model)}")
        if i == len(path) - 1:
            for target in targets:
                target[segment] = value
            return
        if segment == "pattern":
            layers = cast(list[dict[str, Any]], targets[0]["pattern"])
            targets = _pick_layers(layers, path[i + 1], key)
            if len(path) == i + 2:
                raise ValueError(f"{key!r} is a whole layer: name a field of it, or {_ALL_LAYERS}")
            kinds = {cast(str, target["kind"]) for target in targets}
            model = LAYERS[kinds.pop()]
            _assign_layers(targets, model, path[i + 2 :], value, key)
            return
        annotation = model.model_fields[segment].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            raise ValueError(f"unknown key {key!r}: {segment} is a value, not a section")
        model = annotation
        targets = [target.setdefault(segment, {}) for target in targets]


def _assign_layers(
    targets: list[dict[str, Any]], model: type[BaseModel], path: list[str], value: Any, key: str
) -> None:
    section = model.model_fields[path[0]].annotation if path[0] in model.model_fields else None
    if len(path) == 2 and isinstance(section, type) and issubclass(section, BaseModel):
        inner = [cast(dict[str, Any], target.setdefault(path[0], {})) for target in targets]
        return _assign_layers(inner, section, path[1:], value, key)
    if path == ["kind"]:
        raise ValueError(f"{key!r}: a layer's other fields belong to its kind: {_ALL_LAYERS}")
    if len(path) != 1 or path[0] not in model.model_fields:
        prefix = key.removesuffix("." + ".".join(path))
        raise ValueError(f"unknown key {key!r}{_nearest_key(prefix, path[0], model)}")
    for target in targets:
        target[path[0]] = value
    return None


def _pick_layers(layers: list[dict[str, Any]], segment: str, key: str) -> list[dict[str, Any]]:
    if segment.isdigit() and int(segment) < len(layers):
        return [layers[int(segment)]]
    picked = [layer for layer in layers if layer.get("kind") == segment]
    if not picked:
        kinds = sorted({str(layer.get("kind")) for layer in layers})
        raise ValueError(
            f"unknown key {key!r}: the pattern's layers are 0 to {len(layers) - 1}, "
            f"or by kind {', '.join(kinds)}"
        )
    return picked


def _nearest_key(prefix: str, segment: str, model: type[BaseModel]) -> str:
    """The closest field beside the one asked for, or anywhere in the configuration."""
    dot = f"{prefix}." if prefix else ""
    near = get_close_matches(segment, model.model_fields, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {dot}{near[0]}?"
    everywhere = [key for key in _all_keys() if key.rpartition(".")[2] == segment]
    if everywhere:
        return f"; did you mean {everywhere[0]}?"
    return f"; valid here: {', '.join(dot + name for name in model.model_fields)}"


def _all_keys() -> list[str]:
    sections: dict[str, type[BaseModel]] = {"model": ModelConfig, "data": DataConfig, "train": TrainConfig}
    keys = [f"{section}.{name}" for section, model in sections.items() for name in model.model_fields]
    return keys + [
        f"model.pattern.{kind}.{name}" for kind, model in LAYERS.items() for name in model.model_fields
    ]


def _nearest(name: str, valid: Iterable[str]) -> str:
    near = get_close_matches(name, list(valid), n=1, cutoff=0.4)
    return f"; did you mean {near[0]}?" if near else ""


def describe(error: ValidationError) -> str:
    """The first problem of a pydantic error in one line; a misspelt key comes before a missing one."""
    first = min(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        valid = _field_names() if "." in where else list(RunConfig.model_fields)
        return f"unknown key {where!r}{_nearest(where.rpartition('.')[2], valid)}"
    given = first["input"]
    shown = f" (got {given!r})" if isinstance(given, (str, int, float, bool)) else ""
    return f"{where}: {message}{shown}" if where else message


def _field_names() -> list[str]:
    return [*RunConfig.model_fields, *(key.rpartition(".")[2] for key in _all_keys())]
