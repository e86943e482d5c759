"""An alert when a router collapses, and a line when it has recovered."""

from typing import cast

from ssmoe.model.layer import RouterStats


class RouterWatch:
    """Remembers which layers have collapsed, so that each is told once.

    A router has collapsed when its busiest expert's load is more than half of the way from even to
    everything, or when more than half of its experts get nothing.
    """

    def __init__(self) -> None:
        self._collapsed: set[int] = set()

    def check(self, step: int, tokens: int, routers: dict[int, RouterStats]) -> list[str]:
        """The lines to tell after a step over `tokens` tokens."""
        lines: list[str] = []
        for layer, stats in routers.items():
            problem = describe_collapse(stats, tokens)
            if problem is not None and layer not in self._collapsed:
                self._collapsed.add(layer)
                lines.append(
                    f"step {step}: the router of layer {layer} has collapsed: {problem}; see `ssmoe router`, "
                    'raise balance_coefficient or set balance="bias" (or a higher bias_rate)'
                )
            elif problem is None and layer in self._collapsed:
                self._collapsed.remove(layer)
                lines.append(f"step {step}: the router of layer {layer} has recovered")
        return lines


def describe_collapse(stats: RouterStats, tokens: int) -> str | None:
    """What is wrong with the load of a layer's routers, or None."""
    for load in cast(list[list[int]], stats.load.reshape(-1, stats.load.shape[-1]).tolist()):
        mean = sum(load) / len(load)
        worst = tokens / mean if mean else 1.0
        dead = load.count(0)
        if mean and max(load) / mean - 1 > 0.5 * (worst - 1) > 0:
            return f"expert {load.index(max(load))} takes {max(load) / tokens:.0%} of the tokens"
        if dead > len(load) / 2 and tokens >= 4 * len(load):
            return f"{dead} of {len(load)} experts take no token"
    return None
