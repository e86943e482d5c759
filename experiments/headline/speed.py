"""Which Transformer MoE-Mamba's speed is held against, and the table of what `inference.py` measured."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from results import Result, final

FINE, MAMBA = "hybrid", "mamba-hybrid"
"""Entries of final.toml: the winner, and the tuned Mamba."""
PLAIN = ("open", "mamba")
"""The same two without attention layers."""
TRANSFORMERS = "transformer"
"""The side of final.toml that has them."""
NAMES = {
    FINE: "MoE-Mamba",
    "open": "MoE-Mamba without attention",
    "transformer": "Transformer",
    "tmoe": "Transformer-MoE",
}


class Pair(NamedTuple):
    """MoE-Mamba's run, the Transformer's, and the best run of every Transformer that was trained on as many
    tokens; MoE-Mamba without attention, where it was too; the rates that the Transformer was given."""

    ours: Result
    theirs: Result
    others: list[Result]
    plain: Result | None
    rates: list[float]

    @property
    def worse(self) -> float:
        """Nats by which the Transformer's final loss is above MoE-Mamba's; at most 0 where it is as good."""
        return final(self.theirs) - final(self.ours)


def choose(runs: Sequence[Result]) -> Pair | None:
    """At the most tokens that both have been trained on: the Transformer with the fewest active parameters
    among those that end at or below MoE-Mamba's loss, else the one that comes nearest; None without any."""
    done = [run for run in runs if run["stage"] == "final" and run["status"] == "done" and run["seed"] == 0]
    fine = {run["tokens"]: run for run in done if run["entry"] == FINE}
    lengths = {run["tokens"] for run in done if run["side"] == TRANSFORMERS} & fine.keys()
    if not lengths:
        return None
    ours = fine[max(lengths)]
    tried = [run for run in done if run["side"] == TRANSFORMERS and run["tokens"] == ours["tokens"]]
    best = {run["entry"]: run for run in sorted(tried, key=final, reverse=True)}
    others = sorted(best.values(), key=final)
    as_good = [run for run in others if final(run) <= final(ours)]
    smallest = min(as_good, key=lambda run: (run["active"], run["non_embedding"]), default=None)
    theirs = smallest or others[0]
    plain = (run for run in done if run["entry"] == PLAIN[0] and run["tokens"] == ours["tokens"])
    rates = sorted({run["learning_rate"] for run in tried if run["entry"] == theirs["entry"]})
    return Pair(ours, theirs, others, next(plain, None), rates)


def sentence(pair: Pair) -> str:
    """What is compared with what, and whom that favours."""
    ours, theirs = (NAMES[run["entry"]] for run in (pair.ours, pair.theirs))
    tokens = f"{pair.ours['tokens'] / 1e6:.0f} M tokens"
    sizes = (
        f"{pair.theirs['active'] / 1e6:.1f} M active parameters of {pair.theirs['non_embedding'] / 1e6:.0f} M"
    )
    losses = f"{final(pair.theirs):.3f} nats against {final(pair.ours):.3f}, both after {tokens}"
    beside = "".join(
        f" The {NAMES[run['entry']]} beside it ends {final(run) - final(pair.ours):+.3f} nats from {ours}."
        for run in pair.others
        if run is not pair.theirs
    )
    if pair.worse <= 0:
        return (
            f"The smallest Transformer that was trained and is at least as good as {ours} is the {theirs} "
            f"({sizes}; {losses}).{beside}"
        )
    return (
        f"No Transformer that was trained is as good as {ours}. The nearest, the {theirs} ({sizes}), ends "
        f"{pair.worse:.3f} nats worse ({losses}): one of equal loss would be larger or trained for longer, "
        f"so the comparison favours the Transformer. {_rates(pair)}{beside}"
    )


def _rates(pair: Pair) -> str:
    """How many learning rates the Transformer was given."""
    if len(pair.rates) == 1:
        return "Its learning rate was not searched."
    return f"Its learning rate is the best of {', '.join(f'{rate:g}' for rate in pair.rates)}."


def tables(measured: Sequence[dict[str, Any]], runs: Sequence[Result]) -> list[str]:
    """The sentence, then for each device a table: tokens a second of every model, and MoE-Mamba's multiple
    of the Transformer's."""
    pair = choose(runs)
    if pair is None or not measured:
        return ["Not measured yet."]
    lines = [sentence(pair)]
    for each in measured:
        if pair.ours["entry"] not in each["models"] and pair.plain:
            lines += ["", "Not measured with attention layers on this device.", ""]
            lines += table(each, pair._replace(ours=pair.plain))
        else:
            lines += ["", *table(each, pair)]
    return lines


def table(measured: dict[str, Any], pair: Pair) -> list[str]:
    """One device."""
    ours, theirs = pair.ours["entry"], pair.theirs["entry"]
    columns = [name for name in (ours, theirs, *NAMES) if name in measured["models"]]
    columns = list(dict.fromkeys(columns))
    titles = " | ".join(NAMES[name] for name in columns)
    others = f", others took up to {measured['others']:.2f} cores" if measured["others"] >= 0.1 else ""
    where = f"{measured['device']}, torch {measured['torch']}, {measured['precision']}, {measured['date']}"
    lines = [
        f"{where}{others}; tokens a second:",
        "",
        f"| work | {titles} | {NAMES[ours]} / {NAMES[theirs]} |",
        "|---|" + "---|" * (len(columns) + 1),
    ]
    for work, found in measured["rows"].items():
        rates = [found.get(name) for name in columns]
        cells = " | ".join("does not fit" if rate is None else f"{rate:,.0f}" for rate in rates)
        ratio = f"{rates[0] / rates[1]:.2f}" if rates[0] and rates[1] else "-"
        lines.append(f"| {work} | {cells} | {ratio} |")
    for context in sorted({int(key) for model in measured["models"].values() for key in model["state"]}):
        sizes = [measured["models"][name]["state"][str(context)] for name in columns]
        cells = " | ".join(f"{size / 2**20:,.2f} MiB" for size in sizes)
        ratio = f"{sizes[0] / sizes[1]:.4f}"
        lines.append(f"| state of a sequence of {context:,} tokens | {cells} | {ratio} |")
    return lines
