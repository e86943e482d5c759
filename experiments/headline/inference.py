"""How fast MoE-Mamba reads and writes beside the Transformer of equal held-out loss, on one GPU or on a CPU.

    python experiments/headline/inference.py [--device cuda|cpu] [--results docs/results] [--threads 2]

The runs in RESULTS/headline.json say which models (`speed.choose`): the winner, every Transformer that was
trained on as many tokens, and the winner without attention layers. Weights are random, since no speed depends
on them; a router then spreads its tokens evenly. All in bfloat16, through the same engine, each at its best:
prompts in one pass or in the engine's pieces, whichever is faster, by the fused scan or by torch's fused
attention; tokens by one CUDA graph each over a cache that is written in place. Writing is greedy and counts
the host's part. Every figure is a median. Nothing is timed where a model that reads token by token disagrees
with itself reading at once (in float32). Writes RESULTS/inference.json, which page.py reads.
"""

import argparse
import json
import platform
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from results import Result, read_all
from speed import NAMES, choose
from torch import Tensor

from ssmoe.config.count import state_bytes
from ssmoe.config.model import ModelConfig
from ssmoe.generation.engine import Continuation, decode
from ssmoe.generation.graph import runner, why_not
from ssmoe.generation.sampler import Sampling
from ssmoe.model.build import build
from ssmoe.model.layer import State
from ssmoe.model.lm import LM
from ssmoe.model.mixers.attention import AttentionState
from ssmoe.model.state import with_room
from ssmoe.model.weights import narrow
from ssmoe.ops import settled

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from cpu_peers import CALM, TRIES, Others  # noqa: E402

FILE = "inference.json"
GREEDY = Sampling(0.0)
DTYPE = torch.bfloat16
PREFILL = {"cuda": ((1, 2048), (8, 2048), (1, 16384)), "cpu": ((1, 512), (1, 2048))}
"""Rows and tokens of the prompts."""
DECODE = {
    "cuda": [(rows, context) for context in (1024, 16384) for rows in (1, 8, 64, 256)],
    "cpu": [(1, 1024), (8, 1024), (1, 16384)],
}
"""Rows and how many tokens each has read before."""
WARM, STEPS = 4, {"cuda": 48, "cpu": 16}


