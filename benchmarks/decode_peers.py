"""Peers of the decoding benchmark: llama.cpp with the very same weights as a GGUF file, and transformers."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssmoe.model.lm import LM
from ssmoe.model.mixers.mamba import Mamba

_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)

Step = Callable[[list[int]], list[int]]
"""One token of each row to the next of each row, greedily."""


def write_gguf(model: LM, path: Path, *, bfloat16: bool) -> None:
    """`model`, a float32 stack of plain Mamba layers, as llama.cpp reads it."""
    import gguf

    mixers = [layer.get_submodule("layer") for layer in model.layers]
    first = mixers[0]
    assert isinstance(first, Mamba)
    writer = gguf.GGUFWriter(str(path), "mamba")
    writer.add_vocab_size(model.config.vocab_size)
    writer.add_context_length(2048)
    writer.add_embedding_length(model.config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(len(mixers))
    writer.add_ssm_conv_kernel(first.d_conv)
    writer.add_ssm_inner_size(first.d_inner)
    writer.add_ssm_state_size(first.d_state)
    writer.add_ssm_time_step_rank(first.dt_rank)
    writer.add_layer_norm_rms_eps(model.config.norm_eps)
    writer.add_tokenizer_model("no_vocab")

    def add(name: str, tensor: torch.Tensor, *, matrix: bool = False) -> None:
        values = tensor.detach().float().contiguous()
        if matrix and bfloat16:
            bits = values.bfloat16().view(torch.uint16).numpy()
            kind = gguf.GGMLQuantizationType.BF16
            shape = (*bits.shape[:-1], bits.shape[-1] * 2)
            writer.add_tensor(name, bits.view(np.uint8).reshape(shape), raw_dtype=kind)
        else:
            writer.add_tensor(name, values.numpy())

    add("token_embd.weight", model.embedding.weight, matrix=True)
    add("output_norm.weight", model.get_submodule("norm").get_parameter("weight"))
    for i, (layer, mixer) in enumerate(zip(model.layers, mixers, strict=True)):
        assert isinstance(mixer, Mamba)
        A, D, delta_bias = mixer.ssm()
        add(f"blk.{i}.attn_norm.weight", layer.get_submodule("norm").get_parameter("weight"))
        add(f"blk.{i}.ssm_in.weight", mixer.in_proj.weight, matrix=True)
        add(f"blk.{i}.ssm_conv1d.weight", mixer.conv.weight)
        add(f"blk.{i}.ssm_conv1d.bias", mixer.conv.bias)
        add(f"blk.{i}.ssm_x.weight", mixer.x_proj.weight, matrix=True)
        add(f"blk.{i}.ssm_dt.weight", mixer.delta_proj.weight, matrix=True)
        add(f"blk.{i}.ssm_dt.bias", delta_bias)
        add(f"blk.{i}.ssm_a", A)
        add(f"blk.{i}.ssm_d", D)
        add(f"blk.{i}.ssm_out.weight", mixer.out_proj.weight, matrix=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama(path: Path, rows: int, threads: int) -> tuple[Step, Callable[[], np.ndarray]]:
    """A step of llama.cpp on a GGUF file, and its latest logits (rows, vocab)."""
    import llama_cpp as cpp

    cpp.llama_log_set(_SILENT, ctypes.c_void_p(0))
    cpp.llama_backend_init()
    options = cpp.llama_model_default_params()
    # memory of its own instead of the file's pages, so that huge pages can reach it as they reach the others
    options.use_mmap = False
    model = cpp.llama_model_load_from_file(str(path).encode(), options)
    settings = cpp.llama_context_default_params()
    settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = 2048, 64, 64, rows
    settings.n_threads = settings.n_threads_batch = threads
    context = cpp.llama_init_from_model(model, settings)
    vocab = cpp.llama_vocab_n_tokens(cpp.llama_model_get_vocab(model))
    batch = cpp.llama_batch_init(rows, 0, 1)
    batch.n_tokens = rows
    position = 0

    def logits() -> np.ndarray:
        return np.stack(
            [np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, i), shape=(vocab,)) for i in range(rows)]
        )

    def step(tokens: list[int]) -> list[int]:
        nonlocal position
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, i
        position += 1
        if cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        return [
            int(np.ctypeslib.as_array(cpp.llama_get_logits_ith(context, i), shape=(vocab,)).argmax())
            for i in range(rows)
        ]

    return step, logits


def transformers(config: Any, dtype: torch.dtype) -> Step:
    """A step of transformers' MambaForCausalLM of that shape, with random weights."""
    from transformers import MambaConfig, MambaForCausalLM

    mamba = config.layers[0]
    peer = MambaForCausalLM(
        MambaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.d_model,
            num_hidden_layers=len(config.layers),
            state_size=mamba.d_state,
        )
    )
    peer = peer.to(dtype).eval()
    cache: Any = None

    @torch.no_grad()
    def step(tokens: list[int]) -> list[int]:
        nonlocal cache
        out = peer(torch.tensor(tokens).unsqueeze(1), cache_params=cache, use_cache=True)
        cache = out.cache_params
        return [int(token) for token in out.logits[:, -1].argmax(-1)]

    return step
