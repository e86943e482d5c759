import json
import os
import shutil
from itertools import pairwise

import pytest
import torch

from ssmoe.data.prepare import prepare
from ssmoe.ops import extension
from ssmoe.training import loop as module
from ssmoe.training.checkpoint import find_weights, list_checkpoints, load
from ssmoe.training.console import Silent
from ssmoe.training.folder import lock_folder
from ssmoe.training.loop import Diverged, train
from ssmoe.training.metrics import TIMES, read_metrics
from ssmoe.training.schedule import learning_rate


def evaluate(model):
    """Some figure that changes with the weights."""
    value = float(model.embedding.weight.detach().double().sum())
    return {"held_out_loss": value, "held_out_bits_per_byte": value}


def steady(folder):
    """The metrics without what may differ between two runs."""
    records = read_metrics(folder)
    return [{key: value for key, value in r.items() if key not in TIMES} for r in records]


def weights(folder):
    return load(folder)[0].state_dict()


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_lines_checkpoints_and_falling_loss(tiny_run, tmp_path):
    run, folder = (
        tiny_run("train.steps=30", "train.eval_every=7", "train.checkpoint_every=11"),
        tmp_path / "r",
    )
    assert train(run, folder, prepare(run.data), evaluate=evaluate)
    records = read_metrics(folder)
    assert [r["step"] for r in records if r["mode"] == "train"] == list(range(1, 31))
    assert [r["step"] for r in records if r["mode"] == "eval"] == [7, 14, 21, 28, 30]
    assert [path.name for path in list_checkpoints(folder)] == ["step-22", "step-30"]
    losses = [r["lm_loss"] for r in records if r["mode"] == "train"]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert [r["tokens"] for r in records if r["mode"] == "train"] == [step * 4 * 32 for step in range(1, 31)]
    rates = [r["learning_rate"] for r in records if r["mode"] == "train"]
    assert rates == [learning_rate(run.train, step) for step in range(30)]
    assert all(r["loss"] == r["lm_loss"] + r["balance"] + r["z"] for r in records if r["mode"] == "train")


class Heard(Silent):
    def __init__(self):
        self.lines = []

    def message(self, text):
        self.lines.append(text)


def test_a_slow_backend_is_told_unless_it_was_asked_for(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(extension, "missing", lambda: "the CPU kernels were not built (why)")
    for name, expected in (
        ("auto", ["slow, on the reference backend: the CPU kernels were not built (why)"]),
        ("reference", []),
    ):
        heard, run = Heard(), tiny_run(f"train.backend={name}")
        train(run, tmp_path / name, prepare(run.data), evaluate=evaluate, reporter=heard)
        assert [line for line in heard.lines if "slow" in line] == expected


def test_a_run_is_repeatable_and_depends_on_its_seeds(tiny_run, tmp_path):
    runs = [tiny_run(), tiny_run(), tiny_run("train.seed=1"), tiny_run("data.seed=1")]
    for i, run in enumerate(runs):
        train(run, tmp_path / str(i), prepare(run.data), evaluate=evaluate)
    lines = [steady(tmp_path / str(i)) for i in range(4)]
    assert lines[0] == lines[1]
    assert lines[2] != lines[0] != lines[3]


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("train.precision=bfloat16",),
        ("train.micro_batch_size=null",),
        ("train.optimizer=muon", "train.learning_rate_ratios.experts=2"),
        ("train.optimizer=muon", "train.muon_experts=false"),
        ("model.objective=masked", "model.vocab_size=258"),
        ("train.tbptt=2", "data.context=16"),
    ],
)
def test_resuming_equals_never_having_stopped(tiny_run, tmp_path, monkeypatch, overrides):
    run = tiny_run(*overrides)
    data = prepare(run.data)
    train(run, tmp_path / "whole", data, evaluate=evaluate)
    steps = iter(range(5))

    def killed_after_5(*args, **kwargs):
        if next(steps, None) is None:
            raise Killed
        return whole(*args, **kwargs)

    whole = module.train_step
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_step", killed_after_5)
        with pytest.raises(Killed):
            train(run, tmp_path / "parts", data, evaluate=evaluate)
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == ["step-3"]
    assert steady(tmp_path / "parts")[-1]["step"] == 5
    assert train(run, tmp_path / "parts", data, evaluate=evaluate, resume=True)
    assert steady(tmp_path / "parts") == steady(tmp_path / "whole")
    assert same(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


def test_resuming_a_finished_run_changes_nothing(tiny_run, tmp_path):
    run = tiny_run()
    data = prepare(run.data)
    train(run, tmp_path / "r", data, evaluate=evaluate)
    before = steady(tmp_path / "r")
    assert train(run, tmp_path / "r", data, evaluate=evaluate, resume=True)
    assert steady(tmp_path / "r") == before


def test_a_loss_that_is_no_number_stops_the_run_and_the_checkpoint_stands(tiny_run, tmp_path, monkeypatch):
    run = tiny_run()
    data = prepare(run.data)
    steps = iter(range(4))

    def poisoned_at_5(model, *args, **kwargs):
        if next(steps, None) is None:
            with torch.no_grad():
                model.embedding.weight[7] = float("nan")
        return whole(model, *args, **kwargs)

    whole = module.train_step
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_step", poisoned_at_5)
        with pytest.raises(
            Diverged,
            match=r"is nan at step 5; the checkpoint of step 3 is good.*; weights .*: embedding\.weight",
        ):
            train(run, tmp_path / "r", data, evaluate=evaluate)
    assert steady(tmp_path / "r")[-1]["step"] == 4
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "r").values())
    train(run, tmp_path / "whole", data, evaluate=evaluate)
    train(run, tmp_path / "r", data, evaluate=evaluate, resume=True)
    assert steady(tmp_path / "r") == steady(tmp_path / "whole")


