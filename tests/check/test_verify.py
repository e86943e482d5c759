"""Verify holds on every layer kind, and names the layer and the check of planted faults."""

import copy

import pytest
import torch

from ssmoe.check import verify as module
from ssmoe.check.verify import verify
from ssmoe.model.build import build
from tests.model.zoo import MIXING, PATTERNS, mixing, small

IDS = torch.randint(61, (3, 20), generator=torch.Generator().manual_seed(0))


def models(name):
    model = build(small(name), seed=1).eval()
    return copy.deepcopy(model).double(), {"reference float32": model}


@pytest.mark.parametrize("name", PATTERNS)
def test_every_layer_kind_holds(name):
    findings = verify(*models(name), IDS)
    assert all(finding.passed for finding in findings), [f for f in findings if not f.passed]
    assert len({(f.backend, f.layer) for f in findings}) == 2 * len(small(name).layers) + 1
    assert {f.check for f in findings} >= {"one at a time", "packed", "padded left", "saved == kept"}


@pytest.mark.parametrize("name", MIXING)
def test_layers_that_mix_rows_or_positions_are_held_to_what_they_promise(name):
    model = build(mixing(name), seed=1).eval()
    ids = IDS.repeat(2, 1)[:4]
    findings = verify(copy.deepcopy(model).double(), {"reference float32": model}, ids)
    assert all(finding.passed for finding in findings), [f for f in findings if not f.passed]
    promised = {f.check for f in findings if f.layer.startswith("layer 1 ")} - {"saved == kept"}
    assert promised == {"one pass"} | (set() if name == "mot-masked" else {"chunks", "one at a time"})
    assert any(f.check == "packed" for f in findings)
    if name != "expert-choice":
        odd = IDS[:3] if name == "mot" else IDS[:, :19]
        with pytest.raises(ValueError, match="do not fill groups"):
            verify(copy.deepcopy(model).double(), {}, odd)


def failures(reference, others):
    return {(f.backend, f.layer, f.check) for f in verify(reference, others, IDS) if not f.passed}


def test_a_dropped_state_is_named(monkeypatch):
    reference, others = models("hybrid")
    [(name, narrow)] = others.items()
    mixer = narrow.layers[4].layer
    forward, step = mixer.forward, mixer.step
    forgetful = lambda x, state=None, segments=None: forward(x, None, segments)  # noqa: E731
    monkeypatch.setattr(mixer, "forward", forgetful)
    monkeypatch.setattr(mixer, "step", lambda x, norm, state, dtype, **_: step(x, norm, None, dtype))
    found = failures(reference, others)
    assert found == {(name, "layer 4 (Mamba)", "chunks"), (name, "layer 4 (Mamba)", "one at a time")}


def test_a_leak_between_documents_is_named(monkeypatch):
    reference, _ = models("hybrid")
    attention = reference.layers[2].layer
    forward = attention.forward
    leaky = lambda x, state=None, segments=None: forward(x, state, None)  # noqa: E731
    monkeypatch.setattr(attention, "forward", leaky)
    found = failures(reference, {})
    layer = "layer 2 (Attention)"
    assert found == {("reference float64", layer, check) for check in ("packed", "padded left")}


def test_positions_that_a_near_tie_touches_are_left_out(monkeypatch):
    reference, others = models("moe-mixtral")
    [narrow] = others.values()
    with torch.no_grad():
        narrow.layers[1].layer.experts.up.mul_(1.01)
    assert failures(reference, others)
    monkeypatch.setattr(module, "clear_tokens", lambda layer, x: torch.zeros(x.shape[:2], dtype=torch.bool))
    assert not failures(reference, others)
    # in float64 every position counts
    with torch.no_grad():
        reference.layers[1].layer.router.weight.fill_(torch.nan)
    assert {backend for backend, _, _ in failures(reference, others)} == {"reference float64"}


def test_wrong_numbers_and_no_numbers_are_named():
    for value in (1.01, float("nan")):
        reference, others = models("hybrid")
        [(name, narrow)] = others.items()
        with torch.no_grad():
            narrow.layers[3].layer.up.weight.mul_(value)
        found = failures(reference, others)
        assert {layer for _, layer, check in found if check == "one pass"} == {"layer 3 (Dense)"}
        assert {backend for backend, _, _ in found} == {name}
