"""A stage file to the runs that it asks for.

tokens = 25e6                     # a run; steps are tokens / (batch size * context), rounded
evaluations = 40                  # held-out evaluations a run
baseline = "mamba-25m"            # the preset that a run's configuration is held against
shared = ["train.eval_rows=256"]  # key=value of every run of the stage

[layers]                          # letters for what patterns are made of
m = { kind = "mamba" }

[recipes]                         # key=value that both sides may be trained with
modern = ["model.norm=rmsnorm"]

[[run]]
name = "mamba"
side = "mamba"                    # the side that sets the target; any other word is a challenger
preset = "mamba-25m"
recipe = "modern"                 # optional, or several: a run each, the recipe in its name;
                                  # "best" waits for side mamba and takes the recipe that ended lowest
set = ["key=value"]               # this run's own
pattern = "5m a 5m a 5m"          # optional: the layers, once, by their letters
learning_rates = [1e-3, 2e-3]     # optional: a run each, the rate in its name
seeds = [0, 1, 2]                 # optional: initial weights and order of the data
tokens = 100e6                    # optional, as evaluations: instead of the stage's; several: a run each
priority = 1                      # smaller is started earlier; 5 where it is not given
one_sided = false                 # true: breaks the rules on purpose, kept out of the headline
on = "fine"                       # optional: another run's preset and `set` come before this one's,
group = "gates"                   # which is then a factor; of a group the best one is taken
note = "what is tried"

[[promote]]                       # once the stage's runs have ended, the best of a side at more tokens
side = "mamba"
top = 1
tokens = 100e6
evaluations = 60                  # optional: instead of the stage's
priority = 0
seeds = [0, 1, 2]                 # optional: a run each
as = "fine"                       # optional: the name of what is run
combine = "fine"                  # instead of the best runs: that run with every factor that made it
                                  # better (held-out loss), with half of them, with the best alone ...
"""

import json
import tomllib
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from rules import violations

from ssmoe.config.load import RunConfig, load_run

BASELINE, BEST = "mamba", "best"
STAGE_KEYS = {"tokens", "evaluations", "shared", "layers", "recipes", "baseline", "run", "promote"}
RUN_KEYS = {
    "name", "side", "preset", "recipe", "set", "learning_rates", "seeds", "tokens", "priority", "one_sided",
    "note", "on", "group", "evaluations", "pattern",
}  # fmt: skip
PROMOTE_KEYS = {"side", "top", "tokens", "evaluations", "seeds", "priority", "combine", "as"}


class Try(NamedTuple):
    """A run to be made. reference: the baseline's preset under the same shared overrides, to compare with.

    promoted: it continues what shorter runs, or runs with one seed, have shown.
    """

    name: str
    stage: str
    entry: dict[str, Any]
    recipe: str | None
    overrides: tuple[str, ...]
    config: RunConfig
    reference: RunConfig
    promoted: bool = False

    @property
    def tokens(self) -> int:
        """What the run reads."""
        train = self.config.train
        return train.steps * train.batch_size * self.config.data.context

    @property
    def side(self) -> str:
        return self.entry["side"]

    @property
    def priority(self) -> int:
        return self.entry.get("priority", 5)

    @property
    def one_sided(self) -> bool:
        return self.entry.get("one_sided", False)


