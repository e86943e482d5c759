import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ssmoe.config.train import TrainConfig
from ssmoe.data.loader import Cursor
from ssmoe.data.tokenizer import ByteTokenizer
from ssmoe.model.build import build
from ssmoe.model.weights import save_weights
from ssmoe.training import checkpoint as module
from ssmoe.training.checkpoint import (
    Progress,
    find_weights,
    latest_checkpoint,
    list_checkpoints,
    load,
    restore_checkpoint,
    restore_state,
    save_checkpoint,
    start_from,
)
from ssmoe.training.optimizer import build_optimizer, optimizer_tensors, parameter_groups
from tests.model.zoo import small


def make(seed=0, **changes):
    model = build(small("moe-mamba", **{"vocab_size": 257, **changes}), seed=seed)
    return model, build_optimizer(parameter_groups(model), TrainConfig())


def save(folder, step, *, seed=0, keep=2):
    model, optimizer = make(seed)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    progress = Progress(step, 100 * step, Cursor(4 * step), 1.5)
    save_checkpoint(folder, model, ByteTokenizer(), optimizer, progress, keep=keep)
    return model, optimizer, progress


def test_everything_comes_back(tmp_path):
    model, optimizer, progress = save(tmp_path, 3)
    random = torch.get_rng_state()
    torch.rand(5)
    other, fresh = make(seed=1)
    assert restore_checkpoint(tmp_path / "checkpoints" / "step-3", other, fresh) == progress
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
    wanted, found = optimizer_tensors(optimizer, model), optimizer_tensors(fresh, other)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_only_the_newest_are_kept_and_told_apart_by_number(tmp_path):
    for step in (8, 9, 10):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-9-mine").mkdir()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-9", "step-10"]
    assert latest_checkpoint(tmp_path).name == "step-10"


def test_a_step_that_is_there_already_is_replaced(tmp_path):
    save(tmp_path, 3)
    model, *_ = save(tmp_path, 3, seed=1)
    assert torch.equal(load(tmp_path)[0].embedding.weight, model.embedding.weight)


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed, fsync, replace, waiting = set(), os.fsync, os.replace, []

    def note(handle):
        flushed.add(os.fstat(handle).st_ino)
        fsync(handle)

    def look(source, target):
        waiting.extend(path for path in Path(source).rglob("*") if path.stat().st_ino not in flushed)
        replace(source, target)

    monkeypatch.setattr(module.os, "fsync", note)
    monkeypatch.setattr(module.os, "replace", look)
    save(tmp_path, 1, keep=1)
    assert flushed
    assert waiting == []
    assert (tmp_path / "checkpoints").stat().st_ino in flushed


class Killed(BaseException):
    """Nothing in the library catches this, so the disk is left as a kill would leave it."""


@pytest.mark.parametrize("place", ["tokenizer", "optimizer", "rename", "prune"])
def test_a_kill_while_writing_leaves_a_good_checkpoint(tmp_path, monkeypatch, place):
    first, _, _ = save(tmp_path, 1, keep=1)

    def die(*_args, **_kwargs):
        raise Killed

    def die_at_the_old_one(path, **_kwargs):
        if path.name == "step-1":
            (path / "weights" / "model.safetensors").unlink()
            raise Killed

    with monkeypatch.context() as patch:
        match place:
            case "tokenizer":
                patch.setattr(ByteTokenizer, "save", die)
            case "optimizer":
                patch.setattr(module, "optimizer_tensors", die)
            case "rename":
                patch.setattr(module.os, "replace", die)
            case _:
                patch.setattr(module.shutil, "rmtree", die_at_the_old_one)
        with pytest.raises(Killed):
            save(tmp_path, 2, seed=1, keep=1)
    newest = latest_checkpoint(tmp_path)
    assert newest.name == ("step-2" if place == "prune" else "step-1")
    assert restore_checkpoint(newest, *make()).step == int(newest.name[-1])
    if place != "prune":
        loaded, _ = load(tmp_path)
        assert torch.equal(loaded.embedding.weight, first.embedding.weight)
    save(tmp_path, 3, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-3"]


def test_the_folder_that_is_meant(tmp_path):
    save(tmp_path, 1)
    step = tmp_path / "checkpoints" / "step-1"
    assert {find_weights(path) for path in (tmp_path, step, step / "weights")} == {step / "weights"}
    shutil.copytree(step / "weights", tmp_path / "alone")
    model, tokenizer = load(tmp_path / "alone")
    assert not model.training
    assert tokenizer.vocab_size == 257


@pytest.mark.parametrize(
    ("name", "message"),
    [("nowhere", "no such folder"), ("empty", "holds no checkpoint"), ("file", "no such")],
)
def test_no_weights(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match=message):
        find_weights(tmp_path / name)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "progress.json"])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_damaged_trainer_files_name_the_remedy(tmp_path, name, damage):
    save(tmp_path, 1)
    path = tmp_path / "checkpoints" / "step-1" / "trainer" / name
    path.unlink() if damage == "gone" else path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"trainer is damaged .* remove .*step-1 to resume"):
        restore_checkpoint(tmp_path / "checkpoints" / "step-1", *make())


