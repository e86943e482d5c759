"""Documents that begin from a learned state: alone, inside packed rows, padded, cut, and differentiated."""

import copy

import pytest
import torch

from ssmoe.config.count import count_parameters
from ssmoe.model.build import build
from ssmoe.model.mixers.mamba import Mamba, MambaState
from ssmoe.model.mixers.scan import SSMParameters, scan
from ssmoe.ops import Segments, load
from tests.model.zoo import small

GENERATOR = torch.Generator()


def test_a_scan_reads_what_a_fused_optimiser_has_written() -> None:
    """torch's fused optimisers change a parameter without a new version of it."""
    mixer, x = Mamba(8), torch.randn(1, 5, 8)
    with torch.no_grad():
        mixer(x)
    mixer(x).x.square().sum().backward()
    torch.optim.AdamW(mixer.parameters(), lr=0.1, fused=True).step()
    fresh = Mamba(8)
    fresh.load_state_dict(mixer.state_dict())
    with torch.no_grad():
        assert torch.equal(mixer(x).x, fresh(x).x)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def drawn(seed: int, channels: int, states: int, dtype: torch.dtype = torch.float32) -> SSMParameters:
    """A scan's parameters at random, `GENERATOR` seeded before."""
    GENERATOR.manual_seed(seed)
    parameters = SSMParameters(channels, states, (1e-3, 1e-1), learned_state=True).to(dtype)
    for parameter in parameters.parameters():
        with torch.no_grad():
            parameter.copy_(0.5 * random(*parameter.shape))
    return parameters


def learned(d_model: int = 6, seed: int = 0) -> Mamba:
    GENERATOR.manual_seed(seed)
    block = Mamba(d_model, d_state=3, learned_state=True).double()
    assert block.ssm.initial_state is not None
    with torch.no_grad():
        block.ssm.initial_state.copy_(random(*block.ssm.initial_state.shape))
    return block


def test_it_is_zero_at_first_and_then_equal_to_a_state_that_is_given() -> None:
    fresh = Mamba(6, d_state=3, learned_state=True)
    assert fresh.ssm.initial_state is not None
    assert not fresh.ssm.initial_state.any()
    block = learned()
    x = random(2, 9, 6)
    given = block.init_state(2, 0, x.dtype, x.device)
    assert torch.equal(given.ssm[1], block.ssm.initial_state)
    assert torch.equal(block(x).x, block(x, given).x)
    zero = MambaState(given.conv, torch.zeros_like(given.ssm))
    assert float((block(x).x - block(x, zero).x).abs().max().detach()) > 1e-3


@pytest.mark.parametrize("lengths", [(5, 70, 1, 14), (90,), (1, 1, 88)])
def test_packed_documents_begin_as_they_do_alone(lengths) -> None:
    block, x = learned(), random(1, 90, 6)
    packed = block(x, None, Segments.packed([lengths]))
    alone = [block(part) for part in x.split(lengths, 1)]
    torch.testing.assert_close(packed.x, torch.cat([one.x for one in alone], 1), rtol=0, atol=1e-12)
    for one, other in zip(packed.state, alone[-1].state, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_a_row_that_goes_on_keeps_its_state_and_one_that_opens_drops_it() -> None:
    block, x = learned(), random(2, 12, 6)
    before = block(random(2, 4, 6)).state
    segments = Segments.packed([[12], [12]])
    segments.starts[0] = False
    found = block(x, before, segments)
    torch.testing.assert_close(found.x[:1], block(x[:1], MambaState(*(s[:1] for s in before))).x)
    torch.testing.assert_close(found.x[1:], block(x[1:]).x)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_touches_nothing(side) -> None:
    block, x = learned(), random(3, 20, 6)
    lengths = (20, 7, 1)
    segments = Segments.ragged(lengths, length=20, side=side)
    # a document that opens on the first real position, and another one later in the longest row
    segments.starts[torch.arange(3), segments.real.to(torch.int32).argmax(1)] = True
    segments.starts[0, 11] = True
    found = block(x, block(random(3, 2, 6)).state, segments)
    for row, n in enumerate(lengths):
        own = x[row : row + 1, -n:] if side == "left" else x[row : row + 1, :n]
        mine = found.x[row, -n:] if side == "left" else found.x[row, :n]
        parts = own.split((11, 9), 1) if row == 0 else (own,)
        expected = torch.cat([block(part).x for part in parts], 1)[0]
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-12)
        last = block(parts[-1]).state.ssm[0]
        torch.testing.assert_close(found.state.ssm[row], last, rtol=0, atol=1e-12)


