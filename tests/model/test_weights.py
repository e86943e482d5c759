"""The checkpoint folder: round trip, and every way in which files do not belong together."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ssmoe.model.build import build
from ssmoe.model.weights import load_weights, save_weights
from tests.model.zoo import small

IDS = torch.randint(61, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_weights(build(small("moe-mamba"), seed=5), tmp_path)
    return tmp_path


def test_a_round_trip_is_bitwise(folder: Path) -> None:
    model, loaded = build(small("moe-mamba"), seed=5), load_weights(folder)
    assert loaded.config == model.config
    assert not loaded.training
    for (name, a), b in zip(model.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert b.requires_grad
    assert torch.equal(loaded(IDS).logits, model.eval()(IDS).logits)


def test_nothing_but_tensors_and_json_is_written(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def change(folder: Path, edit: str) -> None:
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    match edit:
        case "missing":
            del tensors["layers.1.layer.experts.up"]
        case "extra":
            tensors["layers.9.norm.weight"] = torch.ones(3)
        case _:
            tensors["layers.0.norm.weight"] = torch.ones(3)
    safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("missing", r"layers\.1\.layer\.experts\.up is missing"),
        ("extra", r"layers\.9\.norm\.weight is unexpected"),
        ("shape", r"layers\.0\.norm\.weight has shape \(3,\) instead of \(16,\)"),
    ],
)
def test_another_models_tensors_are_named(folder: Path, edit: str, message: str) -> None:
    change(folder, edit)
    with pytest.raises(ValueError, match=message):
        load_weights(folder)


def test_a_truncated_file_is_damaged(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="is damaged"):
        load_weights(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {name}"):
        load_weights(folder)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 1}', '{"format": 99, "model": {}}', '{"format": 1, "model": {"d": 1}}']
)
def test_another_configuration_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_weights(folder)


def test_the_configuration_is_readable(folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    assert content["model"]["pattern"][0]["kind"] == "mamba"


def test_loaded_tensors_lie_where_torch_puts_its_own(tmp_path) -> None:
    """A safetensors file does not, and float32 matrix products then differ in the last bit."""
    save_weights(build(small("hybrid")), tmp_path)
    loaded = load_weights(tmp_path)
    assert all(parameter.data_ptr() % 64 == 0 for parameter in loaded.parameters())


@pytest.mark.parametrize("name", ["hybrid", "moe-fine", "rom", "inner-moe", "s4d"])
@torch.no_grad()
def test_what_is_cast_at_every_use_is_held_in_the_compute_dtype_and_nothing_else(tmp_path, name: str) -> None:
    config = small(name, norm="layernorm", tied_embeddings=False, head_bias=True)
    model = build(config, seed=5, dtype=torch.bfloat16).eval()
    save_weights(model, tmp_path)
    loaded = load_weights(tmp_path, dtype=torch.bfloat16)
    expected = model(IDS).logits
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=0, atol=0.02 * float(expected.abs().max()))
    wide = {key for key, tensor in loaded.state_dict().items() if tensor.dtype == torch.float32}
    kept = ("norm.", ".conv.", ".ssm.", ".router.", ".routers.")
    assert wide == {key for key in loaded.state_dict() if any(part in f".{key}" for part in kept)}


def test_a_value_that_is_none_is_named(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"d_model": 16', '"d_model": -1'))
    with pytest.raises(ValueError, match=r"d_model: Input should be greater than 0 \(got -1\)"):
        load_weights(folder)