def test_a_checkpoint_of_another_model_is_refused_and_nothing_is_loaded(tmp_path):
    save(tmp_path, 1)
    model, optimizer = make(d_model=32)
    before = model.embedding.weight.detach().clone()
    with pytest.raises(ValueError, match="of another model than the run"):
        restore_checkpoint(tmp_path / "checkpoints" / "step-1", model, optimizer)
    assert torch.equal(model.embedding.weight, before)


@pytest.mark.parametrize("damage", ["missing", "shape", "extra", "cut"])
def test_weights_that_do_not_fit_are_refused(tmp_path, damage):
    save(tmp_path, 1)
    path = find_weights(tmp_path) / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    match damage:
        case "missing":
            del tensors["layers.0.layer.ssm.A_log"]
        case "shape":
            tensors["embedding.weight"] = tensors["embedding.weight"][:, :-1].contiguous()
        case "extra":
            tensors["layers.9.layer.up.weight"] = torch.zeros(2, 2)
        case _:
            path.write_bytes(path.read_bytes()[:-30])
    if damage != "cut":
        safetensors.torch.save_file(tensors, path)
    words = {"missing": "A_log is missing", "shape": "has shape", "extra": "unexpected", "cut": "damaged"}
    with pytest.raises(ValueError, match=words[damage]):
        load(tmp_path)


def test_a_tokenizer_with_ids_past_the_vocabulary_is_refused(tmp_path):
    save(tmp_path, 1)
    path = find_weights(tmp_path) / "config.json"
    content = json.loads(path.read_text())
    content["model"]["vocab_size"] = 200
    path.write_text(json.dumps(content))
    tensors = safetensors.torch.load_file(path.with_name("model.safetensors"))
    tensors["embedding.weight"] = tensors["embedding.weight"][:200].contiguous()
    safetensors.torch.save_file(tensors, path.with_name("model.safetensors"))
    with pytest.raises(ValueError, match=r"tokenizer of 257 tokens and a model of 200: put back"):
        load(tmp_path)


def test_the_carried_state_comes_back_or_is_named(tmp_path):
    model, optimizer = make()
    state = model(torch.tensor([[1, 2, 3], [4, 5, 6]])).state
    progress = Progress(1, 6, Cursor(2), 0.1)
    save_checkpoint(tmp_path, model, ByteTokenizer(), optimizer, progress, keep=1, state=state)
    checkpoint = latest_checkpoint(tmp_path)
    found = restore_state(checkpoint, model, 2)
    for one, other in zip(found, state, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    with pytest.raises(ValueError, match="has shape"):
        restore_state(checkpoint, model, 3)
    path = checkpoint / "trainer" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"damaged .* remove .*step-1 to resume"):
        restore_state(checkpoint, model, 2)


@pytest.mark.parametrize("name", ["moe-fine", "inner-moe"])
@pytest.mark.parametrize("saved", ["bias", "none"])
def test_a_balancing_bias_on_one_side_alone_is_no_hindrance(tmp_path, name, saved):
    pattern = [layer.model_dump() for layer in small(name).pattern]
    models = {}
    for balance in ("bias", "none"):
        for layer in pattern:
            layer.update({"balance": balance} if "balance" in layer else {})
        models[balance] = build(small(name, pattern=pattern), seed=len(models))
    asked = models["none" if saved == "bias" else "bias"]
    save_weights(models[saved], tmp_path)
    start_from(asked, str(tmp_path))
    found = asked.state_dict()
    for key, tensor in models[saved].named_parameters():
        assert torch.equal(found[key], tensor)
    assert all(not bool(bias.any()) for bias in asked.buffers())


def test_damaged_weights_are_no_start(tmp_path):
    model, _ = make()
    save_weights(model, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged"):
        start_from(model, str(tmp_path))
