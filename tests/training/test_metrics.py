import json
from math import log

import pytest
import torch

from ssmoe.config.model import MambaConfig, ModelConfig, MoEConfig
from ssmoe.model.build import build
from ssmoe.model.feedforwards.router import Router
from ssmoe.model.layer import RouterStats
from ssmoe.training.metrics import (
    METRICS,
    MetricsFile,
    read_metrics,
    router_summary,
    step_record,
    truncate_metrics,
)
from ssmoe.training.step import StepResult

CONFIG = ModelConfig(
    vocab_size=31,
    d_model=16,
    pattern=(
        MambaConfig(d_state=3),
        MoEConfig(num_experts=4, d_expert=8, capacity_factor=0.8),
        MoEConfig(num_experts=7, d_expert=8, top_k=2, capacity_factor=0.5),
    ),
)


def recount(router, x):
    """(loads, dropped, normalised entropy, confidence) of one router, a token at a time."""
    b, length, _ = x.shape
    scores = [[(router.weight @ x[row, t]).softmax(0).tolist() for t in range(length)] for row in range(b)]
    capacity = int(router.capacity_factor * router.top_k * b * length / router.num_experts)
    loads, dropped, entropy, confidence = [0] * router.num_experts, 0, 0.0, 0.0
    for t in range(length):
        for row in range(b):
            p = scores[row][t]
            entropy -= sum(value * log(value) for value in p)
            confidence += max(p)
            for expert in sorted(range(len(p)), key=lambda e: -p[e])[: router.top_k]:
                dropped += loads[expert] >= capacity
                loads[expert] += 1
    tokens = b * length
    return loads, dropped, entropy / tokens / log(router.num_experts), confidence / tokens


def test_the_loss_of_a_step_is_all_that_was_minimised():
    result = StepResult(*(torch.tensor(value) for value in (2.0, 0.25, 0.5, 1.5)), {}, None)
    found = step_record(3, 96, result, 0.01, 7.0004, 123.46)
    assert (found["loss"], found["lm_loss"], found["balance"], found["z"]) == (2.75, 2.0, 0.25, 0.5)
    assert (found["grad_norm"], found["learning_rate"], found["seconds"]) == (1.5, 0.01, 7.0)
    assert (found["step"], found["tokens"], found["tokens_per_second"]) == (3, 96, 123.5)


def test_the_entropy_of_several_routers_is_relative_to_their_experts():
    loads, zero = torch.tensor([[3, 1, 0, 0, 4], [2, 2, 2, 1, 1]]), torch.zeros(())
    even = RouterStats(zero, zero, loads, torch.tensor(4), torch.tensor(0.7), torch.tensor(log(5)))
    found = router_summary({1: even})
    assert found == pytest.approx(
        {"max_over_mean": 4 / 1.6, "dead": 2, "dropped": 0.25, "entropy": 1.0, "confidence": 0.7}
    )
    other = even._replace(load=torch.tensor([8, 4, 4, 0]), dropped=torch.tensor(0))
    assert router_summary({1: even, 3: other})["dead"] == 3
    assert router_summary({1: even, 3: other})["dropped"] == 4 / 32


def test_router_summary_equals_a_recount():
    model, inputs = build(CONFIG).double().train(), []
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    routers = [module for module in model.modules() if isinstance(module, Router)]
    hooks = [r.register_forward_hook(lambda _, args, out: inputs.append(args[0].detach())) for r in routers]
    ids = torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(0))
    out = model(ids)
    for hook in hooks:
        hook.remove()
    counts = [recount(router, x) for router, x in zip(routers, inputs, strict=True)]
    found = router_summary({i: stats for i, stats in enumerate(out.stats) if stats is not None})
    assert counts[0][1] > 0
    assert found == pytest.approx(
        {
            "max_over_mean": max(max(loads) * len(loads) / sum(loads) for loads, *_ in counts),
            "dead": sum(loads.count(0) for loads, *_ in counts),
            "dropped": sum(c[1] for c in counts) / sum(sum(loads) for loads, *_ in counts),
            "entropy": (counts[0][2] + counts[1][2]) / 2,
            "confidence": (counts[0][3] + counts[1][3]) / 2,
        },
        rel=1e-6,
    )


def test_lines_are_on_disk_at_once_and_read_back(tmp_path):
    file = MetricsFile(tmp_path)
    file.write({"step": 1, "loss": 0.1 + 0.2})
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.1 + 0.2}]
    file.close()


def test_truncation_keeps_the_lines_bit_for_bit_and_drops_a_torn_one(tmp_path):
    lines = [
        json.dumps({"step": step, "mode": mode, "loss": step / 3})
        for step in (1, 2, 3)
        for mode in ("train", "eval")
    ]
    path = tmp_path / METRICS
    path.write_text("\n".join(lines) + '\n{"step": 4, "lo')
    assert len(read_metrics(tmp_path)) == 6
    truncate_metrics(tmp_path, 2)
    assert path.read_text() == "\n".join(lines[:4]) + "\n"
    assert [p.name for p in tmp_path.iterdir()] == [METRICS]


def test_no_metrics_is_no_run_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="not a run folder"):
        read_metrics(tmp_path)