def test_chunks_of_a_packed_row_are_the_row() -> None:
    block, x = learned(), random(1, 30, 6)
    segments = Segments.packed([[4, 17, 9]])
    whole, state, parts = block(x, None, segments), None, []
    for begin, end in ((0, 4), (4, 5), (5, 22), (22, 30)):
        out = block(x[:, begin:end], state, segments.slice(begin, end))
        state, parts = out.state, [*parts, out.x]
    torch.testing.assert_close(torch.cat(parts, 1), whole.x, rtol=0, atol=1e-12)


def test_a_single_first_token_begins_there_too() -> None:
    """Without gradients one position takes a way of its own."""
    model = build(small("mamba-learned-state")).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.layer.ssm.initial_state.normal_(generator=GENERATOR.manual_seed(0))
        ids = torch.tensor([[5, 9], [7, 1]])
        whole = model(ids)
        first = model(ids[:, :1])
        second = model(ids[:, 1:], first.state)
    torch.testing.assert_close(torch.cat((first.logits, second.logits), 1), whole.logits)
    torch.testing.assert_close(second.state[1].ssm, whole.state[1].ssm)


@pytest.mark.parametrize("lengths", [None, (3, 4, 2)])
def test_gradients(lengths) -> None:
    parameters = drawn(1, 2, 3, torch.float64)
    segments = None if lengths is None else Segments.packed([lengths])
    names = [name for name, _ in parameters.named_parameters()]
    values = [parameter.detach().requires_grad_() for parameter in parameters.parameters()]
    inputs = [random(1, 9, n).requires_grad_() for n in (2, 2, 3, 3, 2)]

    def run(x, delta, B, C, z, *own):
        def call(module):
            return scan(load("reference"), module, x, delta, B, C, z, state=None, segments=segments)

        return torch.func.functional_call(
            _Call(parameters, call), dict(zip(_prefixed(names), own, strict=True))
        )

    assert torch.autograd.gradcheck(run, (*inputs, *values))
    assert (
        float(
            torch.autograd.grad(run(*inputs, *values)[0].sum(), values[names.index("initial_state")])[0]
            .abs()
            .sum()
        )
        > 0
    )


class _Call(torch.nn.Module):
    def __init__(self, parameters, call) -> None:
        super().__init__()
        self.inner, self.call = parameters, call

    def forward(self):
        return self.call(self.inner)


def _prefixed(names):
    return [f"inner.{name}" for name in names]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_kernels_agree(dtype) -> None:
    parameters = drawn(2, 6, 4)
    x, delta, B, C, z = (random(2, 33, n).to(dtype) for n in (6, 6, 4, 4, 6))
    segments = Segments.packed([[8, 25], [33]])
    out = [
        scan(load(name), parameters, x, delta, B, C, z, state=None, segments=segments)
        for name in ("reference", "cpu")
    ]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for one, other in zip(*out, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gpu_kernels_agree_in_every_gradient(dtype) -> None:
    parameters = drawn(3, 48, 16)
    given = [random(2, 133, n).to(dtype) for n in (48, 48, 16, 16, 48)]
    found = {}
    for name, device in (("triton", "cuda"), ("reference", "cpu")):
        module = copy.deepcopy(parameters).to(device)
        inputs = [tensor.clone().to(device).requires_grad_() for tensor in given]
        segments = Segments.packed([[8, 64, 61], [133]], device=device)
        y, state = scan(load(name), module, *inputs, state=None, segments=segments)
        (y.float().square().sum() + state.square().sum()).backward()
        gradients = [leaf.grad for leaf in (*inputs, *module.parameters())]
        found[name] = [tensor.detach().double().cpu() for tensor in (y, state, *gradients)]
    bound = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for ours, theirs in zip(*found.values(), strict=True):
        assert float((ours - theirs).norm() / theirs.norm()) < bound


def test_a_model_counts_it_trains_it_and_generates_from_it() -> None:
    config = small("mamba-learned-state")
    model = build(config)
    assert count_parameters(config).total == sum(p.numel() for p in model.parameters())
    ids = torch.randint(61, (2, 16), generator=GENERATOR.manual_seed(0))
    segments = Segments.packed([[6, 10], [16]])
    out = model(ids, None, segments, targets=ids.roll(-1, 1))
    out.loss.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
