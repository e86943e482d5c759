"""Every initial value in one table: which rule a parameter's name selects, for each scheme.

A value depends on the seed and the parameter's name alone, not on device, order or rank. Scheme "moe_mamba"
is the MoE-Mamba authors' code (arXiv 2401.04081: truncated normals of std sqrt(scale / fan_in), the Mamba
mixer as in mamba-ssm); scheme "mamba" is mamba-ssm's language model (arXiv 2312.00752): N(0, 0.02)
embedding, torch's default Linear, the last projection of a layer divided by sqrt(number of layers).
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from functools import partial
from hashlib import blake2b
from math import log, pi, sqrt
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from ssmoe.config.model import InitConfig

_THREADS = min(16, os.cpu_count() or 1)
_WORTH_THREADS = 1 << 24
"""Values of a model from which on several threads fill them."""


class _Context(NamedTuple):
    module: nn.Module
    init: InitConfig
    num_layers: int


_Rule = Callable[[Tensor, _Context, torch.Generator], None]


def init_weights(
    module: nn.Module, *, init: InitConfig | None = None, seed: int = 0, num_layers: int = 1
) -> None:
    """Fill every parameter of `module` in place; parameters on the meta device are left alone.

    Buffers (a router's balancing bias) start at zero.
    num_layers: residual sub-layers, by whose root scheme "mamba" divides output projections.
    """
    init = init or InitConfig()
    table = _TABLES[init.scheme]
    tasks: list[Callable[[], None]] = []
    values_in_all = 0
    for path, owner in cast(Iterable[tuple[str, nn.Module]], module.named_modules()):
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.is_meta:
                continue
            full_name = f"{path}.{name}" if path else name
            rule = next(rule for pattern, rule in table if fnmatchcase(f".{full_name}", pattern))
            context = _Context(owner, init, num_layers)
            generator, factor = _generator(seed, full_name), _factor(full_name, init)
            tasks.append(partial(_fill, parameter, rule, context, generator, factor))
            values_in_all += parameter.numel()
        for buffer in owner.buffers(recurse=False):
            buffer.zero_()
    # each parameter has a generator of its own, so that threads change nothing but the time
    with ThreadPoolExecutor(_THREADS if values_in_all > _WORTH_THREADS else 1) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()


def _fill(
    parameter: nn.Parameter, rule: _Rule, context: _Context, generator: torch.Generator, factor: float
) -> None:
    values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
    rule(values, context, generator)
    values.mul_(factor)
    with torch.no_grad():
        parameter.copy_(values)


def _factor(name: str, init: InitConfig) -> float:
    """What the configuration puts on top of the scheme."""
    return next(
        (getattr(init, field) for pattern, field in _FACTORS if fnmatchcase(f".{name}", pattern)), 1.0
    )


def _generator(seed: int, name: str) -> torch.Generator:
    digest = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))


def _zeros(values: Tensor, context: _Context, generator: torch.Generator) -> None:
    del context, generator
    values.zero_()


def _ones(values: Tensor, context: _Context, generator: torch.Generator) -> None:
    del context, generator
    values.fill_(1)


def _normal_002(values: Tensor, context: _Context, generator: torch.Generator) -> None:
    del context
    values.normal_(0, 0.02, generator=generator)


def _uniform(values: Tensor, context: _Context, generator: torch.Generator) -> None:
    """torch's default for Linear and Conv1d: uniform in +-1 / sqrt(fan_in)."""
    del context
    bound = 1 / sqrt(values.shape[-1])
    values.uniform_(-bound, bound, generator=generator)


def _uniform_by_depth(values: Tensor, context: _Context, generator: torch.Generator) -> None:
    _uniform(values, context, generator)
    values.div_(sqrt(context.num_layers))


def _conv_bias(values: Tensor, context: _Context, generator: torch.Generator) -> None:
    weight = context.module.get_parameter("weight")
    bound = 1 / sqrt(weight.shape[-1])
    values.uniform_(-bound, bound, generator=generator)


def _truncated_normal(values: Tensor, context: _Context, generator: torch.Generator, fan_in: int) -> None:
    """The authors cut at +-2 scale, not at +-2 std."""
    std, bound = sqrt(context.init.scale / fan_in), 2 * context.init.scale
    nn.init.trunc_normal_(values, 0, std, -bound, bound, generator=generator)


def _truncated_by_input(values: Tensor, context: _Context, generator: torch.Generator) -> None:
    _truncated_normal(values, context, generator, fan_in=values.shape[-1])


def _truncated_embedding(values: Tensor, context: _Context, generator: torch.Generator) -> None:
    _truncated_normal(values, context, generator, fan_in=1)


def _truncated_expert_down(values: Tensor, context: _Context, generator: torch.Generator) -> None:
    num_experts, _, d_expert = values.shape
    bank = context.init.expert_fan_in == "bank"
    _truncated_normal(values, context, generator, fan_in=num_experts * d_expert if bank else d_expert)


def _a_log(values: Tensor, context: _Context, generator: torch.Generator) -> None:
    """S4D-Real, A_n = -(n + 1), in every channel; the real part of S4D-Lin is -1/2."""
    del generator
    if any(name == "A_imaginary" for name, _ in context.module.named_parameters()):
        values.fill_(log(0.5))
    else:
        values.copy_(torch.arange(1, values.shape[1] + 1, dtype=values.dtype).log().expand_as(values))


def _a_imaginary(values: Tensor, context: _Context, generator: torch.Generator) -> None:
    """S4D-Lin: pi n."""
    del context, generator
    values.copy_((pi * torch.arange(values.shape[1], dtype=values.dtype)).expand_as(values))


def _unit_normal(values: Tensor, context: _Context, generator: torch.Generator) -> None:
    """Complex numbers, stored as pairs, of mean square one."""
    del context
    values.normal_(0, sqrt(0.5) if values.ndim == 3 else 1.0, generator=generator)


def _delta_bias(values: Tensor, context: _Context, generator: torch.Generator) -> None:
    """The inverse softplus of step sizes log-uniform in the layer's delta range, at least 1e-4."""
    delta_range = getattr(context.module, "delta_range")  # noqa: B009, nn.Module types attributes as Tensor
    low, high = (log(bound) for bound in delta_range)
    delta = values.uniform_(0, 1, generator=generator).mul_(high - low).add_(low).exp_().clamp_(min=1e-4)
    values.copy_(delta + torch.log(-torch.expm1(-delta)))


_FACTORS = (
    ("*.router.weight", "router_factor"),
    ("*.routers.*.weight", "router_factor"),
    ("*.up", "expert_up_factor"),
    ("*.gate", "expert_up_factor"),
    ("*.down", "expert_down_factor"),
)
"""Experts' matrices are parameters of these names, a dense layer's are modules with a weight."""
_MAMBA_MIXER: tuple[tuple[str, _Rule], ...] = (
    ("*.A_log", _a_log),
    ("*.A_imaginary", _a_imaginary),
    ("*.C", _unit_normal),
    ("*.D", _ones),
    ("*.initial_state", _zeros),
    ("*.delta_bias", _delta_bias),
    ("*.delta_proj.weight", _uniform),
    ("*.conv.weight", _uniform),
    ("*.conv.bias", _conv_bias),
    ("*.in_proj.weight", _uniform),
    ("*.x_proj.weight", _uniform),
)
_NORMS_AND_BIASES: tuple[tuple[str, _Rule], ...] = (
    ("*norm.weight", _ones),
    ("*.bias", _zeros),
)
_TABLES: dict[str, tuple[tuple[str, _Rule], ...]] = {
    "moe_mamba": (
        *_MAMBA_MIXER,
        *_NORMS_AND_BIASES,
        ("*.embedding.weight", _truncated_embedding),
        ("*.out_proj.weight", _uniform),
        ("*.down", _truncated_expert_down),
        ("*", _truncated_by_input),
    ),
    "mamba": (
        *_MAMBA_MIXER,
        *_NORMS_AND_BIASES,
        ("*.embedding.weight", _normal_002),
        ("*.out_proj.weight", _uniform_by_depth),
        ("*.o_proj.weight", _uniform_by_depth),
        ("*.down", _uniform_by_depth),
        ("*.down.weight", _uniform_by_depth),
        ("*", _uniform),
    ),
}
