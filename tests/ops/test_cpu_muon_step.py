"""Muon's update on a CPU against float64, in whichever dtype the machine's products are taken."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ssmoe.ops import missing
from ssmoe.ops.reference import muon_step as definition
from ssmoe.training.muon import JORDAN, POLAR, Iteration

pytestmark = pytest.mark.skipif(bool(missing("cpu")), reason=str(missing("cpu")))


def update(
    step: Callable[..., None], iteration: Iteration, dtype: torch.dtype, **more: torch.dtype
) -> tuple[list[Tensor], list[Tensor]]:
    """How far two banks of unlike size moved in three steps, and their momenta."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(n, 40, 24, generator=generator).to(dtype) for n in (5, 2)]
    banks, momenta = [t.clone() for t in start], [torch.zeros_like(t) for t in start]
    for _ in range(3):
        gradients = [torch.randn(t.shape, generator=generator).to(dtype) * 1e-4 for t in start]
        step(banks, gradients, momenta, rate=0.1, decay=0.1, mu=0.95, iteration=iteration, **more)
    return [after - before for before, after in zip(start, banks, strict=True)], momenta


def apart(found: list[Tensor], exact: list[Tensor]) -> float:
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True))


@pytest.mark.parametrize("iteration", [JORDAN, POLAR], ids=["jordan", "polar"])
@pytest.mark.parametrize("level", ["Avx512Bf16", "Avx2"])
def test_as_close_as_the_definition_in_the_same_dtype(
    iteration: Iteration, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssmoe.ops.cpu import muon_step as ours

    monkeypatch.setitem(ours.__globals__, "describe", lambda: {"level": level})
    # four matrices at once: a bank is cut, and what is left of it goes with the next
    monkeypatch.setitem(ours.__globals__, "AT_ONCE", 4 * 40 * 24)
    dtype = torch.bfloat16 if level == "Avx512Bf16" else torch.float32
    exact, exact_momenta = update(definition, iteration, torch.float64)
    found, momenta = update(ours, iteration, torch.float32)
    eager, _ = update(definition, iteration, torch.float32, products=dtype)
    assert {t.dtype for t in (*found, *momenta)} == {torch.float32}
    assert apart(momenta, exact_momenta) < 1e-6
    assert apart(found, exact) <= 2 * apart(eager, exact)
    assert apart(found, exact) < (0.05 if dtype == torch.bfloat16 else 1e-3)


def test_float64_stays_float64() -> None:
    from ssmoe.ops.cpu import muon_step as ours

    exact, _ = update(definition, POLAR, torch.float64)
    found, _ = update(ours, POLAR, torch.float64)
    assert all(torch.equal(a, b) for a, b in zip(found, exact, strict=True))


def test_threads_change_nothing_and_are_as_many_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmoe.ops.cpu import muon_step as ours

    monkeypatch.setitem(ours.__globals__, "AT_ONCE", 2 * 40 * 24)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(update(ours, POLAR, torch.float32))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for one, other in zip(*found, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_parameters_of_a_model_are_leaves_that_want_a_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    from ssmoe.ops.cpu import muon_step as ours

    bank = torch.nn.Parameter(torch.ones(2, 8, 4))
    before, threads = bank.detach().clone(), torch.get_num_threads()
    monkeypatch.setitem(ours.__globals__, "AT_ONCE", 32)
    torch.set_num_threads(2)
    try:
        with torch.no_grad():
            ours(
                [bank, bank], [torch.randn_like(bank)] * 2, [torch.zeros_like(bank)] * 2,
                rate=0.1, decay=0.0, mu=0.9, iteration=POLAR,
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert not torch.equal(bank, before)
