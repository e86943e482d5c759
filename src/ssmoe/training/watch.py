"""An alert when a router collapses or drops most tokens, and a line when it has recovered."""

from typing import cast

from ssmoe.model.layer import RouterStats


class RouterWatch:
    """Remembers what was told of which layer, so that it is told once.

    A router has collapsed when its busiest expert's load is more than half of the way from even to
    everything, or when more than half of its experts get nothing. It drops too much when capacity takes more
    than half of its assignments away.
    """

    def __init__(self) -> None:
        self._collapsed: set[int] = set()
        self._dropping: set[int] = set()

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
            lines += self._check_dropped(step, layer, dropped_share(stats))
        return lines

    def _check_dropped(self, step: int, layer: int, share: float) -> list[str]:
        if share > 0.5 and layer not in self._dropping:
            self._dropping.add(layer)
            return [
                f"step {step}: capacity takes {share:.0%} of the assignments of layer {layer} away: raise "
                "capacity_factor, set it to null for none, or balance the router"
            ]
        if share <= 0.5 and layer in self._dropping:
            self._dropping.remove(layer)
            return [
                f"step {step}: capacity takes {share:.0%} of the assignments of layer {layer} away, no more"
            ]
        return []


def dropped_share(stats: RouterStats) -> float:
    """The share of a layer's assignments that capacity took away."""
    return int(stats.dropped) / max(1, int(stats.load.sum()))


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
