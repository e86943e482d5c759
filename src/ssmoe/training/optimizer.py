"""AdamW or Muon with explicit parameter groups: what decays, what is a matrix, and at which rate."""

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ssmoe.config.train import TrainConfig
from ssmoe.ops import Ops, load
from ssmoe.training.adamw import AdamW, is_large
from ssmoe.training.muon import ITERATIONS, Muon

NEVER_DECAYED = ("A_log", "A_imaginary", "D", "delta_bias", "initial_state")
Role = Literal["experts", "router", "embedding", "head", "matrices", "other"]
"""The fields of `LearningRateRatios`."""
_ROLES: tuple[tuple[str, Role], ...] = (
    ("*.ssm.*", "other"),
    ("*.conv.*", "other"),
    ("*norm.*", "other"),
    ("*.embedding.weight", "embedding"),
    ("*.head.*", "head"),
    ("*.router.*", "router"),
    ("*.routers.*", "router"),
)
_FUSED = {"in_proj.weight": 2, "qkv_proj.weight": 3}
"""Projections of one input to several outputs of equal width, stacked: separate matrices to Muon, so that
none takes the other's share of the update. Of x_proj's rows, delta, B and C differ in number: one matrix."""
_STATE = {"adamw": ("step", "exp_avg", "exp_avg_sq"), "muon": ("momentum",)}
_EPS = 1e-6
"""What torch adds to a norm that it divides by."""


class ParameterGroups(NamedTuple):
    """Named parameters by weight decay."""

    decayed: dict[str, nn.Parameter]
    not_decayed: dict[str, nn.Parameter]

    def describe(self, train: TrainConfig) -> list[str]:
        """A line a group: how many tensors and values, and which kinds of parameter; one more for Muon's."""
        lines = [_describe("weight decay", self.decayed), _describe("no weight decay", self.not_decayed)]
        muon = {name: p for name, p in self.decayed.items() if _by_muon(role(name, p), train)}
        return [*lines, _describe("Muon", muon)] if muon else lines


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """Split the trainable parameters: tensors of two or more dimensions decay, but never A or a state."""
    groups = ParameterGroups({}, {})
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and name.rpartition(".")[2] not in NEVER_DECAYED
        (groups.decayed if decays else groups.not_decayed)[name] = parameter
    return groups


def role(name: str, parameter: Tensor) -> Role:
    """What a parameter of this name is: the field of `LearningRateRatios` that applies to it."""
    for pattern, found in _ROLES:
        if fnmatchcase(f".{name}", pattern):
            return found
    if parameter.ndim < 2:
        return "other"
    return "experts" if parameter.ndim == 3 else "matrices"


def build_optimizer(groups: ParameterGroups, train: TrainConfig, ops: Ops | None = None) -> torch.optim.AdamW:
    """AdamW or Muon over the groups; `set_learning_rate` sets the rate at each step.

    ops: of the model; None is the fastest backend of the device.
    """
    collected: dict[tuple[float, float, int, float], list[nn.Parameter]] = {}
    for decay, parameters in ((train.weight_decay, groups.decayed), (0.0, groups.not_decayed)):
        for name, parameter in parameters.items():
            kind = role(name, parameter)
            ratio: float = getattr(train.learning_rate_ratios, kind)
            own = train.muon_expert_momentum if kind == "experts" else None
            key = (decay, ratio, _parts(name) if _by_muon(kind, train) else 0, own or train.muon_momentum)
            collected.setdefault(key, []).append(parameter)
    options: list[dict[str, Any]] = [
        {"params": parameters, "weight_decay": decay, "ratio": ratio, "parts": parts, "momentum": momentum}
        for (decay, ratio, parts, momentum), parameters in collected.items()
    ]
    betas = (train.beta1, train.beta2)
    if train.optimizer == "adamw":
        optimizer = AdamW(
            options,
            lr=train.learning_rate,
            betas=betas,
            eps=train.adam_eps,
            update=(ops or _fastest(groups)).adamw_step,
            narrow=_narrow(groups, train),
        )
    else:
        optimizer = Muon(
            options,
            lr=train.learning_rate,
            betas=betas,
            eps=train.adam_eps,
            iteration=ITERATIONS[train.muon_iteration],
            update=(ops or _fastest(groups)).muon_step,
        )
    set_learning_rate(optimizer, train.learning_rate)
    _make_capturable(optimizer)
    return optimizer


def _make_capturable(optimizer: torch.optim.Optimizer) -> None:
    """On a GPU, put each group's learning rate there, so that a captured step can be told another one."""
    for group in optimizer.param_groups:
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        if device.type == "cuda":
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32, device=device)
            group["capturable"] = True
    # torch would warn of steps that are not captured
    optimizer._warned_capturable_if_run_uncaptured = True  # pyright: ignore[reportPrivateUsage]


