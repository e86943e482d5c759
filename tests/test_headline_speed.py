"""Speed at equal quality: which Transformer is chosen, what the table says, and the command on a CPU."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from ssmoe.config.load import preset

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "experiments" / "headline"))

import inference  # noqa: E402
import speed  # noqa: E402


def run(
    entry: str,
    loss: float,
    *,
    tokens: int = 100,
    active: float = 25e6,
    side: str = "transformer",
    **more: Any,
) -> dict[str, Any]:
    """A final run as the runner writes it, as far as the speed is concerned."""
    found = {"entry": entry, "name": entry, "stage": "final", "status": "done", "seed": 0, "side": side}
    found |= {
        "learning_rate": 0.1,
        "tokens": tokens * 1_000_000,
        "active": active,
        "non_embedding": 2 * active,
    }
    return found | {"evaluations": [[1, tokens, loss]]} | more


OURS = run(speed.FINE, 2.5, side="moe-mamba")


def test_the_smallest_transformer_that_is_as_good_is_chosen() -> None:
    runs = [OURS, run("a", 2.4, active=50e6), run("b", 2.5, active=30e6), run("c", 2.6, active=20e6)]
    pair = speed.choose(runs)
    assert pair is not None
    assert (pair.theirs["entry"], pair.worse) == ("b", 0.0)
    assert [other["entry"] for other in pair.others] == ["a", "b", "c"]


def test_without_one_the_nearest_is_chosen_and_the_page_says_whom_that_favours() -> None:
    runs = [
        OURS,
        run("transformer", 2.8),
        run("tmoe", 2.6),
        run("tmoe", 2.4, tokens=200),
        run("tmoe", 2, seed=1),
    ]
    pair = speed.choose(runs)
    assert pair is not None
    assert pair.theirs is runs[2]
    text = speed.sentence(pair)
    assert "No Transformer that was trained is as good as MoE-Mamba" in text
    assert "0.100 nats worse (2.600 nats against 2.500, both after 100 M tokens)" in text
    assert "favours the Transformer" in text
    assert "Its learning rate was not searched." in text
    assert text.endswith("The Transformer beside it ends +0.300 nats from MoE-Mamba.")


def test_a_transformer_counts_at_its_best_learning_rate() -> None:
    sweep = [
        run("tmoe", loss, learning_rate=rate) for rate, loss in ((0.002, 2.8), (0.004, 2.7), (0.008, 2.9))
    ]
    pair = speed.choose([OURS, *sweep, run("transformer", 2.9)])
    assert pair is not None
    assert pair.theirs is sweep[1]
    assert [other["entry"] for other in pair.others] == ["tmoe", "transformer"]
    assert "Its learning rate is the best of 0.002, 0.004, 0.008." in speed.sentence(pair)


def test_only_runs_of_as_many_tokens_are_compared() -> None:
    short = [run(speed.FINE, 3.0, tokens=18, side="moe-mamba"), run("tmoe", 3.1, tokens=18)]
    assert speed.choose([OURS, run("tmoe", 2.0, tokens=50)]) is None
    pair = speed.choose([OURS, *short])
    assert pair is not None
    assert pair.ours is short[0]
    assert speed.choose([OURS, run("tmoe", 2.0, status="cut")]) is None


def test_the_table_has_the_rates_their_ratio_and_what_does_not_fit() -> None:
    pair = speed.choose([OURS, run("tmoe", 2.6), run("transformer", 2.8)])
    assert pair is not None
    state = {speed.FINE: 1 << 20, "tmoe": 1 << 24, "transformer": 1 << 25}
    measured = {
        "device": "D", "torch": "2", "precision": "bfloat16", "date": "2026-01-01", "others": 0.3,
        "models": {name: {"state": {"1024": size}} for name, size in state.items()},
        "rows": {"reading": {speed.FINE: 3000.0, "tmoe": 2000.0, "transformer": 1500.0},
                 "writing": {speed.FINE: 10.0, "tmoe": None, "transformer": 5.0}},
    }  # fmt: skip
    lines = speed.table(measured, pair)
    assert "others took up to 0.30 cores" in lines[0]
    assert "| work | MoE-Mamba | Transformer-MoE | Transformer | MoE-Mamba / Transformer-MoE |" in lines
    assert "| reading | 3,000 | 2,000 | 1,500 | 1.50 |" in lines
    assert "| writing | 10 | does not fit | 5 | - |" in lines
    assert "| state of a sequence of 1,024 tokens | 1.00 MiB | 16.00 MiB | 32.00 MiB | 0.0625 |" in lines


def test_the_command_measures_every_model_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = {
        speed.FINE: preset("moe-mamba-tuned-tiny", ["model.vocab_size=2000"]),
        "open": preset("moe-mamba-fine-tiny", ["model.vocab_size=2000"]),
        "tmoe": preset("transformer-moe-tiny", ["model.vocab_size=2000"]),
    }
    sides = {speed.FINE: "moe-mamba", "open": "moe-mamba", "tmoe": "transformer"}
    runs = [
        run(entry, 2.5, configuration=config.model_dump(mode="json"), side=sides[entry])
        for entry, config in models.items()
    ]
    (tmp_path / "headline.json").write_text(json.dumps(runs))
    monkeypatch.setattr(inference, "PREFILL", {"cpu": ((2, 8),)})
    monkeypatch.setattr(inference, "DECODE", {"cpu": [(2, 8)]})
    monkeypatch.setattr(sys, "argv", ["inference.py", "--device", "cpu", "--results", str(tmp_path)])
    inference.main()
    [measured] = json.loads((tmp_path / inference.FILE).read_text())
    assert list(measured["rows"]) == ["reading 2 x 8", "writing, 2 rows after 8 tokens"]
    for rates in measured["rows"].values():
        assert rates.keys() == models.keys()
        assert min(rates.values()) > 0
    attention = [layer for layer in models["tmoe"].model.layers if layer.kind == "attention"]
    cache = len(attention) * 2 * 8 * models["tmoe"].model.d_model * 2
    assert cache <= measured["models"]["tmoe"]["state"]["8"] <= cache + 8 * len(attention)
    assert speed.tables([measured], runs)[0].startswith("The smallest Transformer")
    assert (
        "| work | MoE-Mamba | Transformer-MoE | MoE-Mamba without attention |"
        in speed.tables([measured], runs)[4]
    )
    del measured["models"][speed.FINE]
    assert "Not measured with attention layers on this device." in speed.tables([measured], runs)
    assert "| MoE-Mamba without attention / Transformer-MoE |" in speed.tables([measured], runs)[6]
