"""One GPU: training steps of several models: time, memory, and where both go.

    python benchmarks/gpu_step.py [moe-32 moe-128 moe-256 fine mamba dense ...] [--profile] [--vocab 50304]

64 x 1024 tokens, vocabulary 50,304 unless told, bfloat16, AdamW, dropless. "graph" replays the step as a
CUDA graph, as training does; "launched" is the same step kernel by kernel. Peak memory is what torch had
allocated at most, the recording of the graph included, and what it had reserved. --profile adds the kernels
by time and the tensors that the backward pass keeps.
"""

# what the profiler gives has no types
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

import argparse
from collections import defaultdict
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import triton
from later import LATER
from torch import Tensor
from torch.autograd import DeviceType  # pyright: ignore[reportPrivateImportUsage]

import ssmoe
from ssmoe.data.packing import Batch
from ssmoe.model.lm import LM
from ssmoe.training.captured import CapturedStep, why_not
from ssmoe.training.optimizer import build_optimizer, parameter_groups
from ssmoe.training.step import inputs_of, train_step

DROPLESS = "model.pattern.moe.capacity_factor=null"
EXPERTS = "model.pattern.moe.num_experts=32"
MODELS: dict[str, tuple[str, list[str]]] = {
    "moe-32": ("moe-mamba-25m", [EXPERTS, DROPLESS]),
    "moe-128": ("moe-mamba-25m", [EXPERTS, DROPLESS, "model.pattern.moe.granularity=4"]),
    "moe-256": ("moe-mamba-25m", [EXPERTS, DROPLESS, "model.pattern.moe.granularity=8"]),
    "fine": ("moe-mamba-fine-25m", []),
    "later": ("moe-mamba-25m", LATER),
    "mamba": ("mamba-25m", []),
    "dense": ("transformer-25m", []),
}
TOKENS = (64, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--vocab", type=int, default=50304)
    given = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(
        f"{'model':10} {'launched':>9} {'graph':>9} {'tokens/s':>10} {'peak GiB':>9} {'reserved':>9}",
        flush=True,
    )
    for name in given.models:
        measure(name, given.vocab, profile=given.profile)
        torch.cuda.empty_cache()


def measure(name: str, vocabulary: int, *, profile: bool) -> None:
    preset, changes = MODELS[name]
    run = ssmoe.preset(preset, [f"model.vocab_size={vocabulary}", *changes])
    model = ssmoe.build(run.model, backend="triton", device="cuda", dtype=torch.bfloat16).train()
    optimizer = build_optimizer(parameter_groups(model), run.train)
    batch = random_batch(vocabulary)

    def launched() -> None:
        train_step(model, optimizer, batch, run.train, 1e-4, isolate=False)

    launched()
    torch.cuda.synchronize()
    slow = timed(launched)
    if profile:
        kernels(launched, slow)
        kept(model, batch)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if (reason := why_not(model, run.train, isolate=False)) is not None:
        print(f"{name:10} {slow:9.2f} not captured: {reason}", flush=True)
        return
    captured = CapturedStep(model, optimizer, run.train, isolate=False)
    fast = timed(lambda: captured(batch, 1e-4))
    gib = (value / 2**30 for value in (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
    speed = TOKENS[0] * TOKENS[1] / fast * 1000
    print(
        f"{name:10} {slow:9.2f} {fast:9.2f} {speed:10,.0f} " + " ".join(f"{g:9.2f}" for g in gib), flush=True
    )


def random_batch(vocabulary: int) -> Batch:
    rows, context = TOKENS
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, context + 1))
    documents, starts = np.zeros((rows, context), np.int32), np.zeros((rows, context), bool)
    return Batch(ids[:, :-1], ids[:, 1:], documents, starts)


def timed(step: Callable[[], object], count: int = 12) -> float:
    """Median milliseconds between the ends of steps that follow one another, as in training."""
    for _ in range(4):
        step()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return float(np.median([a.elapsed_time(b) for a, b in pairwise(events)]))


def kernels(step: Callable[[], object], whole: float, lines: int = 45) -> None:
    """Device time by operator with its shapes, then by kernel."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        step()
        torch.cuda.synchronize()
    cuda = DeviceType.CUDA
    by_kernel: dict[str, list[float]] = defaultdict(list)
    for event in profile.events() or []:
        if event.device_type == cuda and not event.name.startswith("Optimizer."):
            by_kernel[event.name].append(event.time_range.elapsed_us() / 1000)
    total = sum(map(sum, by_kernel.values()))
    count = sum(map(len, by_kernel.values()))
    print(f"  kernels {total:.2f} ms in {count} launches; not on the device {whole - total:.2f} ms")
    rows: Any = profile.key_averages(group_by_input_shape=True)
    rows = sorted((r for r in rows if r.device_type != cuda), key=lambda r: -r.self_device_time_total)
    for row in rows[:lines]:
        if row.self_device_time_total > 50:
            shapes = str([s for s in row.input_shapes if s]).replace(" ", "")[:90]
            print(f"  {row.self_device_time_total / 1000:8.3f} {row.count:5} {row.key[:44]:44} {shapes}")
    print("  by kernel")
    for name, times in sorted(by_kernel.items(), key=lambda item: -sum(item[1]))[:lines]:
        print(f"  {sum(times):8.3f} {len(times):5} {name[:120]}")


def kept(model: LM, batch: Batch) -> None:
    """What the backward pass needs, by shape, beside weights; each storage once."""
    seen: dict[int, tuple[str, int]] = {}
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}

    def note(tensor: Tensor) -> Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own and tensor.is_cuda:
            text = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
            size = tensor.untyped_storage().nbytes()
            if place not in seen or seen[place][1] < size:
                seen[place] = (text, size)
        return tensor

    inputs = inputs_of(batch, torch.device("cuda"), isolate=False)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = model(inputs.ids, targets=inputs.targets)
    forward, peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    assert out.loss is not None
    out.loss.total.backward()
    backward = torch.cuda.max_memory_allocated()
    model.zero_grad(set_to_none=True)
    named = {
        "before": before,
        "after forward": forward,
        "peak of forward": peak,
        "peak of backward": backward,
    }
    print("  GiB: " + ", ".join(f"{key} {value / 2**30:.2f}" for key, value in named.items()))
    by_shape: dict[str, list[int]] = defaultdict(list)
    for text, size in seen.values():
        by_shape[text].append(size)
    for text, sizes in sorted(by_shape.items(), key=lambda item: -sum(item[1]))[:16]:
        print(f"  {sum(sizes) / 2**20:8.0f} MiB {len(sizes):4} x {text}")


if __name__ == "__main__":
    main()
