"""Whole Mamba models of PyPI packages with the weights of ours, for the end-to-end benchmark on the CPU.

mambapy's Mamba between an embedding and a head (its own LM class cannot be imported without mamba_ssm;
bfloat16: autocast, since its parameters must stay float32), and transformers' MambaForCausalLM:
its slow path (prefill only: its backward is quadratic in length), its use_mambapy path, and its associative
scan compiled as a whole (minutes, once). For prefill also llama.cpp, where llama-cpp-python is installed.
"""

import contextlib
import ctypes
import tempfile
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmoe.interop.checkpoint import ours
from ssmoe.model.lm import LM

Logits = Callable[[Tensor, bool], Tensor]
"""(ids (b, l), last) -> logits (b, l, vocab), or (b, 1, vocab) of the last position."""


def versions() -> str:
    """The exact versions of what was measured."""
    return ", ".join(
        f"{name} {_version(name)}" for name in ("torch", "mambapy", "transformers", "llama_cpp_python")
    )


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


def llama_model(model: LM, dtype: torch.dtype) -> Logits | None:
    """llama.cpp on the same weights as a GGUF file, matrices in `dtype`; None where it is not installed."""
    try:
        import llama_cpp as cpp
        from decode_peers import write_gguf

        folder = tempfile.TemporaryDirectory()
        path = Path(folder.name) / "model.gguf"
        write_gguf(model, path, bfloat16=dtype == torch.bfloat16)
    except ModuleNotFoundError:
        return None
    silent: Any = cpp.llama_log_callback(lambda level, text, data: None)  # noqa: ARG005
    cpp.llama_log_set(silent, ctypes.c_void_p(0))
    cpp.llama_backend_init()
    options = cpp.llama_model_default_params()
    options.use_mmap = False
    loaded = cpp.llama_model_load_from_file(str(path).encode(), options)
    folder.cleanup()
    settings = cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 512
    settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
    context = cpp.llama_init_from_model(loaded, settings)

    def logits(ids: Tensor, last: bool) -> Tensor:
        del silent_kept[1:]
        assert last, "only the last position's logits are asked of llama.cpp"
        cpp.llama_memory_clear(cpp.llama_get_memory(context), True)
        tokens = (ctypes.c_int32 * ids.numel())(*ids.flatten().tolist())
        if cpp.llama_decode(context, cpp.llama_batch_get_one(tokens, ids.numel())):
            raise RuntimeError("llama_decode failed")
        row = np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, -1), shape=(model.config.vocab_size,))
        return torch.from_numpy(row.copy()).view(1, 1, -1)

    silent_kept = [silent]
    return logits


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
