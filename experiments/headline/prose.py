"""Sentences of the page that depend on what has been run: none is written by hand."""

from collections.abc import Sequence
from math import log

from results import Match, Result, final, match

PAPERS_RATIO = 2.35
"""Of arXiv 2401.04081, with 100 M active parameters and 31 billion tokens."""
UNTRIED = {
    "Mixture of Tokens": "mixture-of-tokens",
    "more than 256 experts": "most",
    "experts after every other Mamba layer": "every-other",
    "experts in the upper half": "upper-half",
    "attention with heads of 256": "widest",
    "attention in later layers": "late",
}
"""What the stage files ask for and nobody may have run yet, and the entry that tries it."""
PARTS = {
    "Mamba": "search-4/mamba",
    "Mamba with attention": "search-4/mamba-attention",
    "MoE-Mamba": "search-4/open",
    "MoE-Mamba with attention": "search-4/attention",
}
"""Runs of as many tokens whose losses are told in parts."""
SIDES = {"mamba": "Mamba", "moe-mamba": "MoE-Mamba"}


def by_name(runs: Sequence[Result]) -> dict[str, Result]:
    """Finished runs as "stage/name"."""
    return {f"{run['stage']}/{run['name']}": run for run in runs if run["status"] == "done"}


def seeds_text(pairs: Sequence[tuple[Result, Result]]) -> str:
    """How many pairs there are, and of what they are."""
    seeds = ", ".join(str(run["seed"]) for run, _ in pairs)
    return (
        f"{len(pairs)} pairs of runs, each with one seed for initial weights and order of the data on both "
        f"sides ({seeds})."
    )


def paper_text(pairs: Sequence[tuple[Result, Result]]) -> str:
    """The paper's recipe at every length that has been run."""
    if not pairs:
        return "The paper's recipe has not been run."
    rates = [f"{run['learning_rate']:g}" for run in pairs[0]]
    parts = [paper_part(run, baseline) for run, baseline in pairs]
    return (
        f'"The paper\'s" is the preset `{pairs[0][0]["preset"]}` at learning rate {rates[0]} against '
        f"`{pairs[0][1]['preset']}` at {rates[1]}, both with AdamW: {'; '.join(parts)}."
    )


def paper_part(run: Result, baseline: Result) -> str:
    """One length."""
    length, ahead = f"{run['tokens'] / 1e6:.0f} M tokens", final(baseline) - final(run)
    found = match(run, baseline)
    if found is None:
        return f"at {length} it ends {-ahead:.3f} nats behind Mamba and never matches it"
    return f"at {length} it ends {ahead:.3f} nats ahead, {found.fewer_steps:.2f} times fewer steps"


def growth_text(title: str, found: Sequence[tuple[int, Match | None]]) -> str:
    """How a recipe's speed-up changes with the number of tokens."""
    figures = [
        f"{'no match' if each is None else f'{each.fewer_steps:.2f}'} at {tokens / 1e6:.0f} M"
        for tokens, each in sorted(found, key=lambda pair: pair[0])
    ]
    return f"The {title} pair needs fewer steps by {', '.join(figures)} tokens."


def why_text(mamba: Sequence[Result], fine: Sequence[Result]) -> str:
    """How far ahead a model would have to be for the paper's figure, from Mamba's runs of several lengths."""
    losses, ours = ({run["tokens"]: final(run) for run in each} for each in (mamba, fine))
    if len(losses) < 2 or max(losses) not in ours:
        return "Runs of two lengths are missing."
    short, long = min(losses), max(losses)
    slope = (losses[short] - losses[long]) / log(long / short)
    ahead = ", ".join(
        f"{losses[tokens] - ours[tokens]:.3f} at {tokens / 1e6:.0f} M"
        for tokens in sorted(losses.keys() & ours.keys())
    )
    return (
        f"From {short / 1e6:.0f} M to {long / 1e6:.0f} M tokens, each in a run of its own, the tuned Mamba's "
        f"loss falls from {losses[short]:.3f} to {losses[long]:.3f}: {slope * log(2):.2f} nats each time the "
        f"tokens double. To need {PAPERS_RATIO} times fewer of them a model would have to be about "
        f"{slope * log(PAPERS_RATIO):.2f} nats ahead; MoE-Mamba is ahead by {ahead} (seed 0)."
    )


