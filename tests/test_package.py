"""`import ssmoe`: quick, light, and every public name is there."""

import subprocess
import sys

import pytest

import ssmoe


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_loads_no_torch_and_nothing_optional() -> None:
    heavy = {"torch", "numpy", "pydantic", "transformers", "triton", "matplotlib", "rich", "tokenizers"}
    loaded = run("import sys; import ssmoe; print(*sys.modules)").split()
    assert heavy.isdisjoint(loaded)


def test_importing_takes_under_a_third_of_a_second() -> None:
    code = "from time import perf_counter as t; a = t(); import ssmoe; print(t() - a)"
    assert min(float(run(code)) for _ in range(3)) < 0.3


def test_configuration_needs_no_torch() -> None:
    code = "import sys, ssmoe; ssmoe.preset('demo'); print('torch' in sys.modules)"
    assert run(code).strip() == "False"


@pytest.mark.parametrize("name", ssmoe.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(ssmoe, name) is not None
    assert name in dir(ssmoe)


def test_functions_stay_functions_after_their_modules_are_loaded() -> None:
    code = "import ssmoe as s; s.compare; s.generate; s.train; print(callable(s.train), callable(s.generate))"
    assert run(code).strip() == "True True"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = ssmoe.nothing  # pyright: ignore[reportAttributeAccessIssue]