def clip(parameters: Iterable[nn.Parameter], optimizer: torch.optim.Optimizer, most: float) -> Tensor:
    """The gradients' global norm; the next step takes them scaled down to a norm of `most` at most.

    AdamW on a GPU scales them while it reads them, which saves a pass over all gradients.
    """
    owners = [parameter for parameter in parameters if parameter.grad is not None]
    norm = _total_norm([p.grad for p in owners if p.grad is not None])
    if type(optimizer) is AdamW and norm.is_cuda:
        # its interface for gradients that are scaled, which torch's stubs do not know
        optimizer.grad_scale = ((norm + _EPS) / most).clamp(min=1)  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.found_inf = torch.zeros_like(norm)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        nn.utils.clip_grads_with_norm_(owners, most, norm)
    return norm


def _total_norm(gradients: list[Tensor]) -> Tensor:
    """The norm of all gradients, added up in float32 or wider whatever they are in."""
    narrow = [gradient for gradient in gradients if gradient.dtype == torch.bfloat16]
    if not narrow:
        return nn.utils.get_total_norm(gradients)
    rest = [gradient for gradient in gradients if gradient.dtype != torch.bfloat16]
    norms = torch._foreach_norm(narrow, 2, dtype=torch.float32)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    parts = [*norms, nn.utils.get_total_norm(rest)]
    return nn.utils.get_total_norm(parts)


@contextmanager
def narrow_gradients(optimizer: torch.optim.Optimizer) -> Generator[None]:
    """Inside, the gradients of `optimizer`'s narrow parameters stay in bfloat16 where they are made so.

    It saves a pass that widens them and half of what the norm and the update read. Afterwards they have no
    gradient, and later ones are of their own dtype again.
    """
    narrow = [p for p in optimizer.narrow if p.grad is None] if type(optimizer) is AdamW else []
    for parameter in narrow:
        parameter.grad_dtype = torch.bfloat16
    try:
        yield
    finally:
        for parameter in narrow:
            parameter.grad = None
            parameter.grad_dtype = parameter.dtype


def _narrow(groups: ParameterGroups, train: TrainConfig) -> list[nn.Parameter]:
    """Large banks of experts, where they are computed in bfloat16 and a step adds nothing to a gradient."""
    if train.precision != "bfloat16" or train.micro_batch_size is not None or train.tbptt is not None:
        return []
    return [p for name, p in groups.decayed.items() if role(name, p) == "experts" and is_large(p)]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Give every group `rate` times its ratio; into the tensor that holds it, where there is one."""
    for group in optimizer.param_groups:
        value = rate * group.get("ratio", 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, "exp_avg:layers.0..." and so on."""
    return {
        f"{key}:{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave. Raises ValueError for the tensors of another model."""
    keys = {
        parameter: _STATE["muon" if group["parts"] else "adamw"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    slots = {
        f"{key}:{name}": (parameter, key)
        for name, parameter in model.named_parameters()
        for key in keys.get(parameter, ())
    }
    if wrong := sorted(slots.keys() ^ tensors.keys()):
        raise ValueError(
            f"the optimiser's state is of another model or optimiser: {wrong[0]} is missing or unexpected"
        )
    for name, (parameter, key) in slots.items():
        shape = () if key == "step" else parameter.shape
        if tensors[name].shape != shape:
            raise ValueError(
                f"the optimiser's state is of another model: {name} has shape {tuple(tensors[name].shape)} "
                f"instead of {tuple(shape)}"
            )
        optimizer.state[parameter][key] = tensors[name]


def _fastest(groups: ParameterGroups) -> Ops:
    cuda = any(parameter.is_cuda for parameter in groups.decayed.values())
    return load("auto", "cuda" if cuda else "cpu")


def _by_muon(kind: Role, train: TrainConfig) -> bool:
    """The router's rows compete as the head's do, so that it is AdamW's as well."""
    return train.optimizer == "muon" and (kind == "matrices" or (kind == "experts" and train.muon_experts))


def _parts(name: str) -> int:
    return _FUSED.get(".".join(name.split(".")[-2:]), 1)


def _describe(title: str, group: dict[str, nn.Parameter]) -> str:
    kinds: dict[str, int] = {}
    for name, parameter in group.items():
        kind = ".".join(part for part in name.split(".")[-2:] if not part.isdigit())
        kinds[kind] = kinds.get(kind, 0) + parameter.numel()
    total = sum(kinds.values())
    listed = ", ".join(
        f"{kind} {count:,}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1])
    )
    return f"{title}: {total:,} values in {len(group)} tensors ({listed})"
