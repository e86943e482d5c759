"""A stage file to the runs that it asks for.

    tokens = 25e6                     # a run; steps are tokens / (batch size * context), rounded
    evaluations = 40                  # held-out evaluations a run
    shared = ["train.eval_rows=256"]  # key=value of every run of the stage

    [recipes]                         # key=value that both sides may be trained with
    modern = ["model.norm=rmsnorm"]

    [[run]]
    name = "mamba"
    side = "mamba"                    # the side that sets the target; any other word is a challenger
    preset = "mamba-25m"
    recipe = "modern"                 # optional, or several: a run each, the recipe in its name
    set = ["key=value"]               # this run's own
    learning_rates = [1e-3, 2e-3]     # optional: a run each, the rate in its name
    seeds = [0, 1, 2]                 # optional: initial weights and order of the data
    tokens = 100e6                    # optional: instead of the stage's
    priority = 1                      # smaller is started earlier; 5 where it is not given
    one_sided = false                 # true: breaks the rules on purpose, kept out of the headline
"""

import tomllib
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from ssmoe.config.load import RunConfig, load_run

BASELINE = "mamba"
KEYS = {
    "name", "side", "preset", "recipe", "set", "learning_rates", "seeds", "tokens", "priority", "one_sided", "note",
}  # fmt: skip


class Try(NamedTuple):
    """A run to be made. reference: the baseline's preset under the same shared overrides, to compare with."""

    name: str
    stage: str
    side: str
    preset: str
    overrides: tuple[str, ...]
    config: RunConfig
    reference: RunConfig
    priority: int
    one_sided: bool
    note: str

    @property
    def tokens(self) -> int:
        """What the run reads."""
        train = self.config.train
        return train.steps * train.batch_size * self.config.data.context


def read_stage(path: Path, extra: tuple[str, ...] = ()) -> list[Try]:
    """Every run of a stage file; `extra` is set last, for all. Raises ValueError for a key that is unknown."""
    table = tomllib.loads(path.read_text())
    if unknown := table.keys() - {"tokens", "evaluations", "shared", "recipes", "baseline", "run"}:
        raise ValueError(f"{path}: unknown key {sorted(unknown)[0]!r}")
    tries = [made for entry in table["run"] for made in _expand(entry, table, path, extra)]
    names = [made.name for made in tries]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"{path}: two runs are called {sorted(twice)[0]!r}")
    return tries


def _expand(entry: dict[str, Any], table: dict[str, Any], path: Path, extra: tuple[str, ...]) -> list[Try]:
    if unknown := entry.keys() - KEYS:
        raise ValueError(f"{path}: unknown key {sorted(unknown)[0]!r} in run {entry.get('name')!r}")
    rates, seeds, recipes = (entry.get(key, [None]) for key in ("learning_rates", "seeds", "recipe"))
    found: list[Try] = []
    for recipe, rate, seed in product([recipes] if isinstance(recipes, str) else recipes, rates, seeds):
        name = entry["name"]
        own = list(entry.get("set", ()))
        seeded: list[str] = []
        if recipe is not None:
            name, seeded = f"{name}-{recipe}", list(table["recipes"][recipe])
        if rate is not None:
            name, own = f"{name}-lr{rate:g}", [*own, f"train.learning_rate={rate}"]
        if seed is not None:
            name, seeded = f"{name}-s{seed}", [*seeded, f"train.seed={seed}", f"data.seed={seed}"]
        shared = [*table.get("shared", ()), *seeded]
        tokens = float(entry.get("tokens", table["tokens"]))
        reference = _load(table.get("baseline", "mamba-25m"), shared, tokens, table, extra)
        config = _load(entry["preset"], [*shared, *own], tokens, table, extra)
        config = config.model_copy(update={"name": name})
        note, one_sided = entry.get("note", ""), entry.get("one_sided", False)
        head = (name, path.stem, entry["side"], entry["preset"], (*shared, *own))
        found.append(Try(*head, config, reference, entry.get("priority", 5), one_sided, note))
    return found


def _load(
    preset: str, overrides: list[str], tokens: float, table: dict[str, Any], extra: tuple[str, ...]
) -> RunConfig:
    """Stage-wide lengths come before the run's own settings, so that both may be overridden."""
    bare = load_run(preset, [*overrides, *extra])
    steps = max(1, round(tokens / (bare.train.batch_size * bare.data.context)))
    every = max(1, round(steps / table.get("evaluations", 40)))
    lengths = [f"train.steps={steps}", f"train.eval_every={every}"]
    never = ["train.keep_checkpoints=0"]
    return load_run(preset, [*lengths, *never, *overrides, *extra])
