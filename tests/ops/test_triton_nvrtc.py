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


CLUSTERS = """
struct Arguments { int* rank; int* arrived; };
extern "C" __global__ void ranks(const __grid_constant__ Arguments a) {
    unsigned rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    if (threadIdx.x == 0) {
        a.rank[blockIdx.x] = rank;
        atomicAdd(a.arrived, 1);
        while (atomicAdd(a.arrived, 0) < gridDim.x) {}
    }
}
"""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (9, 0), reason="clusters need 9.0"
)
def test_blocks_in_clusters_that_wait_for_one_another(tmp_path: Path) -> None:
    source = tmp_path / "clusters.cu"
    source.write_text(CLUSTERS)
    most = nvrtc.clusters_at_once(source, "ranks", (), 4, 32, 0, 4)
    assert most >= 1
    found = torch.full((4 * most + 1,), -1, dtype=torch.int32, device="cuda")
    found[-1] = 0
    words = [found.data_ptr(), found[-1:].data_ptr()]
    nvrtc.launch(source, "ranks", (), 4 * most, 32, words, cluster=4, together=True)
    assert found[:-1].tolist() == [0, 1, 2, 3] * most
