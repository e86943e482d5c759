"""What the launcher of CUDA C++ refuses: without a GPU, and on one a source that is wrong."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="the GPU backend needs triton: pip install triton")

from ssmoe.ops.triton import nvrtc


def test_a_launch_past_the_limit_is_refused() -> None:
    with pytest.raises(ValueError, match="scan_forward would need 2147483648 blocks"):
        nvrtc.launch(Path("scan.cu"), "scan_forward", (), 2**31, 32, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_available() -> None:
    assert not nvrtc.available()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_wrong_source_says_why(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.cu"
    wrong.write_text("nonsense")
    with pytest.raises(RuntimeError, match=r"(?s)wrong\.cu with .* does not compile:\n.*nonsense"):
        nvrtc.compile_source(wrong, (), "sm_80")
