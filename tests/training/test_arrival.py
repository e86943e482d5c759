import pytest
import torch

from ssmoe.model.layer import RouterStats
from ssmoe.training.arrival import Arrival, pack, unpack
from ssmoe.training.step import StepResult


def result(device="cpu"):
    """Numbers that any lossy packing would change: integers beyond float32, a (r, e) load, a NaN."""
    value = iter((torch.arange(1, 100).float() / 7).to(device))
    load = torch.tensor([[2**53 + 1, 3], [0, 2**24 + 1]], device=device)
    routers = {
        i: RouterStats(next(value), next(value), counts, counts.sum(), next(value), next(value))
        for i, counts in ((1, load), (5, load[1].clone()))
    }
    lm = torch.tensor(float("nan"), device=device)
    return StepResult(lm, next(value), next(value), next(value), routers, None)


def numbers(found):
    return [
        found.lm,
        found.balance,
        found.z,
        found.grad_norm,
        *(t for s in found.routers.values() for t in s),
    ]


def assert_same(found, expected):
    assert found.routers.keys() == expected.routers.keys()
    for one, other in zip(numbers(found), numbers(expected), strict=True):
        assert one.device.type == "cpu"
        torch.testing.assert_close(one, other.cpu(), rtol=0, atol=0, equal_nan=True)


def test_packing_changes_no_number():
    tensors = numbers(result())
    packed = pack(tensors)
    assert [p.dtype for p in packed] == [torch.float32, torch.int64]
    for one, other in zip(unpack(list(packed), tensors), tensors, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_model_without_routers_has_no_integers():
    tensors = [torch.tensor(1.5), torch.tensor(2.5)]
    assert unpack(list(pack(tensors)), tensors) == tensors


def test_on_a_cpu_the_result_is_there_at_once():
    assert_same(Arrival(result()).wait(), result())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpus_numbers_arrive_whole_although_the_device_goes_on():
    expected = result("cuda")
    arrival = Arrival(expected)
    kept = Arrival(expected).wait()
    for tensor in numbers(expected):
        tensor.zero_()
    assert_same(arrival.wait(), kept)
    assert_same(kept, result())
