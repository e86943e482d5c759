"""What makes a comparison fair, checked before anything is trained and printed with every result.

Both sides share optimiser, schedule, data, order, batch, number of steps and evaluations. They may differ in
their layers, in what only experts have, and in the learning rate, which each side chooses from its own sweep.
Attention needs no experts: in a pair both sides have it or neither, and a search tries it as often for both.
"""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from ssmoe.config.count import count_parameters
from ssmoe.config.differences import differences
from ssmoe.config.load import RunConfig
from ssmoe.config.model import AttentionConfig

MAY_DIFFER = {
    "model.pattern": "the layers",
    "model.repeat": "the layers",
    "model.init.expert_*": "the initial values of experts",
    "model.init.router_factor": "the initial values of routers",
    "train.learning_rate_ratios.experts": "the experts' own learning rate",
    "train.learning_rate_ratios.router": "the routers' own learning rate",
    "train.learning_rate": "from each side's own sweep",
}
ACTIVE_TOLERANCE = 0.05
"""Active parameters outside embedding and head may differ by this share of the baseline's."""


def violations(run: RunConfig, baseline: RunConfig) -> list[str]:
    """What keeps `run` from being compared with `baseline`; empty where nothing does."""
    found = [
        f"{key} is {mine} here and {theirs} in the baseline"
        for key, (mine, theirs) in differences(run, baseline).items()
        if not any(fnmatchcase(key, pattern) for pattern in MAY_DIFFER)
    ]
    active, target = (count_parameters(each.model).active for each in (run, baseline))
    if abs(active / target - 1) > ACTIVE_TOLERANCE:
        found.append(f"active parameters: {active / 1e6:.2f}M here and {target / 1e6:.2f}M in the baseline")
    return found


def pair_violations(run: RunConfig, mamba: RunConfig) -> list[str]:
    """What keeps `run` from being the other side of the tuned `mamba`, beside `violations` of each."""
    mine, theirs = attention_layers(run), attention_layers(mamba)
    if bool(mine) == bool(theirs):
        return []
    return [f"attention layers: {mine} here and {theirs} in the Mamba: give both sides some, or neither"]


def budget_violations(tries: Sequence[tuple[str, RunConfig]]) -> list[str]:
    """What is uneven in a search: tries with attention, (side, configuration) each, of its two sides.

    Runs of one model at one learning rate, such as longer ones or other seeds, are one try.
    """
    variants = {
        side: {
            f"{run.train.learning_rate} {run.model.model_dump_json()}"
            for mine, run in tries
            if mine == side and attention_layers(run)
        }
        for side, _ in tries
    }
    if len({len(found) for found in variants.values()}) <= 1:
        return []
    told = ", ".join(f"{side} {len(found)}" for side, found in variants.items())
    return [f"tries with attention layers: {told}: give both sides as many"]


def attention_layers(run: RunConfig) -> int:
    """How many layers of a model are attention."""
    return sum(isinstance(layer, AttentionConfig) for layer in run.model.layers)


def describe(run: RunConfig, baseline: RunConfig) -> list[str]:
    """A line for each thing in which two runs differ, then the active parameters of both."""
    lines = [f"{key}: {theirs} -> {mine}" for key, (mine, theirs) in differences(run, baseline).items()]
    mine, theirs = (count_parameters(each.model) for each in (run, baseline))
    share = mine.active / theirs.active
    lines.append(
        f"active parameters: {theirs.active / 1e6:.2f}M -> {mine.active / 1e6:.2f}M ({share:.3f} of it), "
        f"of {mine.non_embedding / 1e6:.1f}M"
    )
    return lines
