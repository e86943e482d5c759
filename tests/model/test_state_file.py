"""States as files: whole or refused, bound to the model, nothing lost."""

import json
import pickle

import pytest
import safetensors.torch
import torch

from ssmoe.data.tokenizer import ByteTokenizer
from ssmoe.model import state as states
from ssmoe.model import state_file
from ssmoe.model.build import build
from ssmoe.model.weights import load_weights, save_weights
from tests.model.zoo import PATTERNS, small

IDS = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(0))
NEXT = torch.randint(61, (2, 4), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@torch.no_grad()
def test_a_loaded_state_continues_bit_for_bit(tmp_path, name, dtype) -> None:
    model = build(small(name), dtype=dtype).eval()
    kept = model(IDS).state
    path = tmp_path / "a.safetensors"
    states.save(kept, path, model=model, tokens=9, pending=[[3], [4, 5]])
    found = states.load(path, model=build(small(name), dtype=dtype))
    assert torch.equal(model(NEXT, found.state).logits, model(NEXT, kept).logits)
    for one, other in zip(found.state, kept, strict=True):
        assert type(one) is type(other)
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert found.header.pending == ((3,), (4, 5))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_the_fingerprint_is_of_configuration_and_weights_alone(tmp_path) -> None:
    model = build(small("hybrid"))
    mark = states.fingerprint(model)
    # however the matrices of one file are held
    save_weights(model, tmp_path)
    assert {states.fingerprint(load_weights(tmp_path, dtype=dtype)) for dtype in (None, torch.bfloat16)} == {
        mark
    }
    assert mark == states.fingerprint(build(small("hybrid"), dtype=torch.bfloat16))
    assert mark == states.fingerprint(build(small("hybrid")).double())
    assert mark != states.fingerprint(build(small("hybrid"), seed=1))
    assert mark != states.fingerprint(build(small("hybrid", norm_eps=1e-6)))
    with torch.no_grad():
        model.layers[0].layer.ssm.D[3] += 1e-6
    assert mark != states.fingerprint(model)


class OtherTokenizer:
    fingerprint = "other"


def test_another_model_or_tokenizer_is_refused(tmp_path) -> None:
    model, path = build(small("hybrid")), tmp_path / "a"
    states.save(model.init_state(1), path, model=model, tokenizer=ByteTokenizer())
    with pytest.raises(ValueError, match="state of another model"):
        states.load(path, model=build(small("hybrid"), seed=1))
    with pytest.raises(ValueError, match="another tokenizer"):
        states.load(path, model=model, tokenizer=OtherTokenizer())
    states.load(path, model=model, tokenizer=ByteTokenizer())
    with pytest.raises(FileNotFoundError, match="no such state file"):
        states.load(tmp_path / "b", model=model)
    with pytest.raises(ValueError, match="2 rows with 1 token counts"):
        states.save(model.init_state(2), path, model=model, tokens=[3])


def test_damage_at_any_place_is_seen(tmp_path) -> None:
    model, path = build(small("hybrid", repeat=1)), tmp_path / "a"
    states.save(model(IDS).state, path, model=model, tokens=9)
    good = path.read_bytes()
    for keep in (0, 7, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:keep])
        with pytest.raises(ValueError, match="damaged"):
            states.load(path, model=model)
    for place in range(9, len(good), 97):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged|no state file|format version|another"):
            states.load(path, model=model)


def test_an_honest_looking_file_of_other_contents_is_refused(tmp_path) -> None:
    model, path = build(small("hybrid", repeat=1)), tmp_path / "a"
    states.save(model(IDS).state, path, model=model, tokens=9)
    header, tensors = state_file.read(path)

    def write(*, name: str = "ssmoe-state", version: int = 1) -> None:
        about = {"version": version, "header": header._asdict()}
        about["checksum"] = state_file._checksum(header._asdict(), tensors)
        safetensors.torch.save_file(tensors, path, metadata={name: json.dumps(about)})

    write()
    states.load(path, model=model)
    write(version=2)
    with pytest.raises(ValueError, match="version 2 and this version reads 1"):
        states.load(path, model=model)
    write(name="pt")
    with pytest.raises(ValueError, match="no state file"):
        states.load(path, model=model)
    ssm = tensors["layers.0.ssm"]
    tensors["layers.0.ssm"] = ssm[:, :1].contiguous()
    write()
    with pytest.raises(ValueError, match="ssm has shape"):
        states.load(path, model=model)
    del tensors["layers.0.ssm"]
    write()
    with pytest.raises(ValueError, match=r"layers\.0\.ssm is on one side only"):
        states.load(path, model=model)


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("the file was executed",))


def test_nothing_in_a_file_executes(tmp_path) -> None:
    path = tmp_path / "a"
    for write in (lambda: path.write_bytes(pickle.dumps(Bomb())), lambda: torch.save(Bomb(), path)):
        write()
        with pytest.raises(ValueError, match="damaged or no state file"):
            states.load(path, model=build(small("mamba")))


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path, monkeypatch) -> None:
    model, path = build(small("mamba")), tmp_path / "a"
    states.save(model.init_state(1), path, model=model)
    before = path.read_bytes()

    def die(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(state_file.os, "replace", die)
    with pytest.raises(OSError, match="disk full"):
        states.save(model(IDS).state, path, model=model)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


def test_a_folder_that_is_not_there_is_named(tmp_path) -> None:
    model = build(small("mamba"))
    with pytest.raises(FileNotFoundError, match=r"a\.safetensors: its folder does not exist; make it first"):
        states.save(model.init_state(1), tmp_path / "none" / "a.safetensors", model=model)


def test_extra_tensors_travel_along(tmp_path) -> None:
    model, path = build(small("mamba")), tmp_path / "a"
    extra = {"delta.0": torch.arange(3.0)}
    states.save(model.init_state(1), path, model=model, extra=extra, note="task")
    found = states.load(path, model=model)
    assert torch.equal(found.extra["delta.0"], extra["delta.0"])
    assert found.header.note == "task"
