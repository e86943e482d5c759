"""Decoding on a GPU: one CUDA graph a token over static buffers, sampling on the device.

The host sees only the sampled tokens, and a step begins before it has seen those of the one before. `why_not`
says, before anything runs, which model cannot and why.
"""

from collections import deque
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ssmoe.generation.pieces import Pieces, rounded
from ssmoe.generation.recorder import Recorder
from ssmoe.generation.sampler import Sampling, choose, sample, uniforms
from ssmoe.model.feedforwards.dense import Dense
from ssmoe.model.feedforwards.moe import Experts, MoE
from ssmoe.model.layer import LayerState, State
from ssmoe.model.lm import LM
from ssmoe.model.mixers.attention import Attention, AttentionState
from ssmoe.model.mixers.mamba import Mamba
from ssmoe.model.norm import Linear
from ssmoe.model.state import alone, clone

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

        def begin(step: Step) -> None:
            ahead = [n + 1 for n in count]
            step.begin(uniforms(ahead, sampling, seeds) if sampling.temperature > 0 else None)

        try:
            for made in range(1, max_new_tokens + 1):
                going: list[int] = []
                for row in active:
                    if accept(row, tokens[row]) and made < max_new_tokens:
                        going.append(row)
                    else:
                        ends[row], pending[row] = alone(state, row), (tokens[row],)
                active = going
                if not active:
                    break
                if step is None:
                    step = self.prepare(b, max(count) + max_new_tokens, sampling)
                    step.load(state, tokens)
                    begin(step)
                for row in active:
                    count[row] += 1
                if made + 1 < max_new_tokens:
                    # the next one, in vain only where every row ends here
                    begin(step)
                tokens = step.end()
                state = step.state
        finally:
            if step is not None:
                step.settle()
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
    """The runner of `model`, made anew where its weights have changed or it was trained since."""
    weights = [*model.parameters(), *model.buffers()]
    versions = ((t.data_ptr(), 0 if t.is_inference() else t._version) for t in weights)
    stamp = (model.trainings, *versions)
    found = _runners.get(model)
    if found is None or found[0] != stamp:
        _runners.pop(model, None)
        found = _runners[model] = (stamp, Runner(model))
    return found[1]


class Step:
    """One token for each of `rows` rows: reads `ids` and leaves the next ones there, a state beside the old.

    Two graphs take turns, each of which reads the state that the other wrote: a step can begin before the
    host has the tokens of the one before, and a row that ends there still has its state. Caches of attention
    are written past what a row has read, so they are the same in both states.
    """

    def __init__(self, model: LM, rows: int, capacity: int, sampling: Sampling) -> None:
        self.model, self.sampling = model, sampling
        device = model.embedding.weight.device
        state = model.init_state(rows, capacity)
        self.states = state, tuple(_beside(layer) for layer in state)
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self._draws = torch.zeros(rows, dtype=torch.float64, device=device)
        # the host's side of both, for each graph: copied to and fro by the graph itself
        pinned = device.type == "cuda"
        self._tokens = [torch.zeros(rows, 1, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self._drawn = [torch.zeros(rows, dtype=torch.float64, pin_memory=pinned) for _ in range(2)]
        self._launch = record([partial(self._work, turn) for turn in range(2)], device)
        self._waits: deque[Callable[[], None]] = deque()
        self._ended = 0

    @property
    def state(self) -> State:
        """After the steps that have ended; overwritten by the second `begin` from here."""
        return self.states[self._ended % 2]

    def _work(self, turn: int) -> None:
        if self.sampling.temperature > 0:
            self._draws.copy_(self._drawn[turn], non_blocking=True)
        out = self.model(self.ids, self.states[turn], logits="last", out_state=self.states[1 - turn])
        assert out.logits is not None
        if self.sampling.temperature == 0:
            chosen = self.model.ops.argmax(out.logits[:, : self.sampling.num_tokens])
        else:
            chosen = choose(out.logits, self._draws, self.sampling)
        self.ids.copy_(chosen.unsqueeze(1))
        self._tokens[turn].copy_(self.ids, non_blocking=True)

    def load(self, state: State, tokens: Sequence[int]) -> None:
        """Start with `state` and the tokens to be read next."""
        self.settle()
        self._ended = 0
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

    def begin(self, draws: Sequence[float] | None) -> None:
        """Let the device read the tokens that lie there; two steps at most may have begun and not ended.

        draws: a number a row, None if greedy.
        """
        turn = (self._ended + len(self._waits)) % 2
        if draws is not None:
            self._drawn[turn].copy_(torch.tensor(draws, dtype=torch.float64))
        self._waits.append(self._launch[turn]())

    def end(self) -> list[int]:
        """Wait for the first begun step: the tokens it chose."""
        self._waits[0]()
        self._waits.popleft()
        self._ended += 1
        return cast(list[int], self._tokens[(self._ended - 1) % 2].flatten().tolist())

    def settle(self) -> None:
        """Wait for what has begun and forget it."""
        while self._waits:
            self._waits[0]()
            self._waits.popleft()


def _beside(layer: LayerState) -> LayerState:
    """Another state of a layer, which shares the cache of an attention layer."""
    if isinstance(layer, AttentionState):
        return layer._replace(length=layer.length.clone())
    return clone((layer,))[0]


Launch = Callable[[], Callable[[], None]]
"""Starts work on the device and returns a function that waits for its end."""


def record(works: Sequence[Callable[[], None]], device: torch.device) -> list[Launch]:
    """Each of `works` once to compile what is not compiled yet, then as a graph.

    All run on one stream, one after another as they are launched and after what the caller's stream was given
    before. Kernels with memory of their own keep it by the stream, so a graph always runs on the one that it
    was captured on. One launch of each at a time.
    """
    stream = torch.cuda.Stream(device)
    return [_recorded(work, stream) for work in works]


def _recorded(work: Callable[[], None], stream: torch.cuda.Stream) -> Launch:
    graph, done = torch.cuda.CUDAGraph(), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(stream.device))
    with torch.cuda.stream(stream):
        work()
        stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        work()

    def launch() -> Callable[[], None]:
        stream.wait_stream(torch.cuda.current_stream(stream.device))
        with torch.cuda.stream(stream):
            graph.replay()
            done.record()
        return done.synchronize

    return launch


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