class Stage:
    """A stage file; `extra` is set last, for all runs; `only` is a glob of names.

    Raises ValueError for a key that is unknown.
    """

    def __init__(self, path: Path, extra: tuple[str, ...] = (), only: str = "*") -> None:
        self.name, self.extra, self.only = path.stem, extra, only
        self.table: dict[str, Any] = tomllib.loads(path.read_text())
        self.promotions: list[dict[str, Any]] = self.table.get("promote", [])
        entries: list[dict[str, Any]] = self.table["run"]
        for keys, valid in [
            (self.table, STAGE_KEYS),
            *((entry, RUN_KEYS) for entry in entries),
            *((entry, PROMOTE_KEYS) for entry in self.promotions),
        ]:
            if unknown := keys.keys() - valid:
                raise ValueError(
                    f"{path}: unknown key {sorted(unknown)[0]!r}; valid: {', '.join(sorted(valid))}"
                )
        entries = [_on(entry, entries) for entry in entries]
        self.waiting = [entry for entry in entries if entry.get("recipe") == BEST]
        self.tries = [made for entry in entries if entry not in self.waiting for made in self._expand(entry)]
        names = [made.name for made in self.tries]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{path}: two runs are called {sorted(twice)[0]!r}")

    def with_recipe(self, recipe: str | None) -> list[Try]:
        """The runs that have waited for the best recipe."""
        return [made for entry in self.waiting for made in self._expand({**entry, "recipe": recipe or []})]

    @property
    def one_recipe(self) -> bool:
        """Whether all runs are trained alike, so that no recipe has to be found first."""
        return not self.waiting and len({made.recipe for made in self.tries}) == 1

    def promote(self, entry: dict[str, Any], losses: Mapping[str, float], recipe: str | None) -> list[Try]:
        """The best of finished runs (name -> final loss) as an entry of [[promote]] wants them.

        Challengers count only with the recipe that was best for the baseline's side. Of runs that differ only
        in the learning rate the best alone is taken.
        """
        ranked = sorted(
            (
                made
                for made in [*self.tries, *self.with_recipe(recipe)]
                if made.name in losses
                and made.side == entry["side"]
                and not made.one_sided
                and (made.side == BASELINE or made.recipe == recipe)
            ),
            key=lambda made: losses[made.name],
        )
        if "combine" in entry:
            return combinations(ranked, losses, entry, self._longer)
        first: dict[str, Try] = {}
        for made in ranked:
            first.setdefault(f"{made.entry['name']} {made.recipe}", made)
        best = list(first.values())[: entry["top"]]
        return [longer for made in best for longer in self._longer(made, entry)]

    def _longer(self, made: Try, entry: dict[str, Any]) -> list[Try]:
        """The run with the tokens, evaluations and seeds that a promotion asks for, under its name."""
        changed = {
            **made.entry,
            "priority": entry.get("priority", 0),
            "name": entry.get("as", made.entry["name"]),
        }
        changed |= {key: entry[key] for key in ("evaluations", "tokens") if key in entry}
        seed = made.config.train.seed if "seeds" in made.entry else None
        rate = made.config.train.learning_rate if "learning_rates" in made.entry else None
        longer = [self._make(changed, made.recipe, rate, each) for each in entry.get("seeds", [seed])]
        return [each._replace(promoted=True) for each in longer]

    def _expand(self, entry: dict[str, Any]) -> list[Try]:
        rates, seeds, recipes = (entry.get(key) or [None] for key in ("learning_rates", "seeds", "recipe"))
        recipes = [recipes] if isinstance(recipes, str) else recipes
        lengths = entry.get("tokens")
        entries = [{**entry, "tokens": t} for t in lengths] if isinstance(lengths, list) else [entry]
        made = [self._make(*picked) for picked in product(entries, recipes, rates, seeds)]
        return [one for one in made if fnmatch(one.name, self.only)]

    def _make(self, entry: dict[str, Any], recipe: str | None, rate: float | None, seed: int | None) -> Try:
        name, own = entry["name"], [*entry.get("below", ()), *entry.get("set", ())]
        if "pattern" in entry:
            own = [*layers(entry["pattern"], self.table.get("layers", {})), *own]
        # a pattern is what the keys of its layers are then set in
        own.sort(key=lambda override: not override.startswith("model.pattern="))
        shared = list(self.table.get("shared", ()))
        if recipe is not None:
            name, shared = f"{name}-{recipe}", [*shared, *self.table["recipes"][recipe]]
        if rate is not None:
            name, own = f"{name}-lr{rate:g}", [*own, f"train.learning_rate={rate}"]
        if seed is not None:
            name, shared = f"{name}-s{seed}", [*shared, f"train.seed={seed}", f"data.seed={seed}"]
        if "tokens" in entry:
            name = f"{name}-{float(entry['tokens']) / 1e6:g}m"
        reference = self._load(self.table.get("baseline", "mamba-25m"), shared, entry)
        config = self._load(entry["preset"], [*shared, *own], entry).model_copy(update={"name": name})
        return Try(name, self.name, entry, recipe, (*shared, *own), config, reference)

    def _load(self, preset: str, overrides: list[str], entry: dict[str, Any]) -> RunConfig:
        """Lengths come before the run's own settings, so that they may be overridden."""
        tokens = float(entry.get("tokens", self.table["tokens"]))
        evaluations = entry.get("evaluations", self.table.get("evaluations", 40))
        bare = load_run(preset, [*overrides, *self.extra])
        steps = max(1, round(tokens / (bare.train.batch_size * bare.data.context)))
        every = max(1, round(steps / evaluations))
        lengths = [f"train.steps={steps}", f"train.eval_every={every}", "train.keep_checkpoints=0"]
        return load_run(preset, [*lengths, *overrides, *self.extra])


