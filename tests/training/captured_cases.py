"""The same training steps captured and launched kernel by kernel; of no use without a CUDA device."""

import numpy as np
import torch
from benchmarks.later import LATER

import ssmoe
from ssmoe.config.load import RunConfig
from ssmoe.data.packing import Batch
from ssmoe.model.layer import RouterStats
from ssmoe.model.lm import LM
from ssmoe.training.arrival import Arrival
from ssmoe.training.captured import CapturedStep
from ssmoe.training.optimizer import build_optimizer, parameter_groups
from ssmoe.training.step import StepResult, train_step

# preset, changes, documents kept apart
CASES: dict[str, tuple[str, list[str], bool]] = {
    "moe": ("moe-mamba-25m", ["model.repeat=2", "model.pattern.moe.num_experts=8"], False),
    "dropless": ("moe-mamba-25m", ["model.repeat=2", "model.pattern.moe.capacity_factor=null"], False),
    "documents": ("moe-mamba-25m", ["model.repeat=2", "model.pattern.moe.num_experts=8"], True),
    "jitter": ("moe-mamba-25m", ["model.repeat=2", "model.pattern.moe.jitter=0.1"], False),
    "fine": ("moe-mamba-fine-25m", [], False),
    "later": ("moe-mamba-25m", ["model.repeat=2", *LATER], True),
    "mamba": ("mamba-25m", ["model.repeat=3"], False),
    "recompute": ("mamba-25m", ["model.repeat=3", "train.recompute=true"], True),
    "attention": ("transformer-25m", ["model.repeat=2"], False),
    "micro-batches": ("moe-mamba-25m", ["model.repeat=2", "train.micro_batch_size=2"], False),
    "muon": (
        "moe-mamba-25m",
        ["model.repeat=2", "train.optimizer=muon", "train.learning_rate_ratios.experts=2"],
        False,
    ),
    "float32": ("moe-mamba-25m", ["model.repeat=2", "train.precision=float32"], False),
}


def batches(count: int) -> list[Batch]:
    """8 x 128 tokens each, documents of about 30."""
    generator = np.random.default_rng(0)
    found: list[Batch] = []
    for _ in range(count):
        ids = generator.integers(0, 1000, (8, 129))
        starts = generator.random((8, 128)) < 0.03
        found.append(Batch(ids[:, :-1], ids[:, 1:], starts.cumsum(1).astype(np.int32), starts))
    return found


def run(config: RunConfig, *, isolate: bool, captured: bool, steps: int = 6) -> tuple[list[StepResult], LM]:
    """The numbers of every step, as training reads them, and the trained model."""
    from ssmoe.training.recompute import recompute_layers

    torch.manual_seed(0)
    dtype = torch.bfloat16 if config.train.precision == "bfloat16" else None
    model = ssmoe.build(config.model, backend="triton", device="cuda", dtype=dtype).train()
    if config.train.recompute:
        recompute_layers(model)
    optimizer = build_optimizer(parameter_groups(model), config.train)
    step = CapturedStep(model, optimizer, config.train, isolate=isolate)
    arrivals: list[Arrival] = []
    for number, batch in enumerate(batches(steps)):
        rate = 1e-3 * (number + 1)
        if captured:
            result = step(batch, rate)
        else:
            result = train_step(model, optimizer, batch, config.train, rate, isolate=isolate)
        arrivals.append(Arrival(result))
    return [arrival.wait() for arrival in arrivals], model


def differences(name: str) -> dict[str, float]:
    """Largest difference between the two ways, of each number and of the weights; 0 if equal to the bit."""
    preset, changes, isolate = CASES[name]
    config = ssmoe.preset(preset, ["model.vocab_size=1000", "train.batch_size=8", *changes])
    plain, expected = run(config, isolate=isolate, captured=False)
    replayed, found = run(config, isolate=isolate, captured=True)
    worst: dict[str, float] = {}

    def note(key: str, a: torch.Tensor, b: torch.Tensor) -> None:
        worst[key] = max(worst.get(key, 0.0), float((a.double() - b.double()).abs().max()))

    for a, b in zip(plain, replayed, strict=True):
        for key in ("lm", "balance", "z", "grad_norm"):
            note(key, getattr(a, key), getattr(b, key))
        for layer in a.routers:
            for key in RouterStats._fields:
                note(key, getattr(a.routers[layer], key), getattr(b.routers[layer], key))
    for (key, a), b in zip(expected.state_dict().items(), found.state_dict().values(), strict=True):
        note("router bias" if key.endswith("router.bias") else "weights", a, b)
    return worst
