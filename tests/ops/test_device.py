"""Which device is meant, and which kernels cannot run there."""

import pytest
import torch

from ssmoe.model.build import build
from ssmoe.ops.device import check_home, resolve_device
from tests.model.zoo import small

NO_GPU = not torch.cuda.is_available()


def test_devices() -> None:
    assert resolve_device(None).type == resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cpu" if NO_GPU else "cuda")
    assert resolve_device(torch.device("meta")).type == "meta"
    with pytest.raises(ValueError, match="'abacus' is no device: use auto"):
        resolve_device("abacus")


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_a_device_that_is_not_there_is_told_with_the_remedy() -> None:
    with pytest.raises(ValueError, match="sees no GPU here: use device=cpu"):
        resolve_device("cuda")
    with pytest.raises(ValueError, match="device='xpu' cannot be used here"):
        resolve_device("xpu")


@pytest.mark.parametrize(("backend", "device"), [("triton", "cpu"), ("cpu", "cuda"), ("triton", "mps")])
def test_kernels_of_another_device_are_refused(
    backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match=f"backend='{backend}' has kernels for a .PU.*'{device}'.*'auto'"):
        check_home(backend, device)


def test_the_interpreter_runs_gpu_kernels_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    check_home("triton", "cpu")


def test_a_model_of_another_devices_kernels_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="kernels for a GPU"):
        build(small("mamba"), backend="triton", device="cpu")