class Lines(Silent):
    """Keeps what is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def message(self, text: str) -> None:
        self.told.append(text)


def test_weights_of_another_tokenizer_are_told_and_damaged_ones_refused(tiny_run, tmp_path):
    run = tiny_run("train.steps=1")
    train(run, tmp_path / "first", prepare(run.data), evaluate=evaluate)
    first = f"train.init_from={tmp_path / 'first'}"
    for tokenizer, told in (("bytes", 0), ("bpe:257", 1)):
        other, lines = tiny_run("train.steps=1", first, f"data.tokenizer={tokenizer}"), Lines()
        train(other, tmp_path / tokenizer[:3], prepare(other.data), evaluate=evaluate, reporter=lines)
        assert sum("another tokenizer, so its embeddings" in line for line in lines.told) == told
    path = find_weights(tmp_path / "first") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"first.*is damaged \(.*\): use another"):
        train(tiny_run(first), tmp_path / "none", prepare(run.data), evaluate=evaluate)


def test_bfloat16_keeps_float32_parameters_and_about_the_same_loss(tiny_run, tmp_path):
    for precision in ("float32", "bfloat16"):
        run = tiny_run(f"train.precision={precision}")
        train(run, tmp_path / precision, prepare(run.data), evaluate=evaluate)
    assert {tensor.dtype for tensor in weights(tmp_path / "bfloat16").values()} == {torch.float32}
    wide, narrow = (steady(tmp_path / p) for p in ("float32", "bfloat16"))
    assert wide != narrow
    for a, b in zip(wide, narrow, strict=True):
        if a["mode"] == "train":
            assert b["lm_loss"] == pytest.approx(a["lm_loss"], rel=0.02)


@pytest.mark.parametrize("overrides", [("model.vocab_size=200",), ("data.context=100000",)])
def test_what_cannot_be_trained_leaves_the_old_run_alone(tiny_run, tmp_path, overrides):
    run = tiny_run()
    train(run, tmp_path / "r", prepare(run.data), evaluate=evaluate)
    before = steady(tmp_path / "r")
    run = tiny_run(*overrides)
    with pytest.raises(ValueError, match=r"set (model\.vocab_size=257|data\.context to)"):
        train(run, tmp_path / "r", prepare(run.data), evaluate=evaluate)
    assert steady(tmp_path / "r") == before


def test_averaged_weights_are_evaluated_saved_and_resumed(tiny_run, tmp_path):
    run = tiny_run("train.average=0.2", "train.checkpoint_every=2", "train.eval_every=2", "train.steps=6")
    data, plain = (
        prepare(run.data),
        tiny_run("train.checkpoint_every=2", "train.steps=6", "train.eval_every=2"),
    )
    train(run, tmp_path / "whole", data, evaluate=evaluate)
    train(plain, tmp_path / "plain", data, evaluate=evaluate)
    found, last = (
        [r for r in read_metrics(tmp_path / name) if r["mode"] == "eval"] for name in ("whole", "plain")
    )
    assert [r["held_out_loss_last"] for r in found] == [r["held_out_loss"] for r in last]
    assert all(r["held_out_loss"] != r["held_out_loss_last"] for r in found)
    assert evaluate(load(tmp_path / "whole")[0])["held_out_loss"] == found[-1]["held_out_loss"]
    shutil.rmtree(tmp_path / "whole" / "checkpoints" / "step-6")
    whole = steady(tmp_path / "whole")
    assert train(run, tmp_path / "whole", data, evaluate=evaluate, resume=True)
    assert steady(tmp_path / "whole") == whole


def test_the_average_is_that_of_the_weights_after_each_step(tiny_run, tmp_path, monkeypatch):
    run, seen = tiny_run("train.average=0.25", "train.steps=5"), []

    def note(model, *args, **kwargs):
        result = whole(model, *args, **kwargs)
        seen.append(model.embedding.weight.detach().clone())
        return result

    whole = module.train_step
    monkeypatch.setattr(module, "train_step", note)
    train(run, tmp_path / "r", prepare(run.data), evaluate=evaluate)
    # g = 1 / share - 2, of which g + 1 is the power (arXiv 2312.02696, section 3.1)
    expected = seen[0]
    for step, weight in enumerate(seen[1:], 2):
        kept = (1 - 1 / step) ** 3
        expected = kept * expected + (1 - kept) * weight
    torch.testing.assert_close(weights(tmp_path / "r")["embedding.weight"], expected)


def test_every_batch_of_a_masked_model_hides_other_places(tiny_run, tmp_path, monkeypatch):
    run, seen = tiny_run("model.objective=masked", "model.vocab_size=258", "train.steps=2"), []

    def note(model, optimizer, batch, *args, **kwargs):
        seen.append(batch)
        return whole(model, optimizer, batch, *args, **kwargs)

    whole = module.train_step
    monkeypatch.setattr(module, "train_step", note)
    train(run, tmp_path / "r", prepare(run.data), evaluate=evaluate)
    hidden = [batch.ids == 257 for batch in seen]
    assert [int(places.sum()) for places in hidden] == [4 * round(0.15 * 32)] * 2
    assert (hidden[0] != hidden[1]).any()


def test_windows_of_a_step_go_on_from_the_step_before(tiny_run, tmp_path, monkeypatch):
    run, seen = tiny_run("train.tbptt=2", "data.context=16", "train.steps=3"), []

    def note(model, optimizer, batch, *args, state, **kwargs):
        result = whole(model, optimizer, batch, *args, state=state, **kwargs)
        seen.append((batch, state, result.state))
        return result

    whole = module.train_step
    monkeypatch.setattr(module, "train_step", note)
    train(run, tmp_path / "r", prepare(run.data), evaluate=evaluate)
    assert seen[0][1] is None
    for (before, _, ended), (after, begun, _) in pairwise(seen):
        assert before.ids.shape == (4, 32)
        assert (before.targets[:, -1] == after.ids[:, 0]).all()
        assert begun is ended is not None


def test_no_checkpoint_is_ahead_of_the_lines_on_the_disk(tiny_run, tmp_path, monkeypatch):
    """Else a power cut could leave steps without lines, which a resumed run would never write."""
    run, kept = tiny_run(), []

    def note(file):
        if os.fstat(file).st_ino == (tmp_path / "r" / "metrics.jsonl").stat().st_ino:
            kept.append((tmp_path / "r" / "metrics.jsonl").read_text().count("\n"))

    def look(*args, **kwargs):
        assert kept[-1] == len(read_metrics(tmp_path / "r"))
        return whole(*args, **kwargs)

    whole = module.save_checkpoint
    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(module, "save_checkpoint", look)
    train(run, tmp_path / "r", prepare(run.data), evaluate=evaluate)
    # after steps 3 and 6, each with its evaluation
    assert kept == [4, 8]


def test_a_run_without_checkpoints_leaves_its_metrics(tiny_run, tmp_path):
    run = tiny_run("train.keep_checkpoints=0")
    assert train(run, tmp_path / "r", prepare(run.data), evaluate=evaluate)
    assert not (tmp_path / "r" / "checkpoints").exists()
    assert read_metrics(tmp_path / "r")[-1]["mode"] == "eval"


def test_what_is_resumed_is_read_under_the_lock(tiny_run, tmp_path, monkeypatch):
    """Else a run that another process ends meanwhile would be set back to the checkpoint read before."""
    run, folder, seen = tiny_run(), tmp_path / "r", []
    data = prepare(run.data)
    train(run, folder, data, evaluate=evaluate)

    def restore(*args):
        with pytest.raises(ValueError, match="another process is training into"), lock_folder(folder):
            pass
        seen.append(args[0].name)
        return whole(*args)

    whole = module.restore_checkpoint
    monkeypatch.setattr(module, "restore_checkpoint", restore)
    train(run, folder, data, evaluate=evaluate, resume=True)
    assert seen == ["step-6"]


def test_changed_data_are_not_resumed(tiny_run, tmp_path, text_folder):
    run = tiny_run()
    data = prepare(run.data)
    train(run, tmp_path / "r", data, evaluate=evaluate)
    with pytest.raises(ValueError, match=r"the text of .* has changed since the run began"):
        train(run, tmp_path / "r", data._replace(content_hash="x"), evaluate=evaluate, resume=True)


def test_the_backend_of_a_run_is_not_decided_again(tiny_run, tmp_path):
    run = tiny_run()
    data = prepare(run.data)
    train(run, tmp_path / "r", data, evaluate=evaluate)
    path = tmp_path / "r" / "environment.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "backend": "abacus"}))
    with pytest.raises(ValueError, match="backend='abacus'"):
        train(run, tmp_path / "r", data, evaluate=evaluate, resume=True)


def test_threads_are_set_for_the_run_only_and_recorded(tiny_run, tmp_path):
    before, seen = torch.get_num_threads(), []

    def look(model):
        seen.append(torch.get_num_threads())
        return evaluate(model)

    other = 3 if before == 2 else 2
    run = tiny_run("train.steps=1", f"train.threads={other}")
    train(run, tmp_path / "r", prepare(run.data), evaluate=look)
    assert seen == [other]
    assert torch.get_num_threads() == before
    assert json.loads((tmp_path / "r" / "environment.json").read_text())["threads"] == other
