"""Decoding on a GPU: one CUDA graph a token over static buffers, the state in place, sampling on the device.

The host sees only the sampled tokens. `why_not` says, before anything runs, which model cannot and why.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ssmoe.generation.pieces import Pieces, rounded
from ssmoe.generation.recorder import Recorder
from ssmoe.generation.sampler import Sampling, choose, sample, uniforms
from ssmoe.model.feedforwards.dense import Dense
from ssmoe.model.feedforwards.moe import Experts, MoE
from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.model.mixers.attention import Attention, AttentionState
from ssmoe.model.mixers.mamba import Mamba
from ssmoe.model.norm import Linear
from ssmoe.model.state import select

CAPTURED = (Mamba, Attention, Dense, MoE)
"""Layers that read one token without waiting for the host and without changing a shape."""

Accept = Callable[[int, int], bool]


def why_not(model: LM) -> str | None:
    """Why `model` cannot be decoded by CUDA graphs, in one line; None when it can."""
    device = model.embedding.weight.device
    if device.type != "cuda":
        return f"the model is on {device.type}, and graphs need a CUDA device"
    if model.backend != "triton":
        return f"the backend is {model.backend!r}, and graphs need 'triton'"
    for i, layer in enumerate(_layers(model)):
        if not isinstance(layer, CAPTURED) or (isinstance(layer, Attention) and not layer.causal):
            return f"layer {i} is {type(layer).__name__}, which cannot be captured"
    return None


class Runner:
    """`model` ready to decode: weights in the compute dtype, cast once, and the graphs that were used last.

    It shares every other tensor with the model it was made from.
    """

    def __init__(self, model: LM) -> None:
        self.model = _narrowed(model)
        self.pieces = Pieces(self.model, Recorder())
        self._step: tuple[tuple[object, ...], Step] | None = None

    def go_on(
        self,
        logits: Tensor,
        state: State,
        count: list[int],
        accept: Accept,
        *,
        sampling: Sampling,
        max_new_tokens: int,
        seeds: Sequence[int] | None,
    ) -> tuple[list[State], list[tuple[int, ...]]]:
        """Sample after `logits` until `accept` says stop.

        count: tokens read, a number a row; counted on. Returns each row's state, without its last token, and
        that token.
        """
        b = len(count)
        ends: list[State] = [()] * b
        pending: list[tuple[int, ...]] = [()] * b
        seeds = [sampling.seed] * b if seeds is None else list(seeds)
        tokens = sample(logits, count, sampling, seeds)
        active, step = list(range(b)), None
        for made in range(1, max_new_tokens + 1):
            going: list[int] = []
            for row in active:
                if accept(row, tokens[row]) and made < max_new_tokens:
                    going.append(row)
                else:
                    ends[row], pending[row] = select(state, [row]), (tokens[row],)
            active = going
            if not active:
                break
            if step is None:
                step = self.prepare(b, max(count) + max_new_tokens, sampling)
                step.load(state, tokens)
                state = step.state
            for row in active:
                count[row] += 1
            tokens = step.run(uniforms(count, sampling, seeds) if sampling.temperature > 0 else None)
        return ends, pending

    def prepare(self, rows: int, capacity: int, sampling: Sampling) -> "Step":
        """The graph for so many rows, with room for so many tokens where there is attention."""
        if any(isinstance(layer, Attention) for layer in _layers(self.model)):
            capacity = rounded(capacity)
        else:
            capacity = 0
        key = (rows, capacity, sampling._replace(seed=0), torch.is_inference_mode_enabled())
        if self._step is None or self._step[0] != key:
            # the old one's memory first
            self._step = None
            self._step = (key, Step(self.model, rows, capacity, sampling))
        return self._step[1]


_runners: WeakKeyDictionary[LM, tuple[tuple[object, ...], Runner]] = WeakKeyDictionary()


def runner(model: LM) -> Runner:
    """The runner of `model`, made anew where its weights have changed since the last one."""
    weights = [*model.parameters(), *model.buffers()]
    stamp = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in weights)
    found = _runners.get(model)
    if found is None or found[0] != stamp:
        _runners.pop(model, None)
        found = _runners[model] = (stamp, Runner(model))
    return found[1]


class Step:
    """One token for each of `rows` rows: reads `ids`, moves `state` on and leaves the next ids there."""

    def __init__(self, model: LM, rows: int, capacity: int, sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling
        device = model.embedding.weight.device
        self.state = model.init_state(rows, capacity)
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.draws = torch.zeros(rows, dtype=torch.float64, device=device)
        # the host's side of both: copied to and fro by the graph itself
        pinned = device.type == "cuda"
        self.tokens = torch.zeros(rows, 1, dtype=torch.int64, pin_memory=pinned)
        self.drawn = torch.zeros(rows, dtype=torch.float64, pin_memory=pinned)
        self.replay = capture(self._work, device)

    def _work(self) -> None:
        if self.sampling.temperature > 0:
            self.draws.copy_(self.drawn, non_blocking=True)
        out = self.model(self.ids, self.state, logits="last", in_place=True)
        assert out.logits is not None
        if self.sampling.temperature == 0:
            chosen = self.model.ops.argmax(out.logits[:, : self.sampling.num_tokens])
        else:
            chosen = choose(out.logits, self.draws, self.sampling)
        self.ids.copy_(chosen.unsqueeze(1))
        self.tokens.copy_(self.ids, non_blocking=True)

    def load(self, state: State, tokens: Sequence[int]) -> None:
        """Begin with `state` and the tokens to be read next."""
        for mine, layer in zip(self.state, state, strict=True):
            for place, leaf in zip(mine, layer, strict=True):
                if isinstance(mine, AttentionState) and leaf.ndim == 4:
                    # the room may differ either way; what lies past a row's length weighs zero, unless NaN
                    room = min(place.shape[2], leaf.shape[2])
                    place.zero_()
                    place[:, :, :room].copy_(leaf[:, :, :room])
                else:
                    place.copy_(leaf)
        self.ids.copy_(torch.tensor(tokens).unsqueeze(1))
        if self.ids.is_cuda:
            torch.cuda.current_stream(self.ids.device).synchronize()

    def run(self, draws: Sequence[float] | None) -> list[int]:
        """Read the tokens, then return the next ones. draws: a number a row, None if greedy."""
        if draws is not None:
            self.drawn.copy_(torch.tensor(draws, dtype=torch.float64))
        self.replay()
        return cast(list[int], self.tokens.flatten().tolist())


def capture(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """`work` once to compile what is not compiled yet, then as a graph: a function that runs it to its end.

    Kernels with memory of their own keep it by the stream, so the graph always runs on the stream that it was
    captured on. What it reads must be there when it is called: it does not wait for the caller's stream.
    """
    stream, graph = torch.cuda.Stream(device), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
        stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        work()

    def replay() -> None:
        with torch.cuda.stream(stream):
            graph.replay()
        stream.synchronize()

    return replay


def _layers(model: LM) -> list[nn.Module]:
    return [layer.get_submodule("layer") for layer in model.layers]


@torch.no_grad()
def _narrowed(model: LM) -> LM:
    """`model` with the matrices of its products in the compute dtype; all else is shared, not copied."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = deepcopy(model, cast(dict[int, object], shared)).eval()
    dtype = model.compute_dtype or model.embedding.weight.dtype
    if twin.head is None and model.embedding.weight.dtype != dtype:
        with torch.device("meta"):
            twin.head = Linear(model.config.d_model, model.config.vocab_size)
        twin.head.weight = cast(nn.Parameter, model.embedding.weight)
        twin.head.product = model.ops.linear
    for part in twin.modules():
        if isinstance(part, Linear | Experts):
            for name, parameter in part.named_parameters(recurse=False):
                if parameter.dtype != dtype:
                    setattr(part, name, nn.Parameter(parameter.to(dtype), requires_grad=False))
    return twin
