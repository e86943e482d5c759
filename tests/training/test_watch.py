"""The collapse alert: what counts, once each, and a forced collapse in a real run."""

import pytest
import torch

from ssmoe.data.prepare import prepare
from ssmoe.model.feedforwards.router import Router
from ssmoe.model.layer import RouterStats
from ssmoe.model.lm import LM
from ssmoe.training import loop
from ssmoe.training.console import Silent
from ssmoe.training.watch import RouterWatch, describe_collapse
from tests.model.test_mode import run_config


def stats(load: list[int] | list[list[int]], dropped: int = 0) -> RouterStats:
    zero = torch.zeros(())
    return RouterStats(zero, zero, torch.tensor(load), torch.tensor(dropped), zero, zero)


@pytest.mark.parametrize(
    ("load", "tokens", "problem"),
    [
        ([25, 25, 25, 25], 100, None),
        ([60, 20, 10, 10], 100, None),
        ([64, 12, 12, 12], 100, "expert 0 takes 64% of the tokens"),
        ([0, 100, 0, 0], 100, "expert 1 takes 100% of the tokens"),
        ([50, 50, 0, 0, 0], 100, "3 of 5 experts take no token"),
        ([100, 100, 0, 0, 0, 0], 100, "expert 0 takes 100%"),  # top-2
        ([100, 100], 100, None),  # top-2 of 2
        ([1, 0, 0, 0, 0, 0], 1, "expert 0 takes 100%"),  # one token
        ([10, 10, 10, 0, 0, 0], 30, None),  # half of them, not more
        ([4] * 5 + [0] * 8, 20, None),  # too few tokens to say that an expert is dead
        ([11, 11, 10, 10, 10] + [0] * 8, 52, "8 of 13 experts take no token"),
        ([[25, 25, 25, 25], [0, 0, 100, 0]], 100, "expert 2 takes 100%"),
        ([0, 0], 0, None),
    ],
)
def test_what_counts_as_collapse(load: list[int], tokens: int, problem: str | None) -> None:
    found = describe_collapse(stats(load), tokens)
    if problem is None:
        assert found is None
    else:
        assert found is not None
        assert problem in found


def test_each_layer_is_told_once_and_again_after_recovery() -> None:
    watch = RouterWatch()
    good, bad = stats([5, 5, 5]), stats([15, 0, 0])
    assert watch.check(1, 15, {1: good, 3: good}) == []
    [line] = watch.check(2, 15, {1: good, 3: bad})
    assert "step 2: the router of layer 3 has collapsed: expert 0 takes 100% of the tokens" in line
    assert watch.check(3, 15, {1: good, 3: bad}) == []
    assert watch.check(4, 15, {1: good, 3: good}) == ["step 4: the router of layer 3 has recovered"]
    assert len(watch.check(5, 15, {1: good, 3: bad})) == 1


def test_a_capacity_that_drops_most_tokens_is_told_once() -> None:
    watch = RouterWatch()
    good, bad = stats([5, 5, 5], dropped=7), stats([5, 5, 5], dropped=8)
    assert watch.check(1, 15, {1: good}) == []
    [line] = watch.check(2, 15, {1: bad, 3: good})
    assert "step 2: capacity takes 53% of the assignments of layer 1 away: raise capacity_factor" in line
    assert watch.check(3, 15, {1: bad}) == []
    [line] = watch.check(4, 15, {1: good})
    assert "takes 47% of the assignments of layer 1 away, no more" in line


def test_a_forced_collapse_is_told_at_once(tmp_path, monkeypatch) -> None:
    lines: list[str] = []
    monkeypatch.setattr(Silent, "message", lambda _, text: lines.append(text))
    run = run_config("collapse", "moe-mamba-tiny", tmp_path, "train.steps=2")
    build_model = loop.build

    def collapsed(*args: object, **options: object) -> LM:
        model = build_model(*args, **options)  # pyright: ignore[reportArgumentType, reportCallIssue]
        for module in model.modules():
            if isinstance(module, Router):
                torch.nn.init.zeros_(module.weight)  # all-tied: every token goes to expert 0
        return model

    monkeypatch.setattr(loop, "build", collapsed)
    data = prepare(run.data)
    result = {"held_out_loss": 1.0, "held_out_bits_per_byte": 1.0}
    loop.train(run, tmp_path / "run", data, evaluate=lambda _: result, reporter=Silent())
    alerts = [line for line in lines if "has collapsed" in line]
    assert [line.split(":")[0] for line in alerts] == ["step 1"] * 4
    assert "expert 0 takes 100% of the tokens" in alerts[0]
