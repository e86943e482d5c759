"""Whole Mamba models of PyPI packages with the weights of ours, for the end-to-end benchmark on the CPU.

mambapy's Mamba between an embedding and a head (its own LM class cannot be imported without mamba_ssm;
bfloat16: autocast, since its parameters must stay float32), and transformers' MambaForCausalLM:
its slow path (prefill only: its backward is quadratic in length), its use_mambapy path, and its associative
scan compiled as a whole (minutes, once).
"""

import contextlib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmoe.interop.checkpoint import ours
from ssmoe.model.lm import LM

Logits = Callable[[Tensor, bool], Tensor]
"""(ids (b, l), last) -> logits (b, l, vocab), or (b, 1, vocab) of the last position."""


def versions() -> str:
    """The exact versions of what was measured."""
    return ", ".join(f"{name} {_version(name)}" for name in ("torch", "mambapy", "transformers"))


def loss_of(logits: Logits) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean cross-entropy of a model's logits, as its users compute it."""

    def loss(ids: Tensor, targets: Tensor) -> Tensor:
        scores = logits(ids, False)
        return F.cross_entropy(scores.flatten(0, 1).float(), targets.flatten())

    return loss


def mambapy_model(model: LM, dtype: torch.dtype) -> tuple[nn.Module, Logits]:
    from mambapy.mamba import Mamba, MambaConfig, RMSNorm

    d_model, vocab = model.config.d_model, model.config.vocab_size
    peer = nn.ModuleDict(
        {
            "embedding": nn.Embedding(vocab, d_model),
            "mamba": Mamba(MambaConfig(d_model=d_model, n_layers=len(model.layers))),
            "norm_f": RMSNorm(d_model),
            "lm_head": nn.Linear(d_model, vocab, bias=False),
        }
    )
    _copy(model, peer, lambda name: ours(name if name.startswith("lm_head") else _in_backbone(name)))

    def logits(ids: Tensor, last: bool) -> Tensor:
        with _autocast(dtype):
            hidden = peer["norm_f"](peer["mamba"](peer["embedding"](ids)))
            return peer["lm_head"](hidden[:, -1:] if last else hidden)

    return peer, logits


def transformers_model(model: LM, dtype: torch.dtype, *, scan: str, train: bool) -> tuple[nn.Module, Logits]:
    """scan: "slow", "mambapy" or "compiled". bfloat16: autocast in training, bfloat16 weights otherwise."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=model.config.vocab_size,
        hidden_size=model.config.d_model,
        num_hidden_layers=len(model.layers),
        tie_word_embeddings=model.head is None,
        use_mambapy=scan == "mambapy",
        use_associative_scan=scan == "compiled",
        use_cache=False,
    )
    peer = MambaForCausalLM(config)
    _copy(model, peer, ours)
    peer.train(train)
    if not train:
        peer.to(dtype)
    run = torch.compile(peer) if scan == "compiled" else peer

    def logits(ids: Tensor, last: bool) -> Tensor:
        with _autocast(dtype) if train else contextlib.nullcontext():
            return run(ids, logits_to_keep=1 if last else 0).logits

    return peer, logits


def _in_backbone(name: str) -> str:
    return "backbone." + name.removeprefix("mamba.")


def _autocast(dtype: torch.dtype) -> contextlib.AbstractContextManager[object]:
    return torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()


def _copy(model: LM, peer: nn.Module, name_of: Callable[[str], str]) -> None:
    """Give `peer` the weights of `model`; every one of its parameters must have a counterpart."""
    own = dict(model.named_parameters())
    own.setdefault("head.weight", own["embedding.weight"])
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter.copy_(own[name_of(name)].reshape(parameter.shape))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