def muon_text(runs: Sequence[Result]) -> str:
    """What the optimiser alone gave Mamba in the first search, each at the best of its rates."""
    found = [run for run in runs if run["stage"] == "search" and run["side"] == "mamba"]
    best = {
        recipe: min((run for run in found if run["recipe"] == recipe and run["tokens"] < 2e7), key=final)
        for recipe in ("adamw", "muon")
    }
    losses = {recipe: final(run) for recipe, run in best.items()}
    return (
        "Muon, which needs no experts and so went to both sides, took "
        f"{losses['adamw'] - losses['muon']:.2f} nats off Mamba at {best['muon']['tokens'] / 1e6:.0f} M "
        f"tokens ({losses['muon']:.3f} against {losses['adamw']:.3f} with AdamW, each at its best rate)."
    )


def screens_text(runs: Sequence[Result]) -> str:
    """How many runs each side had in each search, how far a short run may mislead, and what nobody tried."""
    counts = [
        stage_text(runs, stage) for stage in ("search", *(f"search-{number}" for number in range(2, 7)))
    ]
    known = by_name(runs)
    tried = {run["entry"] for run in runs if run["status"] == "done"}
    left = [what for what, entry in UNTRIED.items() if entry not in tried]
    short, long = (
        (known[f"search/mamba-muon-lr0.008{end}"], known[f"search/fine-muon-lr0.008{end}"])
        for end in ("", "-100m")
    )
    gaps = [final(mamba) - final(fine) for mamba, fine in (short, long)]
    confidence = long[1]["router"]["confidence"]
    return (
        f"{' '.join(count for count in counts if count)} Screens are short, and what they say about longer "
        f"runs is a guess: normalised weights were {gaps[0]:.3f} nats ahead of Mamba at "
        f"{short[0]['tokens'] / 1e6:.0f} M tokens and {gaps[1]:.3f} at {long[0]['tokens'] / 1e6:.0f} M, "
        f"where their routers put {confidence:.2f} of the weight on one expert."
        + (f" Not tried: {', '.join(left)}." if left else "")
        + slow_text(runs)
    )


def slow_text(runs: Sequence[Result]) -> str:
    """What went wrong in the fourth search: rates far below those of its recipe."""
    slow = [run for run in runs if run["stage"] == "search-4" and run["learning_rate"] < 0.004]
    if not slow:
        return ""
    rates = " and ".join(f"{rate:g}" for rate in sorted({run["learning_rate"] for run in slow}, reverse=True))
    return (
        f" By a mistake in its stage file {len(slow)} runs of `search-4` had the rates of the bare presets, "
        f"{rates}: they compare among themselves only."
    )


def attention_table(runs: Sequence[Result]) -> list[str]:
    """Held-out loss of both sides with and without attention, by where in its row a target stands and whether
    it repeats what stands before it (`copying.py`)."""
    known = by_name(runs)
    found = {title: known[name]["parts"] for title, name in PARTS.items() if name in known}
    if not found:
        return ["Not run yet."]
    titles, first = list(found), next(iter(found.values()))
    lines = [f"| targets | number | {' | '.join(titles)} |", "|---|---|" + "---|" * len(titles)]
    for part, (_, number) in first.items():
        losses = " | ".join(f"{found[title][part][0]:.3f}" for title in titles)
        lines.append(f"| {part} | {number:,} | {losses} |")
    return lines


def stage_text(runs: Sequence[Result], stage: str) -> str:
    """Runs a side of one stage, those that were taken over not counted."""
    mine = [run for run in runs if run["stage"] == stage and not run.get("run_as")]
    counts = [f"{name} {sum(run['side'] == side for run in mine)}" for side, name in SIDES.items()]
    return f"Runs in `{stage}`: {', '.join(counts)}." if mine else ""