def _on(entry: dict[str, Any], entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The entry with what it is built on. Raises ValueError where entries of that name are not set alike."""
    if "on" not in entry:
        return entry
    base, *others = [each for each in entries if each["name"] == entry["on"]]
    if any(each.get(key) != base.get(key) for each in others for key in ("preset", "set", "pattern")):
        raise ValueError(f"{entry['name']}: runs called {entry['on']!r} are set differently: name one anew")
    kept = {key: base[key] for key in ("preset", "side", "pattern") if key in base}
    return {**kept, "below": base.get("set", []), **entry}


def layers(pattern: str, letters: Mapping[str, dict[str, Any]]) -> list[str]:
    """The settings of a pattern such as "5m a 5m": five layers of letter m, one of a, five of m.

    Raises ValueError for a letter that the stage does not define.
    """
    found: list[dict[str, Any]] = []
    for word in pattern.split():
        count, letter = word[:-1] or "1", word[-1]
        if letter not in letters or not count.isdecimal():
            raise ValueError(f"pattern {pattern!r}: {word!r} is no number and letter of {', '.join(letters)}")
        found += int(count) * [letters[letter]]
    return [f"model.pattern={json.dumps(found)}", "model.repeat=1"]


def combinations(
    ranked: list[Try],
    losses: Mapping[str, float],
    entry: dict[str, Any],
    longer: Callable[[Try, dict[str, Any]], list[Try]],
) -> list[Try]:
    """Runs of `entry["combine"]` with the factors that helped: all, half of them, ... the best alone.

    A factor is measured against the base at the same learning rate, where that was run. A combination that
    breaks the rules, for its active parameters, goes without the factor that does it.
    """
    bases = [made for made in ranked if made.entry["name"] == entry["combine"]]
    if not bases:
        return []
    rates = {made.config.train.learning_rate: losses[made.name] for made in reversed(bases)}
    gains: dict[str, tuple[float, Try]] = {}
    for made in ranked:
        gain = rates.get(made.config.train.learning_rate, losses[bases[0].name]) - losses[made.name]
        group = made.entry.get("group")
        if group and made.entry.get("on") == entry["combine"] and gain > gains.get(group, (0.0, made))[0]:
            gains[group] = gain, made
    factors = [made.entry for _, made in sorted(gains.values(), key=lambda pair: -pair[0])]
    found: dict[str, list[Try]] = {}
    for size in [*(round(len(factors) / 2**i) for i in range(10)), 0]:
        best = longer(bases[0], entry)
        chosen: list[dict[str, Any]] = []
        for factor in factors:
            changed = _with_factors(bases[0].entry, [*chosen, factor])
            made = longer(bases[0]._replace(entry=changed), entry)
            if len(chosen) < size and not violations(made[0].config, made[0].reference):
                best, chosen = made, [*chosen, factor]
        found.setdefault("+".join(factor["name"] for factor in chosen), best)
    return [made for runs in list(found.values())[: entry["top"]] for made in runs]


def _with_factors(base: dict[str, Any], factors: list[dict[str, Any]]) -> dict[str, Any]:
    """The base's entry with the settings of factors, named after them."""
    name = "+".join([base["name"], *(factor["name"] for factor in factors)])
    return {**base, "name": name, "set": [*base.get("set", ()), *(v for f in factors for v in f["set"])]}
