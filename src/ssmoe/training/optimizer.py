"""AdamW with explicit parameter groups: matrices decay, everything else does not."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ssmoe.config.train import TrainConfig

NEVER_DECAYED = ("A_log", "A_imaginary", "D", "delta_bias", "initial_state")
_EPS = 1e-6
"""What torch adds to a norm that it divides by."""
_STATE = ("step", "exp_avg", "exp_avg_sq")


class ParameterGroups(NamedTuple):
    """Named parameters by weight decay."""

    decayed: dict[str, nn.Parameter]
    not_decayed: dict[str, nn.Parameter]

    def describe(self) -> list[str]:
        """A line a group: how many tensors and values, and which kinds of parameter."""
        return [_describe("weight decay", self.decayed), _describe("no weight decay", self.not_decayed)]


def parameter_groups(model: nn.Module) -> ParameterGroups:
    """Split the trainable parameters: tensors of two or more dimensions decay, but never A or a state."""
    groups = ParameterGroups({}, {})
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and name.rpartition(".")[2] not in NEVER_DECAYED
        (groups.decayed if decays else groups.not_decayed)[name] = parameter
    return groups


def build_optimizer(groups: ParameterGroups, train: TrainConfig) -> torch.optim.AdamW:
    """AdamW over the groups; `set_learning_rate` gives it the schedule's rate at each step."""
    optimizer = torch.optim.AdamW(
        [
            {"params": list(groups.decayed.values()), "weight_decay": train.weight_decay},
            {"params": list(groups.not_decayed.values()), "weight_decay": 0.0},
        ],
        lr=train.learning_rate,
        betas=(train.beta1, train.beta2),
        eps=train.adam_eps,
        fused=True,
    )
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

    torch's AdamW on a GPU scales them while it reads them, which saves a pass over all gradients.
    """
    owners = [parameter for parameter in parameters if parameter.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in owners if p.grad is not None])
    if type(optimizer) is torch.optim.AdamW and norm.is_cuda:
        # its interface for gradients that are scaled, which torch's stubs do not know
        optimizer.grad_scale = ((norm + _EPS) / most).clamp(min=1)  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.found_inf = torch.zeros_like(norm)  # pyright: ignore[reportAttributeAccessIssue]
    else:
        nn.utils.clip_grads_with_norm_(owners, most, norm)
    return norm


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next step; into the tensor that holds it, where there is one."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def optimizer_tensors(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, "exp_avg:layers.0..." and so on."""
    return {
        f"{key}:{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave. Raises ValueError for the tensors of another model."""
    slots = {
        f"{key}:{name}": (parameter, key)
        for name, parameter in model.named_parameters()
        for key in _STATE
        if parameter.requires_grad
    }
    if wrong := sorted(slots.keys() ^ tensors.keys()):
        raise ValueError(f"the optimiser's state is of another model: {wrong[0]} is missing or unexpected")
    for name, (parameter, key) in slots.items():
        shape = () if key == "step" else parameter.shape
        if tensors[name].shape != shape:
            raise ValueError(
                f"the optimiser's state is of another model: {name} has shape {tuple(tensors[name].shape)} "
                f"instead of {tuple(shape)}"
            )
        optimizer.state[parameter][key] = tensors[name]


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
