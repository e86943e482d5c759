"""In what two runs differ, key by key."""

from ssmoe.config.load import RunConfig
from ssmoe.config.model import LayerConfig


def differences(run: RunConfig, other: RunConfig) -> dict[str, tuple[str, str]]:
    """Every key that differs, "train.learning_rate" and so on, with both values in words.

    Layers are one key, model.pattern, each in brackets with what is not its default. Names, descriptions and
    where the data is cached say nothing about a run and are left out.
    """
    mine, theirs = _flatten(run), _flatten(other)
    return {key: (mine[key], theirs[key]) for key in mine if mine[key] != theirs[key]}


def _flatten(run: RunConfig) -> dict[str, str]:
    sections = {
        "model": run.model.model_dump(exclude={"pattern", "init"}),
        "model.init": run.model.init.model_dump(),
        "data": run.data.model_dump(exclude={"cache_dir"}),
        "train": run.train.model_dump(),
    }
    found = {f"{section}.{key}": str(v) for section, values in sections.items() for key, v in values.items()}
    return {"model.pattern": " ".join(map(_describe, run.model.pattern)), **found}


def _describe(layer: LayerConfig) -> str:
    values = layer.model_dump(exclude_defaults=True)
    values.pop("kind", None)
    return f"[{' '.join([layer.kind, *(f'{key}={value}' for key, value in values.items())])}]"
