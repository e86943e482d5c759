"""Checkpoints of other libraries: every tensor used or named, logits as theirs, nothing executed."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ssmoe.config.model import MambaConfig
from ssmoe.data.tokenizer import ByteTokenizer
from ssmoe.interop import checkpoint
from ssmoe.interop.checkpoint import import_checkpoint, read_checkpoint
from ssmoe.model.build import build
from ssmoe.model.weights import load_weights
from ssmoe.training.checkpoint import load
from tests.model.zoo import small

NAMES = {ours: theirs for theirs, ours in checkpoint._MIXER.items()}


def official(folder: Path, *, container: str = "bin", dtype=torch.float32, rows: int = 64, **changes):
    """A small model written as the official package writes it; returns the model."""
    model = build(small("mamba", vocab_size=rows), seed=2).eval()
    folder.mkdir()
    tensors = {"backbone.embedding.weight": model.embedding.weight, "lm_head.weight": model.embedding.weight}
    tensors["backbone.norm_f.weight"] = model.norm.weight
    for i, layer in enumerate(model.layers):
        tensors[f"backbone.layers.{i}.norm.weight"] = layer.norm.weight
        for name, tensor in layer.layer.named_parameters():
            tensor = tensor.unsqueeze(1) if name == "conv.weight" else tensor
            tensors[f"backbone.layers.{i}.mixer.{NAMES[name]}"] = tensor
    tensors = {name: tensor.detach().to(dtype).clone() for name, tensor in tensors.items()}
    if container == "bin":
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(tensors, folder / "model.safetensors")
    config = {"d_model": 16, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {"d_state": 5}, "rms_norm": True}
    config |= {"residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 8} | changes
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("container", ["bin", "safetensors"])
def test_the_official_layout(tmp_path, container):
    model = official(tmp_path / "a", container=container)
    found = read_checkpoint(tmp_path / "a")
    assert found.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor)


def test_half_precision_becomes_float32(tmp_path):
    official(tmp_path / "a", dtype=torch.bfloat16)
    assert all(p.dtype == torch.float32 for p in read_checkpoint(tmp_path / "a").parameters())


def test_import_writes_a_folder_that_loads(tmp_path):
    theirs = tmp_path / "a"
    model = official(theirs)
    with pytest.raises(ValueError, match="the tokenizer has 257 tokens and the model 64"):
        import_checkpoint(theirs, tmp_path / "out", ByteTokenizer())
    assert not (tmp_path / "out").exists()
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = 64
    import_checkpoint(theirs, tmp_path / "out", tokenizer)
    (tmp_path / "out" / "tokenizer.json").unlink()
    assert torch.equal(load_weights(tmp_path / "out").embedding.weight, model.embedding.weight)
    with pytest.raises(ValueError, match="exists"):
        import_checkpoint(theirs, tmp_path / "out", tokenizer)


def test_missing_and_left_over_tensors_are_named(tmp_path):
    official(tmp_path / "a")
    path = tmp_path / "a" / "pytorch_model.bin"
    tensors = torch.load(path)
    tensors["backbone.layers.1.mixer.surprise"] = tensors.pop("backbone.layers.1.mixer.dt_proj.bias")
    torch.save(tensors, path)
    with pytest.raises(
        ValueError, match=r"layers\.1.*delta_bias is missing; .*mixer\.surprise is unexpected"
    ):
        read_checkpoint(tmp_path / "a")
    tensors["lm_head.weight"] += 1
    torch.save(tensors, path)
    with pytest.raises(ValueError, match="tied, and their weights differ"):
        read_checkpoint(tmp_path / "a")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ssm_cfg": {"layer": "Mamba2"}}, "Mamba2"),
        ({"attn_layer_idx": [1]}, "attention layers"),
        ({"d_intermediate": 5}, "feed-forward layers"),
        ({"ssm_cfg": {"bias": True}}, "our Mamba lacks"),
        ({"ssm_cfg": {"frobnicate": 1}}, "our Mamba lacks"),
        ({"d_model": "wide"}, "not the configuration|d_model"),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path, changes, says):
    official(tmp_path / "a", **changes)
    with pytest.raises(ValueError, match=says):
        read_checkpoint(tmp_path / "a")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the file was executed",))


def test_nothing_in_a_file_executes(tmp_path):
    official(tmp_path / "a")
    torch.save({"backbone.norm_f.weight": Bomb()}, tmp_path / "a" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="damaged or not of weights alone"):
        read_checkpoint(tmp_path / "a")


def test_not_a_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama' cannot be imported"):
        read_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not the configuration"):
        read_checkpoint(tmp_path)


def _widen(value):
    return torch.float64 if value is torch.float32 else value


def _widen_all(values):
    return {name: _widen(value) for name, value in values.items()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@torch.no_grad()
def test_logits_are_those_of_transformers(tmp_path, monkeypatch, tied, dtype):
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which is missing")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=263,
        hidden_size=32,
        num_hidden_layers=3,
        state_size=8,
        time_step_rank=3,
        tie_word_embeddings=tied,
    )
    theirs = transformers.MambaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "a")
    import_checkpoint(tmp_path / "a", tmp_path / "out", ByteTokenizer())
    model, _ = load(tmp_path / "out")
    assert isinstance(model.config.layers[0], MambaConfig)
    ids = torch.randint(263, (2, 37), generator=torch.Generator().manual_seed(1))
    if dtype == torch.float64:
        # their norm and scan round to float32 whatever the model's dtype; lifted, so that 1e-9 can be asked
        to = torch.Tensor.to
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
        monkeypatch.setattr(torch.Tensor, "to", lambda t, *a, **k: to(t, *map(_widen, a), **_widen_all(k)))
    expected = theirs.to(dtype)(ids).logits
    monkeypatch.undo()
    found = model.to(dtype)(ids).logits
    difference = float((found - expected).abs().max())
    print(f"transformers {transformers.__version__} {dtype} tied={tied}: largest difference {difference:.1e}")
    assert difference < (1e-4 if dtype == torch.float32 else 1e-9)