def main() -> None:
    """Measure, print as it goes, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", metavar="DIR")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write there instead of DIR")
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    if given.threads:
        torch.set_num_threads(given.threads)
    pair = choose(read_all(given.results / "headline.json"))
    if pair is None:
        raise SystemExit("headline.json has no Transformer of as many tokens: run stages/final.toml")
    measured = head(given.device)
    out = (given.out or given.results) / FILE
    rest = [other for other in (*pair.others, pair.plain) if other is not None and other is not pair.theirs]
    for run in (pair.ours, pair.theirs, *rest):
        measure(run, given.device, measured)
        write(out, measured)


def head(device: str) -> dict[str, Any]:
    """Where and when."""
    threads = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else threads,
        "torch": torch.__version__.partition("+")[0],
        "precision": "bfloat16",
        "date": datetime.now(UTC).date().isoformat(),
        "others": 0.0,
        "models": {},
        "rows": {},
    }


def measure(run: Result, device: str, measured: dict[str, Any]) -> None:
    """Put one model's figures into `measured`; None for work whose memory the device does not have."""
    name, config = run["entry"], ModelConfig.model_validate(run["configuration"]["model"])
    agree(random_model(config.model_copy(update={"repeat": 1}), device, torch.float32))
    model = random_model(config, device, DTYPE)
    contexts = sorted({context for _, context in DECODE[device]})
    sizes = {str(n): state_bytes(config, n, activation_bytes=DTYPE.itemsize) for n in contexts}
    measured["models"][name] = {"state": sizes}
    work: list[tuple[str, int, Callable[[], float]]] = [
        (f"reading {b} x {n:,}", b * n, lambda b=b, n=n: read_seconds(model, b, n))
        for b, n in PREFILL[device]
    ] + [
        (
            f"writing, {b} {'row' if b == 1 else 'rows'} after {n:,} tokens",
            b,
            lambda b=b, n=n: write_seconds(model, b, n),
        )
        for b, n in DECODE[device]
    ]
    for title, tokens, seconds in work:
        try:
            rate = tokens / (seconds() if device == "cuda" else calmest(seconds, measured))
        except torch.cuda.OutOfMemoryError:
            rate = None
        rates = measured["rows"].setdefault(title, {})
        rates[name] = rate
        print(f"{NAMES[name]:16} {title:36} {'does not fit' if rate is None else f'{rate:,.0f}'}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()


def calmest(seconds: Callable[[], float], measured: dict[str, Any]) -> float:
    """Measured again where others took more than a tenth of a core meanwhile; what they took is noted."""
    found: list[tuple[float, float]] = []
    while len(found) < TRIES and (not found or found[-1][0] >= CALM):
        others = Others()
        time = seconds()
        found.append((others.cores(), time))
    cores, time = min(found)
    measured["others"] = max(measured["others"], cores)
    return time


def random_model(config: ModelConfig, device: str, dtype: torch.dtype) -> LM:
    """Random weights, the matrices in `dtype` as a loaded checkpoint has them."""
    model = build(config, device="meta", backend="auto" if device == "cpu" else "triton", dtype=dtype)
    held = narrow(model)
    tensors: dict[str, Tensor] = {}
    for name, meta in model.state_dict().items():
        if name.endswith("A_log"):
            tensor = torch.arange(1, meta.shape[1] + 1, device=device).float().log().expand(meta.shape)
        elif meta.ndim > 1:
            tensor = torch.empty(meta.shape, dtype=dtype if name in held else meta.dtype, device=device)
            tensor.normal_(std=0.02)
        else:
            tensor = torch.full(meta.shape, 0.0 if name.endswith("bias") else 1.0, device=device).to(
                meta.dtype
            )
        tensors[name] = settled(tensor, model.backend)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


@torch.no_grad()
def agree(model: LM) -> None:
    """Raise SystemExit where reading 40 tokens at once and the last 3 one by one differ.

    In float32, since with random weights bfloat16's rounding sends tokens to other experts.
    """
    ids = torch.randint(1000, (2, 40), device=model.embedding.weight.device)
    whole = model(ids).logits
    state = with_room(model(ids[:, :-3], logits="last").state, 64)
    for i in range(37, 40):
        out = model(ids[:, i : i + 1], state, logits="last", out_state=state)
        apart = (out.logits - whole[:, i]).float().norm() / whole[:, i].float().norm()
        if not apart < 1e-2:
            raise SystemExit(f"token by token and at once differ by {float(apart):.1e}: nothing is timed")


@torch.no_grad()
def read_seconds(model: LM, rows: int, tokens: int) -> float:
    """Until the first token after `rows` prompts: in one pass or, if faster, as the engine cuts them."""
    cuda = model.embedding.weight.is_cuda
    reader = runner(model).model if cuda else model
    ids = torch.randint(1000, (rows, tokens), device=model.embedding.weight.device)
    prompts = ids.tolist()

    def whole() -> None:
        reader(ids, logits="last")
        if cuda:
            torch.cuda.synchronize()

    def engine() -> None:
        decode(model, prompts, lambda *_: False, sampling=GREEDY, max_new_tokens=1)

    return min(median(repeated(one)) for one in ((whole, engine) if cuda else (whole,)))


def repeated(work: Callable[[], None]) -> list[float]:
    """Seconds of each call after two, for about half a second."""
    times: list[float] = []
    while len(times) < 6 or (len(times) < 40 and sum(times[2:]) < 0.5):
        begin = perf_counter()
        work()
        times.append(perf_counter() - begin)
    return times[2:]


@torch.no_grad()
def write_seconds(model: LM, rows: int, context: int) -> float:
    """From one token to the next, all rows having read `context` tokens."""
    device = model.embedding.weight.device.type
    times = (
        graph_times(model, rows, context) if why_not(model) is None else engine_times(model, rows, context)
    )
    # the time between two tokens; the first ones make what later ones use
    gaps = [after - before for before, after in pairwise(times)][WARM:]
    assert len(gaps) >= STEPS[device]
    return median(gaps)


def graph_times(model: LM, rows: int, context: int) -> list[float]:
    """The engine's graph, its cache filled where it lies, so that the largest has to fit only once."""
    steps = WARM + STEPS["cuda"] + 1
    step = runner(model).prepare(rows, context + steps + 2, GREEDY)
    fill(step.state, context)
    times: list[float] = []
    step.begin(None)
    for _ in range(steps):
        times.append(perf_counter())
        step.begin(None)
        step.end()
    step.settle()
    return times


def engine_times(model: LM, rows: int, context: int) -> list[float]:
    """The engine without graphs, going on from a state that has read `context` tokens."""
    times: list[float] = []

    def accept(row: int, token: int) -> bool:
        del token
        if row == 0:
            times.append(perf_counter())
        return True

    state = model.init_state(rows, context)
    fill(state, context)
    start = Continuation(state, (context,) * rows, ((1,),) * rows)
    steps = WARM + STEPS["cpu"] + 1
    decode(model, [()] * rows, accept, sampling=GREEDY, max_new_tokens=steps, start=start, graph=False)
    return times


def fill(state: State, context: int) -> None:
    """Random values, and as many tokens in every cache."""
    for layer in state:
        for leaf in layer:
            leaf.normal_() if leaf.is_floating_point() else leaf.fill_(context)
        assert not isinstance(layer, AttentionState) or layer.keys.shape[2] >= context


def write(path: Path, measured: dict[str, Any]) -> None:
    """A device a line; the newest of one device is kept."""
    known: list[dict[str, Any]] = json.loads(path.read_text()) if path.is_file() else []
    kept = {str(each["device"]): each for each in [*known, measured]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(kept[key]) for key in sorted(kept)) + "\n]\n")


if __name__ == "__main__":
    main()
